package cmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/files"
	"github.com/waystage/waystage/internal/leader"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/queue"
)

// keepFiles is how often a server looks for lost and unused contents.
const keepFiles = 10 * time.Minute

func (c *Config) filesConfig() files.Config {
	return files.Config{MaxSize: int64(c.Files.MaxSize), UserBytes: int64(c.Files.UserBytes), UserFiles: int64(c.Files.UserFiles), Grace: time.Duration(c.Files.Grace)}
}

// watchDirectory publishes the configured directory, in one process of all that are configured to.
func watchDirectory(ctx context.Context, c Config, store *files.Store, log *zap.Logger) error {
	err := leader.Hold(ctx, c.Mirror.DSN, leader.Directory, log, func(ctx context.Context) error {
		d := store.NewDirectory(c.Files.Directory)
		return d.Watch(ctx, time.Duration(c.Files.Every), files.DirectoryOptions{Prefix: c.Files.Prefix, Delete: c.Files.Delete, By: "serve"})
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func newFiles(a *app) *cobra.Command {
	c := &cobra.Command{Use: "files", Short: "Files that devices subscribe to: put, ls, get, rm, sync a directory, check",
		Long: `Files that devices subscribe to by their paths (docs/files.md). What is true of them is in the mirror; their contents are in the broker's store, which may lose
them: 'check' looks, and publishing a file again brings its content back.`}
	c.AddCommand(newFilesPut(a), newFilesLs(a), newFilesGet(a), newFilesRm(a), newFilesSync(a), newFilesCheck(a), newFilesUploads(a))
	return c
}

// withFiles runs a command on the files. Without contents the broker is not needed.
func (a *app) withFiles(ctx context.Context, what string, contents bool, do func(ctx context.Context, s *files.Store) error) error {
	return a.withMirror(ctx, func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
		var at files.Chunks
		if contents {
			b, err := a.broker(ctx, conf)
			if err != nil {
				return err
			}
			defer b.close()
			c, err := queue.NewChunks(b.nc)
			if err != nil {
				return err
			}
			at = c
		}
		return filesFailure(what, do(ctx, files.New(conf.filesConfig(), mirror, at, nil, nil)))
	})
}

// filesFailure gives the refusals of files their exit codes.
func filesFailure(what string, err error) error {
	var f *failure
	var s silent
	var refused *protocol.Error
	switch {
	case err == nil, errors.As(err, &f), errors.As(err, &s):
		return err
	case errors.As(err, &refused):
		return &failure{code: exitUsage, what: what, err: errors.New(refused.Message)}
	case errors.Is(err, files.ErrTooBig):
		return &failure{code: exitUsage, what: what, err: err, remedy: "raise files.max_size, or publish it in parts"}
	case errors.Is(err, queue.ErrFull):
		return &failure{code: exitPrecondition, what: what, err: err, remedy: "raise limits.file_bytes and restart the servers, or remove files"}
	case errors.Is(err, files.ErrNoFile):
		return &failure{code: exitPrecondition, what: what, err: err, remedy: "'waystage files ls' lists them"}
	case errors.Is(err, files.ErrEmpty):
		return &failure{code: exitPrecondition, what: what, err: err, remedy: "if it is meant to be empty, use --empty"}
	case errors.Is(err, files.ErrLost):
		return &failure{code: exitAttention, what: what, err: err, remedy: "'waystage files put' or 'waystage files sync' brings it back"}
	case errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission):
		return &failure{code: exitUsage, what: what, err: err}
	}
	return err
}

// whoami is the name under which an operator's command leaves its marks.
func whoami() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return "operator"
}

