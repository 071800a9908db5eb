package cmd

import (
	"context"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/registry"
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
	var groups []string
	add := &cobra.Command{Use: "add NAME", Short: "Add a user; the password comes from a prompt, stdin or --password-file", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRegistry(c.Context(), "cannot add user "+args[0], func(ctx context.Context, r *registry.Registry) error {
				pw, err := a.password(file, "Password for "+args[0], true)
				if err != nil {
					return err
				}
				if err := r.AddUser(ctx, args[0], pw, groups...); err != nil {
					return err
				}
				a.say("user %s added; on the device: waystage device enrol --file %s.db --server nats://... --user %s --device NAME", args[0], args[0], args[0])
				return nil
			})
		}}
	add.Flags().StringVar(&file, "password-file", "", "file with the password; - for stdin")
	add.Flags().StringSliceVar(&groups, "group", nil, "group that the user belongs to; may be given often")

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
				users, err := r.ListUsers(ctx)
				if err != nil {
					return err
				}
				return printRows(a.out, f, users, []column[registry.User]{
					{"user", func(u registry.User) string { return u.Name }},
					{"groups", func(u registry.User) string { return strings.Join(u.Groups, ",") }},
					{"devices", func(u registry.User) string { return strconv.Itoa(u.Devices) }},
					{"state", func(u registry.User) string { return blockedWord(u.Blocked) }},
					{"since", func(u registry.User) string { return u.CreatedAt.Format("2006-01-02") }},
				})
			})
		}}
	withOutput(ls, &f)

	simple := func(use, short, done string, do func(*registry.Registry, context.Context, string) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1),
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
	c.AddCommand(add, ls, passwd, groupsCmd,
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

func newDevices(a *app) *cobra.Command {
	c := &cobra.Command{Use: "devices", Short: "The users' devices, as the server knows them"}
	var f format
	ls := &cobra.Command{Use: "ls [USER]", Short: "List devices", Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRegistry(c.Context(), "cannot list devices", func(ctx context.Context, r *registry.Registry) error {
				devices, err := r.ListDevices(ctx, strings.Join(args, ""))
				if err != nil {
					return err
				}
				return printRows(a.out, f, devices, []column[registry.Device]{
					{"device", func(d registry.Device) string { return d.User + "/" + d.Name }},
					{"state", deviceState},
					{"last sync", func(d registry.Device) string { return ago(d.LastSyncAt) }},
					{"last seen", func(d registry.Device) string { return ago(d.LastSeenAt) }},
					{"app", func(d registry.Device) string { return d.App }},
				})
			})
		}}
	withOutput(ls, &f)

	simple := func(use, short, done string, do func(r *registry.Registry, ctx context.Context, user, device string) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1),
			RunE: func(c *cobra.Command, args []string) error {
				user, device, ok := strings.Cut(args[0], "/")
				if !ok {
					return usage("want USER/DEVICE, not %q", args[0])
				}
				return a.withRegistry(c.Context(), "cannot "+c.Name()+" device "+args[0], func(ctx context.Context, r *registry.Registry) error {
					if err := do(r, ctx, user, device); err != nil {
						return err
					}
					a.say(done, args[0])
					return nil
				})
			}}
	}
	var yes bool
	rm := simple("rm USER/DEVICE", "Forget a device", "device %s removed", func(r *registry.Registry, ctx context.Context, user, device string) error {
		name := user + "/" + device
		if err := a.confirm(yes, "This forgets device "+name+"; what it has sent stays", name); err != nil {
			return err
		}
		return r.RemoveDevice(ctx, user, device)
	})
	rm.Flags().BoolVar(&yes, "yes", false, "do not ask")
	c.AddCommand(ls,
		simple("block USER/DEVICE", "Keep a device out and close its connections", "device %s blocked", (*registry.Registry).BlockDevice),
		simple("unblock USER/DEVICE", "Let a device in again", "device %s unblocked", (*registry.Registry).UnblockDevice), rm)
	return c
}

func deviceState(d registry.Device) string {
	switch {
	case d.Blocked:
		return "blocked"
	case d.PublicKey == "":
		return "not enrolled"
	}
	return "ok"
}
