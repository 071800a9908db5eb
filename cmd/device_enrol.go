package cmd

import (
	"errors"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
)

func newEnrol(a *app, path *string) *cobra.Command {
	var o device.EnrolOptions
	var passwordFile, tokenFile, jwtFile string
	var token, jwt bool
	c := &cobra.Command{Use: "enrol", Aliases: []string{"enroll"}, Short: "Make a file the device of a user, by password, enrolment token or JWT", Args: cobra.NoArgs,
		Long: `Make a file the device of a user. What proves it comes from a prompt, from stdin, or from a file, never from the command line: the user's password, an enrolment
token of the operator's (--token, --token-file), or a JWT of the company's identity provider (--jwt, --jwt-file). It is used once; from then on the file
has a key of its own. Broken off anywhere, the command can be given again, with the same token too.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if len(o.Servers) == 0 || o.User == "" || o.Device == "" {
				return usage("--server, --user and --device are needed")
			}
			for what, name := range map[string]string{"user": o.User, "device": o.Device} {
				if !protocol.ValidName(name) {
					return usage("the %s name %q is not valid: use 1 to 64 of a-z, 0-9, _ and -", what, name)
				}
			}
			if *path == "" {
				return usage("name the device's SQLite file with --file")
			}
			ways := 0
			for _, name := range []string{"password-file", "token", "token-file", "jwt", "jwt-file"} {
				if c.Flags().Changed(name) {
					ways++
				}
			}
			if ways > 1 {
				return usage("want one of --password-file, --token, --token-file, --jwt and --jwt-file")
			}
			file, what := passwordFile, "Password of "+o.User
			switch {
			case token || tokenFile != "":
				file, what = tokenFile, "Enrolment token"
			case jwt || jwtFile != "":
				file, what = jwtFile, "JWT"
			}
			secret, err := a.password(file, what, false)
			if err != nil {
				return err
			}
			switch {
			case token || tokenFile != "" || strings.HasPrefix(secret, protocol.TokenPrefix):
				o.Token = strings.TrimSpace(secret)
			case jwt || jwtFile != "":
				o.JWT = strings.TrimSpace(secret)
			default:
				o.Password = secret
			}
			_, statErr := os.Stat(*path)
			err = a.withDevice(c.Context(), *path, true, "cannot enrol "+o.User+"/"+o.Device, func(d *device.Device) error { return d.Enrol(c.Context(), o) })
			if err != nil {
				// Leave no half-made file behind, unless the server may know its key already.
				if errors.Is(statErr, os.ErrNotExist) && (o.Token == "" || exitCode(err) == exitAuth) {
					for _, suffix := range []string{"", "-wal", "-shm"} {
						_ = os.Remove(*path + suffix)
					}
				}
				return err
			}
			a.say("%s is now device %s/%s; next: waystage device sync --file %s", *path, o.User, o.Device, *path)
			return nil
		}}
	flags := c.Flags()
	flags.StringSliceVar(&o.Servers, "server", nil, "address of the server, e.g. nats://127.0.0.1:4222; may be given often")
	flags.StringVar(&o.User, "user", "", "user")
	flags.StringVar(&o.Device, "device", "", "name of the device, unique for the user")
	flags.StringVar(&passwordFile, "password-file", "", "file with the password; - for stdin")
	flags.BoolVar(&token, "token", false, "ask for an enrolment token, at the prompt or from stdin")
	flags.StringVar(&tokenFile, "token-file", "", "file with an enrolment token; - for stdin")
	flags.BoolVar(&jwt, "jwt", false, "ask for a JWT, at the prompt or from stdin")
	flags.StringVar(&jwtFile, "jwt-file", "", "file with a JWT; - for stdin")
	for _, name := range []string{"server", "user", "device"} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	return c
}

func newRotate(a *app, path *string) *cobra.Command {
	var every Duration
	c := &cobra.Command{Use: "rotate", Short: "Give the device a new key, now or whenever its key is as old", Args: cobra.NoArgs,
		Long: `Give the device a new key. The old one is good until the device has logged in with the new one, and is refused everywhere afterwards. Broken off anywhere the device can
log in, and the next sync goes on with it. With --every each sync changes the key when it is as old; 0 ends that. It is noted in the file.`,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDevice(c.Context(), *path, false, "the key is not changed", func(d *device.Device) error {
				if c.Flags().Changed("every") {
					if every < 0 || every > 0 && time.Duration(every) < time.Minute {
						return usage("--every wants a minute at least, or 0 for never, not %s", every)
					}
					if err := d.RotateEvery(c.Context(), time.Duration(every)); err != nil {
						return err
					}
					if every == 0 {
						a.say("the key is changed when the operator wants it, and by 'waystage device rotate'")
					} else {
						a.say("the first sync after %s changes the key", every)
					}
					return nil
				}
				if err := d.Rotate(c.Context()); err != nil {
					return err
				}
				s, err := d.Status(c.Context())
				if err != nil {
					return err
				}
				a.say("the device has a new key: %s", s.Fingerprint)
				return nil
			})
		}}
	c.Flags().Var(&every, "every", "have each sync change the key when it is as old, e.g. 90d; 0: never")
	_ = c.RegisterFlagCompletionFunc("every", cobra.FixedCompletions([]string{"30d", "90d", "365d", "0"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}
