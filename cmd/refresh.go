package cmd

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/schema"
)

const refreshLong = `At the next sync each device is sent all rows of the set, as if it had never synced; rows that it should not have go.
Unsent changes stay and are sent as ever. Orders stand in the mirror with who gave them; giving one again changes nothing.`

// orderOptions are what all ways to order a refresh have in common.
type orderOptions struct {
	only     []string
	note, as string
}

func (o *orderOptions) flags(a *app, c *cobra.Command, only bool) {
	if only {
		c.Flags().StringSliceVar(&o.only, "only", nil, "only this subscription set; may be given often")
		_ = c.RegisterFlagCompletionFunc("only", a.completeFrom(`SELECT DISTINCT set_name FROM waystage.cursor ORDER BY 1`))
	}
	c.Flags().StringVar(&o.note, "note", "", "why, for the record")
	c.Flags().StringVar(&o.as, "as", "", "login that the record names (default: yours on this machine)")
	_ = c.RegisterFlagCompletionFunc("note", cobra.NoFileCompletions)
	_ = c.RegisterFlagCompletionFunc("as", cobra.NoFileCompletions)
}

// newDevicesRefresh and the next two order that everything is sent anew.
func newDevicesRefresh(a *app) *cobra.Command {
	var o orderOptions
	c := &cobra.Command{Use: "refresh USER/DEVICE", Short: "Send a device everything anew at its next sync", Long: refreshLong, Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeDevice,
		RunE: func(c *cobra.Command, args []string) error {
			user, device, ok := strings.Cut(args[0], "/")
			if !ok {
				return usage("want USER/DEVICE, not %q", args[0])
			}
			return a.orderRefresh(c.Context(), &o, "device "+args[0], registry.RefreshOrder{User: user, Device: device})
		}}
	o.flags(a, c, true)
	return c
}

func newUsersRefresh(a *app) *cobra.Command {
	var o orderOptions
	c := &cobra.Command{Use: "refresh USER", Short: "Send all devices of a user everything anew at their next sync", Long: refreshLong, Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeUser,
		RunE: func(c *cobra.Command, args []string) error {
			return a.orderRefresh(c.Context(), &o, "user "+args[0], registry.RefreshOrder{User: args[0]})
		}}
	o.flags(a, c, true)
	return c
}

func newSubscriptionsRefresh(a *app) *cobra.Command {
	var o orderOptions
	var yes bool
	c := &cobra.Command{Use: "refresh SUBSCRIPTION", Short: "Send everything anew to all devices that have a subscription",
		Long: refreshLong + "\n\nA device is sent sets as a whole: all those that the subscription is in.", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withDefinitions(c.Context(), func(ctx context.Context, _ Config, mirror *pgxpool.Pool, defs *schema.Definitions) error {
				var sets []string
				for _, s := range defs.Sets {
					if slices.Contains(s.Subscriptions, args[0]) {
						sets = append(sets, s.Name)
					}
				}
				if len(sets) == 0 {
					return &failure{code: exitPrecondition, what: "cannot refresh subscription " + args[0], err: fmt.Errorf("unknown_subscription: no set has it"),
						remedy: "see 'waystage subscriptions show'"}
				}
				var devices int
				if err := mirror.QueryRow(ctx, `SELECT count(DISTINCT device_id) FROM waystage.cursor WHERE set_name = ANY ($1)`, sets).Scan(&devices); err != nil {
					return err
				}
				if err := a.confirm(yes, fmt.Sprintf("This sends set %s anew to %d devices", strings.Join(sets, ", "), devices), args[0]); err != nil {
					return err
				}
				return a.order(ctx, &o, mirror, "subscription "+args[0], registry.RefreshOrder{Sets: sets, Subscription: args[0]})
			})
		}}
	o.flags(a, c, false)
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

// orderRefresh orders it for one user or device, of all sets or those named, which the user must have.
func (a *app) orderRefresh(ctx context.Context, o *orderOptions, whom string, order registry.RefreshOrder) error {
	return a.withDefinitions(ctx, func(ctx context.Context, _ Config, mirror *pgxpool.Pool, defs *schema.Definitions) error {
		if len(o.only) > 0 {
			u, err := registry.New(mirror, nil).User(ctx, order.User)
			if err != nil {
				return refusal("cannot refresh "+whom, err)
			}
			has := defs.SetsFor(u.Groups)
			for _, set := range o.only {
				if !slices.Contains(has, set) {
					return &failure{code: exitPrecondition, what: "cannot refresh " + whom, err: fmt.Errorf("unknown_set: user %s has no subscription set %q", u.Name, set),
						remedy: "the user's sets: " + cmp.Or(strings.Join(has, ", "), "none")}
				}
			}
			order.Sets = o.only
		}
		return a.order(ctx, o, mirror, whom, order)
	})
}

func (a *app) order(ctx context.Context, o *orderOptions, mirror *pgxpool.Pool, whom string, order registry.RefreshOrder) (err error) {
	if order.Who, err = (&chosen{as: o.as}).actor(); err != nil {
		return err
	}
	order.Note = o.note
	id, devices, err := registry.New(mirror, nil).OrderRefresh(ctx, order)
	if err != nil {
		return refusal("cannot refresh "+whom, err)
	}
	a.say("%s: order %d, %d devices get everything anew at their next sync; see 'waystage devices refreshes'", whom, id, devices)
	return nil
}

// newDevicesRefreshes shows how far the orders are.
func newDevicesRefreshes(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "refreshes [USER[/DEVICE]]", Short: "Show which devices were ordered to be sent everything anew, by whom, and how far that is", Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeDevice,
		RunE: func(c *cobra.Command, args []string) error {
			user, device, _ := strings.Cut(strings.Join(args, ""), "/")
			return a.withRegistry(c.Context(), "cannot list refreshes", func(ctx context.Context, r *registry.Registry) error {
				list, err := r.Refreshes(ctx, user, device)
				if err != nil {
					return err
				}
				return printRows(a.out, f, list, []column[registry.Refresh]{
					{"device", func(r registry.Refresh) string { return r.User + "/" + r.Device }},
					{"set", func(r registry.Refresh) string { return r.Set }},
					{"state", func(r registry.Refresh) string { return r.State }},
					{"order", func(r registry.Refresh) string { return strconv.FormatInt(r.Order, 10) }},
					{"asked", func(r registry.Refresh) string { return ago(&r.AskedAt) }},
					{"by", func(r registry.Refresh) string { return r.Who }},
					{"note", func(r registry.Refresh) string { return r.Note }},
				})
			})
		}}
	withOutput(c, &f)
	return c
}

// addRefresh puts the commands where their kin are.
func addRefresh(a *app, users, devices, subscriptions *cobra.Command) {
	users.AddCommand(newUsersRefresh(a))
	devices.AddCommand(newDevicesRefresh(a), newDevicesRefreshes(a))
	subscriptions.AddCommand(newSubscriptionsRefresh(a))
}
