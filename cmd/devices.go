package cmd

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/registry"
)

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
				return a.printDevices(f, devices)
			})
		}}
	withOutput(ls, &f)

	simple := func(use, short, done string, do func(r *registry.Registry, ctx context.Context, user, device string) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeDevice,
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

func (a *app) printDevices(f format, devices []registry.Device) error {
	return printRows(a.out, f, devices, []column[registry.Device]{
		{"device", func(d registry.Device) string { return d.User + "/" + d.Name }},
		{"state", deviceState},
		{"last sync", func(d registry.Device) string { return ago(d.LastSyncAt) }},
		{"last seen", func(d registry.Device) string { return ago(d.LastSeenAt) }},
		{"app", func(d registry.Device) string { return d.App }},
	})
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
