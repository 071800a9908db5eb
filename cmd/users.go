package cmd

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
)

// withRegistry runs a command on the users and devices.
func (a *app) withRegistry(ctx context.Context, what string, do func(ctx context.Context, r *registry.Registry) error) error {
	return a.withMirror(ctx, func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
		return refusal(what, do(ctx, registry.New(mirror, nil)))
	})
}

func newUsers(a *app) *cobra.Command {
	c := &cobra.Command{Use: "users", Short: "The people who sync"}
	var file string
	var groups, attrs []string
	var none bool
	add := &cobra.Command{Use: "add NAME", Short: "Add a user; the password comes from a prompt, stdin or --password-file", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			set, err := attributes(attrs)
			if err != nil {
				return err
			}
			return a.withRegistry(c.Context(), "cannot add user "+args[0], func(ctx context.Context, r *registry.Registry) error {
				u := registry.UserChange{Groups: groups, Set: set}
				if !none {
					if u.Password, err = a.password(file, "Password for "+args[0], true); err != nil {
						return err
					}
				}
				if err := r.CreateUser(ctx, args[0], u); err != nil {
					return err
				}
				a.say("user %s added; on the device: waystage device enrol --file %s.db --server nats://... --user %s --device NAME", args[0], args[0], args[0])
				return nil
			})
		}}
	add.Flags().StringVar(&file, "password-file", "", "file with the password; - for stdin")
	add.Flags().BoolVar(&none, "no-password", false, "the user gets no password")
	add.MarkFlagsMutuallyExclusive("password-file", "no-password")
	add.Flags().StringSliceVar(&groups, "group", nil, "group that the user belongs to; may be given often")
	add.Flags().StringArrayVar(&attrs, "attr", nil, "attribute, as name=value; rows queries read it as :user.name; may be given often")
	_ = add.RegisterFlagCompletionFunc("group", a.completeGroup)

	passwd := &cobra.Command{Use: "passwd NAME", Short: "Change a user's password; enrolled devices keep their keys", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRegistry(c.Context(), "cannot change the password of "+args[0], func(ctx context.Context, r *registry.Registry) error {
				pw, err := a.password(file, "New password for "+args[0], true)
				if err != nil {
					return err
				}
				if err := r.SetPassword(ctx, args[0], pw); err != nil {
					return err
				}
				a.say("password of %s changed", args[0])
				return nil
			})
		}}
	passwd.Flags().StringVar(&file, "password-file", "", "file with the password; - for stdin")

	var f format
	ls := &cobra.Command{Use: "ls", Short: "List users", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withRegistry(c.Context(), "cannot list users", func(ctx context.Context, r *registry.Registry) error {
				users, err := r.ListUsers(ctx, "")
				if err != nil {
					return err
				}
				return a.printUsers(f, users)
			})
		}}
	withOutput(ls, &f)

	simple := func(use, short, done string, do func(*registry.Registry, context.Context, string) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeUser,
			RunE: func(c *cobra.Command, args []string) error {
				return a.withRegistry(c.Context(), "cannot "+c.Name()+" user "+args[0], func(ctx context.Context, r *registry.Registry) error {
					if err := do(r, ctx, args[0]); err != nil {
						return err
					}
					a.say(done, args[0])
					return nil
				})
			}}
	}
	var yes bool
	rm := simple("rm NAME", "Remove a user with all devices", "user %s removed", func(r *registry.Registry, ctx context.Context, name string) error {
		if err := a.confirm(yes, "This removes user "+name+", all devices of theirs and what these have not fetched", name); err != nil {
			return err
		}
		return r.RemoveUser(ctx, name)
	})
	rm.Flags().BoolVar(&yes, "yes", false, "do not ask")
	groupsCmd := &cobra.Command{Use: "groups NAME [GROUP...]", Short: "Set the groups that a user belongs to", Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRegistry(c.Context(), "cannot set groups of "+args[0], func(ctx context.Context, r *registry.Registry) error {
				if err := r.SetGroups(ctx, args[0], args[1:]); err != nil {
					return err
				}
				a.say("groups of %s: %s", args[0], strings.Join(args[1:], ", "))
				return nil
			})
		}}
	for _, sub := range []*cobra.Command{passwd, groupsCmd} {
		sub.ValidArgsFunction = a.completeUser
	}
	c.AddCommand(add, ls, newUsersShow(a), newUsersSet(a), newUsersImport(a), passwd, groupsCmd,
		simple("block NAME", "Keep a user out and close the connections of all devices", "user %s blocked", (*registry.Registry).BlockUser),
		simple("unblock NAME", "Let a user in again", "user %s unblocked", (*registry.Registry).UnblockUser), rm)
	return c
}