func newFilesPut(a *app) *cobra.Command {
	var typ string
	var f format
	c := &cobra.Command{Use: "put FILE PATH", Short: "Publish a file under a path; FILE - is stdin", Args: cobra.ExactArgs(2),
		Long: `Publish a file under a path, which devices subscribe to by patterns. A path that ends with / keeps the file's own name. Publishing the same content
again changes nothing for devices, and brings the content back if the broker has lost it.`,
		RunE: func(c *cobra.Command, args []string) error {
			to := args[1]
			if strings.HasSuffix(to, "/") {
				to += filepath.Base(args[0])
			}
			return a.withFiles(c.Context(), "cannot publish "+args[0], true, func(ctx context.Context, s *files.Store) error {
				from, err := a.openInput(args[0])
				if err != nil {
					return err
				}
				defer func() { _ = from.Close() }()
				if typ == "" {
					typ = files.TypeOf(to)
				}
				file, changed, err := s.Publish(ctx, files.Publication{Path: to, Type: typ, By: whoami(), Again: true}, from)
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, file)
				}
				if changed {
					a.say("%s is published: %s, version %d", file.Path, human(file.Size), file.Version)
				} else {
					a.say("%s was so already: %s, version %d", file.Path, human(file.Size), file.Version)
				}
				return nil
			})
		}}
	c.Flags().StringVar(&typ, "type", "", "content type, e.g. image/jpeg; left out: by the name's ending")
	c.ValidArgsFunction = func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return nil, cobra.ShellCompDirectiveDefault
	}
	withOutput(c, &f)
	return c
}

// openInput opens a file; stdin is copied to a temporary one, for contents are read twice.
func (a *app) openInput(name string) (*os.File, error) {
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			_ = f.Close()
			return nil, &failure{code: exitUsage, what: "not a regular file", where: name, err: err, remedy: "'waystage files sync' publishes a directory"}
		}
		return f, nil
	}
	f, err := os.CreateTemp("", "waystage-put-")
	if err != nil {
		return nil, err
	}
	_ = os.Remove(f.Name()) // it lives as long as it is open
	if _, err := io.Copy(f, a.in); err != nil {
		_ = f.Close()
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func fileState(f files.File) string {
	switch {
	case f.Removed:
		return "removed"
	case f.Lost:
		return "LOST"
	}
	return "ok"
}

func newFilesLs(a *app) *cobra.Command {
	var f format
	var all bool
	c := &cobra.Command{Use: "ls [PREFIX]", Short: "List files", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completePath,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withFiles(c.Context(), "cannot list files", false, func(ctx context.Context, s *files.Store) error {
				list, err := s.List(ctx, strings.Join(args, ""), all)
				if err != nil {
					return err
				}
				return printRows(a.out, f, list, []column[files.File]{
					{"path", func(f files.File) string { return f.Path }},
					{"size", func(f files.File) string { return human(f.Size) }},
					{"type", func(f files.File) string { return f.Type }},
					{"state", fileState},
					{"published", func(f files.File) string { return ago(&f.PublishedAt) }},
					{"by", func(f files.File) string { return f.PublishedBy }},
					{"sha256", func(f files.File) string { return f.SHA256[:min(12, len(f.SHA256))] }},
				})
			})
		}}
	c.Flags().BoolVar(&all, "all", false, "removed ones too, as long as devices have to hear of them")
	withOutput(c, &f)
	return c
}

func (a *app) completePath(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return a.completeFrom(`SELECT path FROM waystage.file WHERE sha256 IS NOT NULL ORDER BY path LIMIT 10000`)(c, args, typed)
}

func newFilesGet(a *app) *cobra.Command {
	c := &cobra.Command{Use: "get PATH [FILE]", Short: "Write a file's content to FILE, by default its own name here; - is stdout", Args: cobra.RangeArgs(1, 2), ValidArgsFunction: a.completePath,
		RunE: func(c *cobra.Command, args []string) error {
			to := path.Base(args[0])
			if len(args) > 1 {
				to = args[1]
			}
			return a.withFiles(c.Context(), "cannot get "+args[0], true, func(ctx context.Context, s *files.Store) error {
				if to == "-" {
					_, err := s.Copy(ctx, args[0], a.out)
					return err
				}
				file, err := writeWhole(to, func(w io.Writer) (files.File, error) { return s.Copy(ctx, args[0], w) })
				if err == nil {
					a.say("%s: %s", to, human(file.Size))
				}
				return err
			})
		}}
	return c
}

