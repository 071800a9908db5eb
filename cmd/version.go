package cmd

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/protocol"
)

// version is set by the build (-ldflags "-X github.com/waystage/waystage/cmd.version=1.2.3").
var version = "dev"

// build says what this binary is.
type build struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Time     string `json:"time,omitempty"`
	Modified bool   `json:"modified,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Protocol int    `json:"protocol"` // version of the wire messages
}

func buildInfo() build {
	b := build{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, Protocol: protocol.Version}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				b.Commit = s.Value
			case "vcs.time":
				b.Time = s.Value
			case "vcs.modified":
				b.Modified = s.Value == "true"
			}
		}
	}
	return b
}

func newVersion(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			b := buildInfo()
			if f != "table" {
				return printOne(a.out, f, b)
			}
			_, err := fmt.Fprintf(a.out, "waystage %s (protocol %d, %s, %s)\n", b.Version, b.Protocol, b.Go, b.Platform)
			return err
		}}
	withOutput(c, &f)
	return c
}