func blockedWord(b bool) string {
	if b {
		return "blocked"
	}
	return "ok"
}

func (a *app) printUsers(f format, users []registry.User) error {
	return printRows(a.out, f, users, []column[registry.User]{
		{"user", func(u registry.User) string { return u.Name }},
		{"groups", func(u registry.User) string { return strings.Join(u.Groups, ",") }},
		{"attributes", func(u registry.User) string { return strings.Join(assignments(u.Attributes), " ") }},
		{"devices", func(u registry.User) string { return strconv.Itoa(u.Devices) }},
		{"state", func(u registry.User) string { return blockedWord(u.Blocked) }},
		{"since", func(u registry.User) string { return u.CreatedAt.Format("2006-01-02") }},
	})
}

// attributes reads name=value.
func attributes(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range list {
		k, v, ok := strings.Cut(s, "=")
		if _, double := out[k]; !ok || k == "" || double {
			return nil, usage("want attributes as name=value, each once, not %q", s)
		}
		out[k] = v
	}
	return out, nil
}

// assignments writes name=value, by name.
func assignments(attrs map[string]string) []string {
	out := make([]string, 0, len(attrs))
	for _, k := range slices.Sorted(maps.Keys(attrs)) {
		out = append(out, k+"="+attrs[k])
	}
	return out
}

// shownUser is a user with the devices.
type shownUser struct {
	registry.User
	List []registry.Device `json:"device_list"`
}

func newUsersShow(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "show NAME", Short: "Show a user: groups, attributes, devices", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeUser,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRegistry(c.Context(), "cannot show user "+args[0], func(ctx context.Context, r *registry.Registry) error {
				u, err := r.User(ctx, args[0])
				if err != nil {
					return err
				}
				devices, err := r.ListDevices(ctx, registry.DeviceFilter{User: u.Name})
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, shownUser{u, devices})
				}
				password := "yes"
				if !u.Password {
					password = "none"
				}
				fmt.Fprintf(a.out, "user: %s (%s, since %s)\npassword: %s\ngroups: %s\n", u.Name, blockedWord(u.Blocked), u.CreatedAt.Format("2006-01-02"), password,
					clean(strings.Join(u.Groups, ", ")))
				for _, s := range assignments(u.Attributes) {
					fmt.Fprintln(a.out, "attribute: "+clean(s))
				}
				if len(devices) == 0 {
					return nil
				}
				fmt.Fprintln(a.out)
				return a.printDevices(f, devices)
			})
		}}
	withOutput(c, &f)
	return c
}

func newUsersSet(a *app) *cobra.Command {
	var unset []string
	c := &cobra.Command{Use: "set NAME [ATTRIBUTE=VALUE...]", Short: "Set attributes of a user, which rows queries read as :user.attribute", Args: cobra.MinimumNArgs(1),
		Long: `Set attributes of a user, which rows queries read as :user.attribute. From the next sync of each device on the rows that
came with it are there, and the others are gone. A value goes with its quotes if it has any: ward='north wing' in a shell.`,
		ValidArgsFunction: a.completeUser,
		RunE: func(c *cobra.Command, args []string) error {
			set, err := attributes(args[1:])
			if err != nil {
				return err
			}
			if len(set)+len(unset) == 0 {
				return usage("name what to set, as attribute=value, or --unset attribute")
			}
			return a.withRegistry(c.Context(), "cannot set attributes of "+args[0], func(ctx context.Context, r *registry.Registry) error {
				if err := r.ChangeUser(ctx, args[0], registry.UserChange{Set: set, Unset: unset}); err != nil {
					return err
				}
				u, err := r.User(ctx, args[0])
				if err != nil {
					return err
				}
				a.say("attributes of %s: %s", args[0], clean(strings.Join(assignments(u.Attributes), " ")))
				return nil
			})
		}}
	c.Flags().StringSliceVar(&unset, "unset", nil, "attribute to take away; may be given often")
	return c
}

// completeUser completes the name of a user as the first argument.
func (a *app) completeUser(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeFrom(`SELECT name FROM waystage.app_user WHERE name <> '`+protocol.OperatorUser+`' ORDER BY name`)(c, args, typed)
}

// completeDevice completes USER/DEVICE as the first argument.
func (a *app) completeDevice(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeFrom(`SELECT user_name || '/' || name FROM waystage.device WHERE removed_at IS NULL AND user_name <> '`+protocol.OperatorUser+`' ORDER BY 1`)(c, args, typed)
}
