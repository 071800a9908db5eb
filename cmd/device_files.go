package cmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/files"
	"github.com/waystage/waystage/protocol"
)

func newDeviceFiles(a *app, file *string) *cobra.Command {
	c := &cobra.Command{Use: "files", Short: "The device's files: ls, get, put, rm, log, check"}
	c.AddCommand(newDeviceFilesLs(a, file), newDeviceFilesGet(a, file), newDeviceFilesPut(a, file), newDeviceFilesRm(a, file), newDeviceFilesLog(a, file), newDeviceFilesCheck(a, file))
	return c
}

// withDeviceFiles is withDevice with the remedies of files.
func (a *app) withDeviceFiles(ctx context.Context, file, what string, do func(f *device.Files) error) error {
	return a.withDevice(ctx, file, false, what, func(d *device.Device) error {
		err := do(d.Files())
		var refused *protocol.Error
		remedy := ""
		code := exitPrecondition
		switch {
		case err == nil:
			return nil
		case errors.As(err, &refused):
			code = exitUsage
		case errors.Is(err, device.ErrNoFile):
			remedy = "'waystage device files ls' lists them"
		case errors.Is(err, device.ErrFileAway):
			remedy = "sync: it is fetched"
		case errors.Is(err, device.ErrNoUpload):
			remedy = "the operator lets devices put files with upload: true in a file subscription; a device that has never synced knows none yet"
		case errors.Is(err, device.ErrFileLarge):
			code, remedy = exitUsage, "make it smaller, or the operator raises max_size of the file subscription"
		case errors.Is(err, device.ErrDisk):
			remedy = "make room and try again"
		default:
			return err
		}
		return &failure{code: code, what: what, where: file, err: errors.New(strings.ReplaceAll(err.Error(), "device: ", "")), remedy: remedy}
	})
}

func newDeviceFilesLs(a *app, file *string) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "ls [PREFIX]", Short: "List the files that the device has or is to fetch", Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withDeviceFiles(c.Context(), *file, "cannot list files", func(d *device.Files) error {
				list, err := d.List(c.Context())
				if err != nil {
					return err
				}
				rows := []device.FileInfo{}
				for _, i := range list {
					if strings.HasPrefix(i.Path, strings.Join(args, "")) {
						rows = append(rows, i)
					}
				}
				return printRows(a.out, f, rows, []column[device.FileInfo]{
					{"path", func(i device.FileInfo) string { return i.Path }},
					{"size", func(i device.FileInfo) string { return human(i.Size) }},
					{"type", func(i device.FileInfo) string { return i.Type }},
					{"state", func(i device.FileInfo) string { return i.State }},
					{"why", func(i device.FileInfo) string { return i.Why }},
				})
			})
		}}
	withOutput(c, &f)
	return c
}

func newDeviceFilesGet(a *app, file *string) *cobra.Command {
	return &cobra.Command{Use: "get PATH [FILE]", Short: "Copy a file's content to FILE, by default its own name here; - is stdout", Args: cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			to := path.Base(args[0])
			if len(args) > 1 {
				to = args[1]
			}
			return a.withDeviceFiles(c.Context(), *file, "cannot get "+args[0], func(d *device.Files) error {
				content, info, err := d.Open(c.Context(), args[0])
				if err != nil {
					return err
				}
				defer func() { _ = content.Close() }()
				if to == "-" {
					_, err = io.Copy(a.out, content)
					return err
				}
				n, err := writeWhole(to, func(w io.Writer) (int64, error) { return io.Copy(w, content) })
				if err != nil {
					return err
				}
				note := ""
				if info.State == device.FileOlder {
					note = ", an older content: the newer one is not fetched yet"
				}
				a.say("%s: %s%s", to, human(n), note)
				return nil
			})
		}}
}

func newDeviceFilesPut(a *app, file *string) *cobra.Command {
	var typ string
	var f format
	c := &cobra.Command{Use: "put FILE PATH", Short: "Put a file under a path; it goes to the server with the next sync. FILE - is stdin", Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			to := args[1]
			if strings.HasSuffix(to, "/") {
				to += filepath.Base(args[0])
			}
			if typ == "" {
				typ = files.TypeOf(to)
			}
			return a.withDeviceFiles(c.Context(), *file, "cannot put "+args[0], func(d *device.Files) error {
				from, err := a.openInput(args[0])
				if err != nil {
					return filesFailure("cannot put "+args[0], err)
				}
				defer func() { _ = from.Close() }()
				up, err := d.Put(c.Context(), to, typ, from)
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, up)
				}
				a.say("%s: %s, to be sent with the next sync", up.Path, human(up.Size))
				return nil
			})
		}}
	c.Flags().StringVar(&typ, "type", "", "content type, e.g. image/jpeg; left out: by the name's ending")
	withOutput(c, &f)
	return c
}

func newDeviceFilesRm(a *app, file *string) *cobra.Command {
	return &cobra.Command{Use: "rm PATH", Short: "Remove a file: here at once, at the server with the next sync", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withDeviceFiles(c.Context(), *file, "cannot remove "+args[0], func(d *device.Files) error {
				if _, err := d.Remove(c.Context(), args[0]); err != nil {
					return err
				}
				a.say("%s removed; the server hears of it with the next sync", args[0])
				return nil
			})
		}}
}

func newDeviceFilesLog(a *app, file *string) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "log", Short: "List what was put and removed here, and what the server has decided", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDeviceFiles(c.Context(), *file, "cannot list uploads", func(d *device.Files) error {
				list, err := d.Uploads(c.Context())
				if err != nil {
					return err
				}
				return printRows(a.out, f, list, []column[device.FileUpload]{
					{"op", func(u device.FileUpload) string { return u.Op }},
					{"path", func(u device.FileUpload) string { return u.Path }},
					{"size", func(u device.FileUpload) string { return human(u.Size) }},
					{"state", func(u device.FileUpload) string { return u.State }},
					{"reason", func(u device.FileUpload) string {
						return strings.TrimPrefix(fmt.Sprintf("%s: %s", u.Code, u.Detail), ": ")
					}},
					{"record", func(u device.FileUpload) string { return u.Record }},
					{"made", func(u device.FileUpload) string { return ago(&u.Made) }},
				})
			})
		}}
	withOutput(c, &f)
	return c
}

func newDeviceFilesCheck(a *app, file *string) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "check", Short: "Read and hash the contents; damaged ones are fetched again with the next sync. Exit code 8: there were some", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDeviceFiles(c.Context(), *file, "cannot check the files", func(d *device.Files) error {
				r, err := d.Check(c.Context())
				if err != nil {
					return err
				}
				if f != "table" {
					err = printOne(a.out, f, r)
				} else {
					for _, p := range r.Bad {
						fmt.Fprintln(a.out, "damaged "+clean(p))
					}
				}
				if err != nil {
					return err
				}
				a.say("%d contents, %s; %d files are damaged", r.Contents, human(r.Bytes), len(r.Bad))
				if len(r.Bad) > 0 {
					return silent(exitDiffers)
				}
				return nil
			})
		}}
	withOutput(c, &f)
	return c
}
