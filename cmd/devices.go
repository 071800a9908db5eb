package cmd

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
)

func newDevices(a *app) *cobra.Command {
	c := &cobra.Command{Use: "devices", Short: "The users' devices, as the server knows them"}
	c.AddCommand(newDevicesLs(a), newDevicesShow(a), newDevicesToken(a), newDevicesTokens(a))

	// each does something to devices that are named, each for itself: what is wrong with one does not stop the others.
	each := func(use, short, long, done string, ask func(names []string) string, do func(r *registry.Registry, ctx context.Context, user, device string) error) *cobra.Command {
		var yes bool
		c := &cobra.Command{Use: use + " USER/DEVICE...", Short: short, Long: long, Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.completeDevices,
			RunE: func(c *cobra.Command, args []string) error {
				for _, name := range args {
					if _, _, err := deviceName(name); err != nil {
						return err
					}
				}
				if ask != nil {
					word := args[0]
					if len(args) > 1 {
						word = strconv.Itoa(len(args)) + " devices"
					}
					if err := a.confirm(yes, ask(args), word); err != nil {
						return err
					}
				}
				return a.withRegistry(c.Context(), "cannot "+c.Name()+" device "+args[0], func(ctx context.Context, r *registry.Registry) error {
					return a.severally(args, "cannot "+c.Name()+" device ", done, func(i int) error {
						user, device, _ := deviceName(args[i])
						return do(r, ctx, user, device)
					})
				})
			}}
		if long == "" {
			c.Long = short + "."
		}
		if ask != nil {
			c.Flags().BoolVar(&yes, "yes", false, "do not ask")
		}
		return c
	}
	c.AddCommand(
		each("block", "Keep devices out and close their connections", `Keep devices out and close their connections at once, in all server processes. What they have and what the server has of them stays; edits that
are not sent stay on the device, and go with the first sync after 'unblock'.`, "device %s blocked", nil, (*registry.Registry).BlockDevice),
		each("unblock", "Let devices in again", "", "device %s unblocked", nil, (*registry.Registry).UnblockDevice),
		each("rotate", "Have devices take a new key with their next sync", `Have devices take a new key with their next sync. The old key is good until the device has logged in with the new one, and is refused
everywhere afterwards; a copy of the device's file that somebody else has is out with that. A device whose key must not be good any longer at all: 'reset' or 'block'.`,
			"device %s takes a new key with its next sync", nil, (*registry.Registry).AskNewKey),
		each("reset", "Take devices' keys away: they must enrol again, and begin anew", `Take devices' keys away and close their connections: they must enrol again ('waystage device enrol' on the same file), with the user's password, a token
('waystage devices token') or a JWT.

Nothing is lost. Records that the server has taken go their way and get their verdict. The file keeps every edit: with the first sync after the
enrolment it begins a new incarnation, fetches all rows anew, and sends what was not sent, and again what was sent and has no verdict yet; an edit made on a row
that others have changed since is rejected, as ever.`, "device %s is reset: it must enrol again",
			func(names []string) string {
				return "This takes the key of " + strings.Join(names, ", ") + " away; the edits in the file stay"
			}, (*registry.Registry).ResetDevice),
		each("rm", "Forget devices", `Forget devices, with their keys, cursors and unused tokens, and close their connections. Records that the server has taken go their way and get their verdict
(waystage receipts); a file that is enrolled under the same name again hears of it, and keeps its edits as after 'reset'.`, "device %s removed",
			func(names []string) string {
				return "This forgets " + strings.Join(names, ", ") + "; what was sent stays"
			}, (*registry.Registry).RemoveDevice))
	return c
}

// deviceName reads USER/DEVICE.
func deviceName(s string) (user, device string, err error) {
	user, device, ok := strings.Cut(s, "/")
	if !ok {
		return "", "", usage("want USER/DEVICE, not %q", s)
	}
	return user, device, nil
}

