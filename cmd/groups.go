package cmd

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// group is what the definitions and the users together say of a group.
type group struct {
	Name    string   `json:"name"`
	Defined bool     `json:"defined"` // stands in the definitions
	Sets    []string `json:"sets"`    // in sync order
	Members int      `json:"members"`
}

func newGroups(a *app) *cobra.Command {
	c := &cobra.Command{Use: "groups", Short: "Who belongs together: groups of users, and the sets that each has"}
	var f format
	ls := &cobra.Command{Use: "ls", Short: "List groups with their sets and the number of members", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withGroups(c.Context(), "cannot list groups", func(_ context.Context, _ *registry.Registry, groups []group) error {
				return a.printGroups(f, groups)
			})
		}}
	withOutput(ls, &f)

	find := func(groups []group, name string) (group, error) {
		for _, g := range groups {
			if g.Name == name {
				return g, nil
			}
		}
		return group{}, &failure{code: exitPrecondition, what: "there is no group " + name, remedy: "see 'waystage groups ls'; a group is made in the definitions"}
	}
	show := &cobra.Command{Use: "show GROUP", Short: "Show a group: its sets and how many members it has", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeGroup,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withGroups(c.Context(), "cannot show group "+args[0], func(_ context.Context, _ *registry.Registry, groups []group) error {
				g, err := find(groups, args[0])
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, g)
				}
				return a.printGroups(f, []group{g})
			})
		}}
	withOutput(show, &f)
	members := &cobra.Command{Use: "members GROUP", Short: "List the users in a group", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeGroup,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withGroups(c.Context(), "cannot list the members of "+args[0], func(ctx context.Context, r *registry.Registry, groups []group) error {
				if _, err := find(groups, args[0]); err != nil {
					return err
				}
				users, err := r.ListUsers(ctx, args[0])
				if err != nil {
					return err
				}
				return a.printUsers(f, users)
			})
		}}
	withOutput(members, &f)

	// Each user stands for itself: one that does not exist does not keep the others out.
	each := func(c *cobra.Command, args []string, do func(context.Context, *registry.Registry, string) error, done string) error {
		return a.withGroups(c.Context(), "cannot change group "+args[0], func(ctx context.Context, r *registry.Registry, groups []group) error {
			if g, _ := find(groups, args[0]); !g.Defined && protocol.ValidName(args[0]) {
				a.say("note: the definitions have no group %s: its members get no sets by it", args[0])
			}
			failed := 0
			for _, user := range args[1:] {
				if err := do(ctx, r, user); err != nil {
					err = refusal("cannot change the groups of "+user, err)
					if code := exitCode(err); code != exitPrecondition && code != exitUsage || len(args) == 2 {
						return err
					}
					report(a.err, err)
					failed++
					continue
				}
				a.say(done, user, args[0])
			}
			if failed > 0 {
				return silent(exitRejected)
			}
			return nil
		})
	}
	add := &cobra.Command{Use: "add GROUP USER...", Short: "Put users into a group", Args: cobra.MinimumNArgs(2), ValidArgsFunction: a.completeMember,
		RunE: func(c *cobra.Command, args []string) error {
			return each(c, args, func(ctx context.Context, r *registry.Registry, user string) error {
				return r.JoinGroup(ctx, user, args[0])
			}, "%s is in %s")
		}}
	remove := &cobra.Command{Use: "remove GROUP USER...", Short: "Take users out of a group; what they had by it leaves their devices with the next sync", Args: cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeMember,
		RunE: func(c *cobra.Command, args []string) error {
			return each(c, args, func(ctx context.Context, r *registry.Registry, user string) error {
				return r.LeaveGroup(ctx, user, args[0])
			}, "%s is not in %s")
		}}
	c.AddCommand(ls, show, members, add, remove)
	return c
}

// withGroups runs a command on the groups that the definitions in force have or that have members, by name.
func (a *app) withGroups(ctx context.Context, what string, do func(context.Context, *registry.Registry, []group) error) error {
	return a.withDefinitions(ctx, func(ctx context.Context, _ Config, mirror *pgxpool.Pool, defs *schema.Definitions) error {
		r := registry.New(mirror, nil)
		sizes, err := r.GroupSizes(ctx)
		if err != nil {
			return err
		}
		all := map[string]group{}
		for name, n := range sizes {
			all[name] = group{Name: name, Sets: []string{}, Members: n}
		}
		for _, g := range defs.Groups {
			all[g.Name] = group{Name: g.Name, Defined: true, Sets: defs.SetsFor([]string{g.Name}), Members: sizes[g.Name]}
		}
		groups := slices.SortedFunc(maps.Values(all), func(a, b group) int { return cmp.Compare(a.Name, b.Name) })
		return refusal(what, do(ctx, r, groups))
	})
}

func (a *app) printGroups(f format, groups []group) error {
	return printRows(a.out, f, groups, []column[group]{
		{"group", func(g group) string { return g.Name }},
		{"members", func(g group) string { return strconv.Itoa(g.Members) }},
		{"sets", func(g group) string {
			if !g.Defined {
				return "(not in the definitions)"
			}
			return strings.Join(g.Sets, ",")
		}},
	})
}

// completeGroup completes the name of a group that is defined.
func (a *app) completeGroup(c *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(c.Context(), 2*time.Second)
	defer cancel()
	var names []string
	_ = a.withGroups(ctx, "", func(_ context.Context, _ *registry.Registry, groups []group) error { // without a mirror nothing is completed
		for _, g := range groups {
			if strings.HasPrefix(g.Name, typed) {
				names = append(names, g.Name)
			}
		}
		return nil
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeMember completes a group, and users behind it.
func (a *app) completeMember(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.completeGroup(c, args, typed)
	}
	return a.completeUser(c, nil, typed)
}