// writeWhole lets a file appear only when all of it is written.
func writeWhole[T any](to string, write func(io.Writer) (T, error)) (v T, err error) {
	part, err := os.CreateTemp(filepath.Dir(to), ".waystage-*.part")
	if err != nil {
		return v, err
	}
	defer func() {
		_ = part.Close()
		if err != nil {
			_ = os.Remove(part.Name())
		}
	}()
	if v, err = write(part); err != nil {
		return v, err
	}
	if err := part.Chmod(0o644); err != nil {
		return v, err
	}
	if err := part.Sync(); err != nil {
		return v, err
	}
	return v, os.Rename(part.Name(), to)
}

func newFilesRm(a *app) *cobra.Command {
	c := &cobra.Command{Use: "rm PATH...", Short: "Remove files: they leave the devices with their next sync, and cannot be fetched from now on", Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeFrom(`SELECT path FROM waystage.file WHERE sha256 IS NOT NULL ORDER BY path LIMIT 10000`),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withFiles(c.Context(), "cannot remove a file", false, func(ctx context.Context, s *files.Store) error {
				for _, p := range args {
					if err := s.Remove(ctx, p, whoami()); err != nil {
						return err
					}
					a.say("%s removed", p)
				}
				return nil
			})
		}}
	return c
}

func newFilesSync(a *app) *cobra.Command {
	var o files.DirectoryOptions
	var f format
	c := &cobra.Command{Use: "sync DIR", Short: "Publish a directory once: what is new or changed in it", Args: cobra.ExactArgs(1),
		Long: `Publish a directory once: files that are new or have another content, found by their hashes. Hidden files, links and what is not a regular file are left alone. With --delete, files that
were published from a directory, begin with --prefix and are not there any more are removed. What a device has changed since is not published over,
unless --over says so. A server does the same by itself with files.directory in its configuration. Exit code 3: complete, and some files were left out.`,
		RunE: func(c *cobra.Command, args []string) error {
			o.By = whoami()
			if o.Prefix = strings.Trim(o.Prefix, "/"); o.Prefix != "" {
				if err := protocol.CheckPath(o.Prefix); err != nil {
					return usage("--prefix: %v", err)
				}
			}
			return a.withFiles(c.Context(), "cannot publish "+args[0], true, func(ctx context.Context, s *files.Store) error {
				if _, err := s.Check(ctx, false, nil); err != nil { // what is lost is published again
					return err
				}
				p := a.progress("publish", "bytes", 0)
				o.Progress = func(done, total int64) {
					if f == "table" {
						p.set(done, total)
					}
				}
				r, err := s.NewDirectory(args[0]).Sync(ctx, o)
				p.stop()
				if f != "table" {
					if perr := printOne(a.out, f, r); perr != nil {
						return errors.Join(err, perr)
					}
				} else {
					for _, path := range r.Published {
						fmt.Fprintln(a.out, "published "+clean(path))
					}
					for _, path := range r.Removed {
						fmt.Fprintln(a.out, "removed "+clean(path))
					}
				}
				for _, skip := range r.Skipped {
					a.say("left out: %s: %s", clean(skip.Path), clean(skip.Why))
				}
				if err != nil {
					return err
				}
				a.say("%d published, %d unchanged, %d removed, %d left out", len(r.Published), r.Unchanged, len(r.Removed), len(r.Skipped))
				if len(r.Skipped) > 0 {
					return silent(exitRejected)
				}
				return nil
			})
		}}
	c.Flags().StringVar(&o.Prefix, "prefix", "", "put before the paths, e.g. manuals")
	c.Flags().BoolVar(&o.Delete, "delete", false, "remove what was published from a directory and is not there any more")
	c.Flags().BoolVar(&o.Empty, "empty", false, "with --delete: even if the directory is empty")
	c.Flags().BoolVar(&o.Over, "over", false, "publish also over what devices have changed since")
	c.Flags().BoolVar(&o.DryRun, "dry-run", false, "only say what would be done")
	c.ValidArgsFunction = func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	withOutput(c, &f)
	return c
}