func newDevicesLs(a *app) *cobra.Command {
	var f format
	var filter registry.DeviceFilter
	var stale Duration
	c := &cobra.Command{Use: "ls [USER]", Short: "List devices", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completeUser,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				if filter.User != "" && filter.User != args[0] {
					return usage("two users are named: %s and %s", args[0], filter.User)
				}
				filter.User = args[0]
			}
			filter.StaleFor = time.Duration(stale)
			return a.withRegistry(c.Context(), "cannot list devices", func(ctx context.Context, r *registry.Registry) error {
				devices, err := r.ListDevices(ctx, filter)
				if err != nil {
					return err
				}
				return a.printDevices(f, devices)
			})
		}}
	withOutput(c, &f)
	flags := c.Flags()
	flags.StringVar(&filter.User, "user", "", "only this user's")
	flags.StringVar(&filter.Group, "group", "", "only those of the members of this group")
	flags.StringVar(&filter.App, "app", "", "only those with this version of the application")
	flags.StringVar(&filter.BuiltFor, "built-for", "", "only those whose application was built for this: its name, or 8 digits or more of its hash")
	flags.BoolVar(&filter.Blocked, "blocked", false, "only those that are kept out, themselves or with their user")
	flags.BoolVar(&filter.NotEnrolled, "not-enrolled", false, "only those without a key")
	flags.BoolVar(&filter.Forked, "forked", false, "only those whose file turned out to be restored or copied")
	flags.Var(&stale, "stale", "only those without a complete sync for this time, e.g. 7d or 12h")
	_ = c.RegisterFlagCompletionFunc("user", a.completeFrom(`SELECT name FROM waystage.app_user WHERE name <> '`+protocol.OperatorUser+`' ORDER BY name`))
	_ = c.RegisterFlagCompletionFunc("group", a.completeGroup)
	_ = c.RegisterFlagCompletionFunc("app", a.completeFrom(`SELECT DISTINCT app FROM waystage.device WHERE app <> '' AND removed_at IS NULL ORDER BY app`))
	_ = c.RegisterFlagCompletionFunc("built-for", a.completeFrom(`SELECT DISTINCT built->>'name' FROM waystage.built WHERE built->>'name' <> '' ORDER BY 1`))
	_ = c.RegisterFlagCompletionFunc("stale", cobra.FixedCompletions([]string{"12h", "1d", "7d", "30d"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) printDevices(f format, devices []registry.Device) error {
	return printRows(a.out, f, devices, []column[registry.Device]{
		{"device", func(d registry.Device) string { return d.User + "/" + d.Name }},
		{"state", deviceState},
		{"last sync", func(d registry.Device) string { return ago(d.LastSyncAt) }},
		{"last seen", func(d registry.Device) string { return ago(d.LastSeenAt) }},
		{"oldest unsent", func(d registry.Device) string {
			if d.OldestUnsentAt == nil {
				return ""
			}
			return ago(d.OldestUnsentAt)
		}},
		{"app", func(d registry.Device) string { return d.App }},
		{"built for", func(d registry.Device) string {
			if d.Built == nil {
				return ""
			}
			return cmp.Or(d.Built.Name, d.Built.Hash[:8])
		}},
	})
}

func deviceState(d registry.Device) string {
	switch {
	case d.Blocked:
		return "blocked"
	case d.PublicKey == "":
		return "not enrolled"
	case d.Forks > 0:
		return fmt.Sprintf("ok, forked %d times", d.Forks)
	}
	return "ok"
}

func newDevicesShow(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "show USER/DEVICE", Short: "Show a device: key, last syncs, what is on its way, refused logins, forks", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeDevice,
		RunE: func(c *cobra.Command, args []string) error {
			user, device, err := deviceName(args[0])
			if err != nil {
				return err
			}
			return a.withRegistry(c.Context(), "cannot show device "+args[0], func(ctx context.Context, r *registry.Registry) error {
				d, err := r.Device(ctx, user, device)
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, d)
				}
				return a.printDevice(d)
			})
		}}
	withOutput(c, &f)
	return c
}

// builtFor names what an application was built for.
func builtFor(b *registry.BuiltFor) string {
	if b == nil {
		return "everything: the application does not say"
	}
	return strings.TrimSpace(fmt.Sprintf("%s (%.8s)", b.Name, b.Hash))
}

// at prints a point in time for a person who may want to find it in a log.
func at(t *time.Time) string {
	if t == nil || t.IsZero() {
		return "never"
	}
	return t.Local().Format(time.DateTime) + ", " + ago(t)
}

// refreshed says how far an order to send everything anew is.
func refreshed(f registry.Refresh) string {
	what := "everything"
	if f.Set != "" {
		what = "set " + f.Set
	}
	state := map[string]string{"waiting": "waits for the next sync", "sent": "sent, and not confirmed yet", "done": "done"}[f.State]
	text := fmt.Sprintf("%s: %s; ordered %s by %s", what, state, at(&f.AskedAt), f.Who)
	if f.Note != "" {
		text += ": " + f.Note
	}
	return text
}

func (a *app) printDevice(d registry.DeviceDetail) error {
	line := func(what, text string) { fmt.Fprintf(a.out, "%s: %s\n", what, clean(text)) }
	state := deviceState(d.Device)
	if d.UserBlocked {
		state += "; the user is blocked"
	}
	line("device", d.User+"/"+d.Name+" ("+state+")")
	line("groups", strings.Join(d.Groups, ", "))
	line("app", d.App)
	line("library", d.Library)
	line("built for", builtFor(d.Built))
	key := "none: it must enrol"
	if d.Fingerprint != "" {
		key = d.Fingerprint + " since " + at(d.KeyAt)
	}
	line("key", key)
	switch {
	case d.NewKey != "":
		line("new key", d.NewKey+", announced; in force with the next login")
	case d.NewKeyAsked != nil:
		line("new key", "wanted since "+at(d.NewKeyAsked)+": the device hears of it with its next sync")
	}
	line("enrolled", at(d.EnrolledAt))
	line("last seen", at(d.LastSeenAt))
	line("last sync", at(d.LastSyncAt))
	if d.ResetAt != nil {
		line("reset", at(d.ResetAt))
	}
	line("on its way", fmt.Sprintf("%d records wait for the merge, %d for the source", d.Unmerged, d.Unapplied))
	line("rejects open", strconv.FormatInt(d.RejectsOpen, 10))
	oldest := "none"
	if d.OldestUnsentAt != nil {
		oldest = at(d.OldestUnsentAt)
	}
	line("oldest unsent edit, as it said when its last sync began", oldest)
	refused := "never"
	if d.Refused != nil {
		refused = fmt.Sprintf("%s: %s", at(&d.Refused.At), d.Refused.Code)
		if d.Refused.Host != "" {
			refused += ", from " + d.Refused.Host + " (whoever it was claimed this name)"
		}
	}
	line("last login refused", refused)
	forks := "never"
	if d.Forks > 0 {
		forks = fmt.Sprintf("%d times, last %s: the file was restored from a backup, or copies of it are in use; a copy is to be enrolled as a device of its own", d.Forks, at(d.ForkedAt))
	}
	line("forked", forks)
	line("incarnations", strconv.Itoa(len(d.Incarnations)))
	for _, f := range d.Refreshes {
		line("refresh", refreshed(f))
	}
	if len(d.Sets) == 0 {
		return nil
	}
	fmt.Fprintln(a.out)
	return printRows(a.out, "table", d.Sets, []column[registry.DeviceSet]{
		{"set", func(s registry.DeviceSet) string { return s.Set }},
		{"last good up", func(s registry.DeviceSet) string { return ago(s.UpAt) }},
		{"last good down", func(s registry.DeviceSet) string { return ago(s.DownAt) }},
		{"open session", func(s registry.DeviceSet) string {
			if s.OpenAt == nil {
				return ""
			}
			return "since " + ago(s.OpenAt)
		}},
	})
}

// completeDevices completes USER/DEVICE, each once.
func (a *app) completeDevices(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	found, d := a.completeDevice(c, nil, typed)
	left := found[:0]
	for _, name := range found {
		if !slices.Contains(args, name) {
			left = append(left, name)
		}
	}
	return left, d
}

// issuedToken is a token with its secret, which is shown this once.
type issuedToken struct {
	registry.Token
	Secret string `json:"token"`
}