func newFilesCheck(a *app) *cobra.Command {
	var f format
	var deep bool
	c := &cobra.Command{Use: "check", Short: "Look whether the broker's store has the contents of all files", Args: cobra.NoArgs,
		Long: `Look whether the broker's store has the contents of all files. --deep reads and hashes them. What is lost comes back when it is published again; devices that have it
are asked for it with their next sync. Exit code 8: contents are lost.`,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withFiles(c.Context(), "cannot check the files", true, func(ctx context.Context, s *files.Store) error {
				p := a.progress("check", "bytes", 0)
				r, err := s.Check(ctx, deep, p.set)
				p.stop()
				if err != nil {
					return err
				}
				if f != "table" {
					err = printOne(a.out, f, r)
				} else if len(r.Lost) > 0 {
					err = printRows(a.out, "table", r.Lost, []column[files.File]{
						{"lost", func(f files.File) string { return f.Path }},
						{"size", func(f files.File) string { return human(f.Size) }},
						{"published", func(f files.File) string { return ago(&f.PublishedAt) }},
						{"by", func(f files.File) string { return f.PublishedBy }},
						{"from", func(f files.File) string { return f.Origin }},
					})
				}
				if err != nil {
					return err
				}
				a.say("%d files, %d contents, %s; %d files have lost theirs, %d contents are back", r.Files, r.Contents, human(r.Bytes), len(r.Lost), r.Back)
				if len(r.Lost) > 0 {
					a.say("'waystage files sync' or 'put' brings them back; devices that have them are asked")
					return silent(exitDiffers)
				}
				return nil
			})
		}}
	c.Flags().BoolVar(&deep, "deep", false, "read every chunk")
	withOutput(c, &f)
	return c
}

func newFilesUploads(a *app) *cobra.Command {
	var f format
	var user, device, state string
	var limit int
	c := &cobra.Command{Use: "uploads", Short: "List changes of files by devices, and what has become of them", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withFiles(c.Context(), "cannot list uploads", false, func(ctx context.Context, s *files.Store) error {
				list, err := s.Uploads(ctx, user, device, state, limit)
				if err != nil {
					return err
				}
				return printRows(a.out, f, list, []column[files.Upload]{
					{"device", func(u files.Upload) string { return u.User + "/" + u.Device }},
					{"op", func(u files.Upload) string { return u.Op }},
					{"path", func(u files.Upload) string { return u.Path }},
					{"size", func(u files.Upload) string { return human(u.Size) }},
					{"state", func(u files.Upload) string {
						if u.Missing > 0 {
							return u.State + ", " + strconv.Itoa(u.Missing) + " chunks missing"
						}
						return u.State
					}},
					{"reason", func(u files.Upload) string { return u.Code }},
					{"begun", func(u files.Upload) string { return ago(&u.CreatedAt) }},
				})
			})
		}}
	c.Flags().StringVar(&user, "user", "", "of this user only")
	c.Flags().StringVar(&device, "device", "", "of devices of this name only")
	c.Flags().StringVar(&state, "state", "", "receiving, stored, applied or rejected")
	c.Flags().IntVar(&limit, "limit", 100, "at most so many")
	a.completeFilter(c)
	_ = c.RegisterFlagCompletionFunc("state", cobra.FixedCompletions([]string{"receiving", "stored", "applied", "rejected"}, cobra.ShellCompDirectiveNoFileComp))
	withOutput(c, &f)
	return c
}