func newDevicesToken(a *app) *cobra.Command {
	var f format
	life := Duration(day)
	c := &cobra.Command{Use: "token USER/DEVICE", Short: "Make a token that enrols this device once", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeDevice,
		Long: `Make a token that enrols this device once: 'waystage device enrol --token' asks for it. It goes to stdout, this once; the server keeps a hash. It is good for
the named device alone, until it has been used, has expired or is revoked ('waystage devices tokens').`,
		RunE: func(c *cobra.Command, args []string) error {
			user, device, err := deviceName(args[0])
			if err != nil {
				return err
			}
			who, err := (&chosen{}).actor()
			if err != nil {
				return err
			}
			return a.withRegistry(c.Context(), "cannot make a token for "+args[0], func(ctx context.Context, r *registry.Registry) error {
				secret, t, err := r.NewToken(ctx, user, device, who, time.Duration(life))
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, issuedToken{t, secret})
				}
				fmt.Fprintln(a.out, secret)
				a.say("token %d for %s, good until %s, once; on the device: waystage device enrol --file FILE.db --server nats://... --user %s --device %s --token",
					t.ID, args[0], t.ExpiresAt.Local().Format(time.DateTime), user, device)
				return nil
			})
		}}
	withOutput(c, &f)
	c.Flags().Var(&life, "expires", "how long it is good, e.g. 2h or 7d")
	_ = c.RegisterFlagCompletionFunc("expires", cobra.FixedCompletions([]string{"1h", "24h", "7d"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func newDevicesTokens(a *app) *cobra.Command {
	c := &cobra.Command{Use: "tokens", Short: "Enrolment tokens that were made: list and revoke them"}
	var f format
	ls := &cobra.Command{Use: "ls [USER]", Short: "List enrolment tokens, newest first; the tokens themselves nobody keeps", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completeUser,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRegistry(c.Context(), "cannot list tokens", func(ctx context.Context, r *registry.Registry) error {
				list, err := r.Tokens(ctx, strings.Join(args, ""))
				if err != nil {
					return err
				}
				return printRows(a.out, f, list, []column[registry.Token]{
					{"id", func(t registry.Token) string { return strconv.FormatInt(t.ID, 10) }},
					{"device", func(t registry.Token) string { return t.User + "/" + t.Device }},
					{"state", func(t registry.Token) string { return t.State }},
					{"made", func(t registry.Token) string { return ago(&t.CreatedAt) }},
					{"by", func(t registry.Token) string { return t.CreatedBy }},
					{"expires", func(t registry.Token) string { return t.ExpiresAt.Local().Format(time.DateTime) }},
					{"used", func(t registry.Token) string {
						if t.UsedAt == nil {
							return ""
						}
						return ago(t.UsedAt)
					}},
				})
			})
		}}
	withOutput(ls, &f)
	revoke := &cobra.Command{Use: "revoke ID...", Short: "Take tokens back that have not been used", Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeFrom(`SELECT id || E'\t' || user_name || '/' || device_name FROM waystage.enrol_token
			WHERE used_at IS NULL AND revoked_at IS NULL AND expires_at > now() ORDER BY id DESC`),
		RunE: func(c *cobra.Command, args []string) error {
			ids := make([]int64, len(args))
			for i, s := range args {
				id, err := strconv.ParseInt(s, 10, 64)
				if err != nil || id < 1 {
					return usage("want the number of a token, not %q", s)
				}
				ids[i] = id
			}
			return a.withRegistry(c.Context(), "cannot revoke token "+args[0], func(ctx context.Context, r *registry.Registry) error {
				return a.severally(args, "cannot revoke token ", "token %s revoked", func(i int) error { return r.RevokeToken(ctx, ids[i]) })
			})
		}}
	c.AddCommand(ls, revoke)
	return c
}

// severally does something with each of the named, each for itself: what one is refused is told, and stops no other. done is said of
// each that it was done with; cannot, before the name, of those it was not.
func (a *app) severally(names []string, cannot, done string, do func(i int) error) error {
	failed := 0
	for i, name := range names {
		err := do(i)
		if err == nil {
			a.say(done, name)
			continue
		}
		err = refusal(cannot+name, err)
		if code := exitCode(err); len(names) == 1 || code != exitPrecondition && code != exitUsage {
			return err
		}
		report(a.err, err)
		failed++
	}
	if failed > 0 {
		return silent(exitRejected)
	}
	return nil
}
