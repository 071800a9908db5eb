package cmd

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// Config is everything that waystage.yaml may say. Each field is a key of the file (tag koanf), a variable of the
// environment (WAYSTAGE_ and the path in capitals: source.dsn is WAYSTAGE_SOURCE_DSN) and, unless secret, a
// value of --set. The doc tags are the reference: `waystage config reference` and `waystage init` print them.
type Config struct {
	Source      Database  `koanf:"source" doc:"The customer's PostgreSQL database. Waystage adds one schema (waystage), one publication and one slot to it."`
	Mirror      Database  `koanf:"mirror" doc:"Waystage's own PostgreSQL database: mirror tables, staging tables, ledger. It may be on the same server."`
	NATS        NATS      `koanf:"nats" doc:"The message broker: embedded in this process, or external."`
	Definitions string    `koanf:"definitions" doc:"File with tables, subscription sets and groups; relative to this file."`
	Identity    Identity  `koanf:"identity" doc:"How a device that has no key yet proves whose it is. Enrolment tokens always work."`
	Pools       Pools     `koanf:"pools" doc:"Workers per stage when a stage starts for the first time. Later 'waystage pools scale' decides. 0 keeps the stage out of this process."`
	Limits      Limits    `koanf:"limits" doc:"What one device may ask for."`
	Reply       Reply     `koanf:"reply" doc:"How long a reply waits for the device's own records, so that most outcomes are told in the same session."`
	Retention   Retention `koanf:"retention" doc:"How long things are kept."`
	Files       Files     `koanf:"files" doc:"Files that devices subscribe to."`
	Health      Health    `koanf:"health" doc:"The HTTP listener with /healthz, /readyz and /metrics."`
	Log         Log       `koanf:"log" doc:"The server's own log, on stderr."`

	Recopy   bool                      // begin with a new epoch and copy all tables anew; only a flag, it must not stay set
	Progress func(schema.CopyProgress) // hears of the initial copy; nil: nobody

	file    string            // path of the file, "" without one
	origins map[string]string // key -> default, file, environment, flag
}

// Database is how to reach one PostgreSQL database.
type Database struct {
	DSN     string `koanf:"dsn" secret:"true" doc:"Connection string (URI or key=value), several hosts allowed. Without a password in it PGPASSFILE and ~/.pgpass apply."`
	DSNFile string `koanf:"dsn_file" doc:"File that holds the connection string instead."`
}

// NATS is the broker.
type NATS struct {
	Embedded Embedded `koanf:"embedded" doc:"A NATS server inside this process; used unless nats.external.urls is set."`
	External External `koanf:"external" doc:"A NATS server or cluster of your own, with the accounts of docs/operate.md."`
}

// Embedded is the NATS server inside the process.
type Embedded struct {
	Store     string `koanf:"store" doc:"Folder for the queues and the broker's keys. What is lost with it is sent again; nothing else rests on it."`
	Listen    string `koanf:"listen" doc:"Address for devices (NATS protocol)."`
	Websocket string `koanf:"websocket" doc:"Address for devices behind web proxies (NATS over WebSocket); empty: none."`
	TLSCert   string `koanf:"tls_cert" doc:"Certificate file; with tls_key, devices must use TLS."`
	TLSKey    string `koanf:"tls_key" doc:"Private key file."`
	Sync      bool   `koanf:"sync_always" doc:"fsync each queued message. Costs 5 to 30 times; not needed, the databases are the truth."`
}

// External is a NATS cluster that is run elsewhere.
type External struct {
	URLs        []string `koanf:"urls" doc:"nats://host:4222, several separated by commas."`
	Credentials string   `koanf:"credentials_file" doc:"Keys file written by 'waystage init --nats': passwords of our accounts and seeds of the callout."`
	Replicas    int      `koanf:"replicas" doc:"Copies of each stream in the cluster: 1, 3 or 5."`
	CA          string   `koanf:"tls_ca" doc:"Certificate authority file for the broker's certificate."`
}

// Identity is how devices that have no key yet are let in.
type Identity struct {
	Passwords bool `koanf:"passwords" doc:"Users' passwords (waystage users passwd)."`
	OIDC      OIDC `koanf:"oidc" doc:"JWTs of the company's OpenID Connect provider; used when issuer is set. See docs/users.md."`
}

// OIDC is the company's identity provider.
type OIDC struct {
	Issuer      string   `koanf:"issuer" doc:"The issuer as it stands in the JWTs, to the letter, e.g. https://login.example.org/realm."`
	Audience    []string `koanf:"audience" doc:"Audience that the JWTs must be for; with several, one of them."`
	JWKSURL     string   `koanf:"jwks_url" doc:"Address of the provider's public keys; empty: its discovery document says it."`
	JWKSFile    string   `koanf:"jwks_file" doc:"File with the public keys instead."`
	UserClaim   string   `koanf:"user_claim" doc:"Claim whose value, in lower case, is the user's name; a.b looks into a claim."`
	UserSuffix  string   `koanf:"user_suffix" doc:"What that value must end in, and is cut off, e.g. @example.org."`
	GroupsClaim string   `koanf:"groups_claim" doc:"Claim with a list of groups or roles; empty: groups are ours to say."`
	Groups      []string `koanf:"groups" doc:"Which value means which group of ours, each as VALUE=GROUP; other values count for nothing."`
	Attributes  []string `koanf:"attributes" doc:"Attributes of a user that come from claims, each as ATTRIBUTE=CLAIM."`
	Algorithms  []string `koanf:"algorithms" doc:"Allowed signatures: RS, PS or ES with 256, 384, 512, EdDSA."`
	ClockSkew   Duration `koanf:"clock_skew" doc:"How far clocks may differ."`
	AutoCreate  bool     `koanf:"auto_create" doc:"Make users known with their first login; otherwise they must be there."`
}

// Pools are the first sizes of the worker pools.
type Pools struct {
	Gateway     int `koanf:"gateway" doc:"Answers devices."`
	Intake      int `koanf:"intake" doc:"Requests to staging tables."`
	Merge       int `koanf:"merge" doc:"Staging tables to mirror tables."`
	Reply       int `koanf:"reply" doc:"Composes replies."`
	CaptureDown int `koanf:"capture-down" doc:"Reads the source's changes; one active in all processes together."`
	ApplyDown   int `koanf:"apply-down" doc:"Writes them to the mirror; one active."`
	CaptureUp   int `koanf:"capture-up" doc:"Reads the devices' changes from the mirror; one active."`
	ApplyUp     int `koanf:"apply-up" doc:"Writes them to the source; one active."`
}

// Limits bound what one device may ask for.
type Limits struct {
	Session     Size `koanf:"session" doc:"One sync request, decompressed."`
	Records     int  `koanf:"records" doc:"Records in one sync request."`
	Row         Size `koanf:"row" doc:"One record."`
	Page        Size `koanf:"page" doc:"One reply page before compression."`
	QueueBytes  Size `koanf:"queue_bytes" doc:"Input queue; when it is full devices are told to come back later."`
	ChangeBytes Size `koanf:"change_bytes" doc:"Change data queue per direction; when it is full capture waits and WAL stays at the server."`
	OutputBytes Size `koanf:"output_bytes" doc:"Waiting reply pages of all devices."`
	FileBytes   Size `koanf:"file_bytes" doc:"Contents of all files; when it is full no more are taken."`
}

// Reply bounds a reply's waiting.
type Reply struct {
	WaitSource Duration `koanf:"wait_source" doc:"For the source's verdict, when the device asks to wait for it."`
	Hold       Duration `koanf:"hold" doc:"How long the gateway holds a device's question for a page that is not there yet."`
}

// Retention says how long things are kept. 0 keeps them for ever.
type Retention struct {
	Replies    Duration `koanf:"replies" doc:"Reply pages that a device does not fetch; composed again when it asks later."`
	Tombstones Duration `koanf:"tombstones" doc:"Deleted keys. A device away for longer gets a full refresh of its rows (its unsent changes stay)."`
	Ledger     Duration `koanf:"ledger" doc:"Outcomes of applied records and sessions, for 'waystage receipts'. What a device has not heard of stays."`
	Rejects    Duration `koanf:"rejects" doc:"Rejected records that no operator has handled."`
	Handled    Duration `koanf:"handled" doc:"Rejected records that were discarded, or retried and applied, counted from then."`
	WAL        Size     `koanf:"wal" doc:"WAL that a slot may hold back before /readyz and 'status' warn. The hard bound is the server's max_slot_wal_keep_size."`
}

// Files bounds the files, and names a directory that is published.
type Files struct {
	MaxSize   Size     `koanf:"max_size" doc:"One published file. What devices put is bounded by max_size of its subscription."`
	UserBytes Size     `koanf:"user_bytes" doc:"All files that one user's devices have put and that stand."`
	UserFiles int      `koanf:"user_files" doc:"Number of the same."`
	Grace     Duration `koanf:"grace" doc:"How long a content is kept that no file has any more; a replaced one can be fetched so long."`
	Directory string   `koanf:"directory" doc:"Directory that is published and watched; relative to the working directory; empty: none. One server at a time does it."`
	Prefix    string   `koanf:"prefix" doc:"Put before the paths of the directory's files, e.g. manuals."`
	Every     Duration `koanf:"every" doc:"How often the directory is looked at."`
	Delete    bool     `koanf:"delete" doc:"Remove files that are not in the directory any more, of those that were published from it."`
}

// Health is the HTTP listener.
type Health struct {
	Listen string `koanf:"listen" doc:"Address; empty: no listener."`
}

// Log is the server's own log.
type Log struct {
	Level  string `koanf:"level" doc:"debug, info, warn or error."`
	Format string `koanf:"format" doc:"json, text, or auto: text on a terminal."`
}

// Defaults is the configuration of an empty file.
func Defaults() Config {
	return Config{
		Definitions: "definitions.yaml",
		Identity: Identity{Passwords: true, OIDC: OIDC{UserClaim: "sub", Algorithms: []string{"RS256", "ES256", "EdDSA"},
			ClockSkew: Duration(time.Minute)}},
		NATS: NATS{
			Embedded: Embedded{Store: "waystage-nats", Listen: "127.0.0.1:4222"},
			External: External{Replicas: 1},
		},
		Pools:  Pools{Gateway: 2, Intake: 2, Merge: 1, Reply: 4, CaptureDown: 1, ApplyDown: 1, CaptureUp: 1, ApplyUp: 1},
		Limits: Limits{Session: 64 << 20, Records: 100_000, Row: 1 << 20, Page: 256 << 10, QueueBytes: 512 << 20, ChangeBytes: 512 << 20, OutputBytes: 1 << 30, FileBytes: 2 << 30},
		Reply:  Reply{WaitSource: Duration(10 * time.Second), Hold: Duration(5 * time.Second)},
		Retention: Retention{Replies: Duration(7 * day), Tombstones: Duration(60 * day), Ledger: Duration(30 * day),
			Rejects: Duration(365 * day), Handled: Duration(90 * day), WAL: 4 << 30},
		Files:  Files{MaxSize: 1 << 30, UserBytes: 1 << 30, UserFiles: 10_000, Grace: Duration(day), Every: Duration(10 * time.Second), Delete: true},
		Health: Health{Listen: "127.0.0.1:8222"},
		Log:    Log{Level: "info", Format: "auto"},
	}
}

// Validate names the first thing in the configuration that cannot work.
func (c *Config) Validate() error {
	bad := func(key, format string, args ...any) error {
		return &failure{code: exitUsage, what: "the configuration cannot work", where: c.whereIs(key), err: fmt.Errorf(format, args...),
			remedy: "change " + key + "; 'waystage config reference' explains every key"}
	}
	switch {
	case c.Source.DSN == "":
		return bad("source.dsn", "no source database is named")
	case c.Mirror.DSN == "":
		return bad("mirror.dsn", "no mirror database is named")
	case len(c.NATS.External.URLs) == 0 && c.NATS.Embedded.Store == "":
		return bad("nats.embedded.store", "the embedded broker needs a folder")
	case len(c.NATS.External.URLs) > 0 && c.NATS.External.Credentials == "":
		return bad("nats.external.credentials_file", "an external broker needs the server keys file")
	case (c.NATS.Embedded.TLSCert == "") != (c.NATS.Embedded.TLSKey == ""):
		return bad("nats.embedded.tls_cert", "tls_cert and tls_key go together")
	case c.Limits.Page < 4<<10 || c.Limits.Page > 512<<10:
		return bad("limits.page", "want 4 KiB to 512 KiB, not %s", c.Limits.Page)
	case c.Limits.Session < 64<<10 || c.Limits.Session > 1<<30:
		return bad("limits.session", "want 64 KiB to 1 GiB, not %s", c.Limits.Session)
	case c.Limits.Records < 1:
		return bad("limits.records", "want at least 1, not %d", c.Limits.Records)
	case c.Limits.Row < 1<<10:
		return bad("limits.row", "want at least 1 KiB, not %s", c.Limits.Row)
	case c.Reply.Hold < 0 || time.Duration(c.Reply.Hold) > 30*time.Second:
		return bad("reply.hold", "want 0 to 30s, not %s", c.Reply.Hold)
	case c.Limits.FileBytes < 1<<20:
		return bad("limits.file_bytes", "want at least 1 MiB, not %s", c.Limits.FileBytes)
	case c.Files.MaxSize < 1:
		return bad("files.max_size", "want at least a byte, not %s", c.Files.MaxSize)
	case c.Files.UserBytes < 1 || c.Files.UserFiles < 1:
		return bad("files.user_bytes", "user_bytes and user_files must be at least 1")
	case time.Duration(c.Files.Grace) < time.Minute:
		return bad("files.grace", "want at least a minute, not %s", c.Files.Grace)
	case time.Duration(c.Files.Every) < 100*time.Millisecond:
		return bad("files.every", "want at least 100ms, not %s", c.Files.Every)
	case c.Files.Prefix != "" && protocol.CheckPath(c.Files.Prefix) != nil:
		return bad("files.prefix", "%w", protocol.CheckPath(c.Files.Prefix))
	case c.Reply.WaitSource < 0:
		return bad("reply.wait_source", "must not be negative")
	}
	for _, r := range []int{c.NATS.External.Replicas} {
		if r != 1 && r != 3 && r != 5 {
			return bad("nats.external.replicas", "want 1, 3 or 5, not %d", r)
		}
	}
	for stage, n := range c.Pools.sizes() {
		if n < 0 || n > 256 {
			return bad("pools."+stage, "want 0 to 256 workers, not %d", n)
		}
	}
	if c.Identity.OIDC.Issuer != "" {
		conf, key, err := c.Identity.OIDC.config()
		if err == nil {
			key, err = conf.Check()
		}
		if err != nil {
			return bad("identity.oidc."+key, "%w", err)
		}
	}
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		return bad("log.level", "want debug, info, warn or error, not %q", c.Log.Level)
	}
	switch c.Log.Format {
	case "auto", "json", "text":
	default:
		return bad("log.format", "want auto, json or text, not %q", c.Log.Format)
	}
	return nil
}

// whereIs says where a key got its value, for error messages.
func (c *Config) whereIs(key string) string {
	switch o := c.origins[key]; o {
	case "file":
		return c.file + ": " + key
	case "environment":
		return "$" + envName(key)
	case "flag":
		return "--set " + key
	default:
		return key
	}
}

// sizes maps each stage to its first pool size.
func (p Pools) sizes() map[string]int {
	return map[string]int{
		"gateway": p.Gateway, "intake": p.Intake, "merge": p.Merge, "reply": p.Reply,
		"capture-down": p.CaptureDown, "apply-down": p.ApplyDown, "capture-up": p.CaptureUp, "apply-up": p.ApplyUp,
	}
}

// stageNames are the stages in the order in which a change passes them.
var stageNames = []string{"gateway", "intake", "merge", "capture-up", "apply-up", "capture-down", "apply-down", "reply"}

const day = 24 * time.Hour

// Duration is a time.Duration that also understands days ("30d").
type Duration time.Duration

// UnmarshalText reads "90s", "1h30m", "30d" or "0".
func (d *Duration) UnmarshalText(b []byte) error {
	s := strings.TrimSpace(string(b))
	if n, ok := strings.CutSuffix(s, "d"); ok {
		days, err := strconv.ParseFloat(n, 64)
		if err != nil || math.IsNaN(days) || math.Abs(days) > 36500 {
			return fmt.Errorf("%q is not a duration such as 30d, 12h or 90s", s)
		}
		*d = Duration(days * float64(day))
		return nil
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 30d, 12h or 90s", s)
	}
	*d = Duration(v)
	return nil
}

func (d Duration) String() string {
	if v := time.Duration(d); v != 0 && v%day == 0 {
		return strconv.Itoa(int(v/day)) + "d"
	}
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// Set and Type make it the value of a flag.
func (d *Duration) Set(s string) error { return d.UnmarshalText([]byte(s)) }

// Type is what the help calls it.
func (d *Duration) Type() string { return "duration" }

// MarshalText prints what UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Size is a number of bytes.
type Size int64

var units = []struct {
	suffix string
	factor int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"KB", 1e3}, {"B", 1}}

// UnmarshalText reads "262144", "256KiB" or "4 GiB".
func (s *Size) UnmarshalText(b []byte) error {
	text, factor := strings.TrimSpace(string(b)), int64(1)
	for _, u := range units {
		if n, ok := strings.CutSuffix(text, u.suffix); ok {
			text, factor = strings.TrimSpace(n), u.factor
			break
		}
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || n < 0 || n*float64(factor) > math.MaxInt64/2 || math.IsNaN(n) {
		return fmt.Errorf("%q is not a size such as 256KiB, 64MiB or 1GiB", b)
	}
	*s = Size(n * float64(factor))
	return nil
}

func (s Size) String() string {
	for _, u := range units[:4] {
		if s != 0 && int64(s)%u.factor == 0 {
			return strconv.FormatInt(int64(s)/u.factor, 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(s), 10) + "B"
}

// MarshalText prints what UnmarshalText reads.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// human prints a size for reading, rounded.
func human(n int64) string {
	v := float64(n)
	for _, u := range units[:4] {
		if v >= float64(u.factor) {
			return strconv.FormatFloat(v/float64(u.factor), 'f', 1, 64) + " " + u.suffix
		}
	}
	return strconv.FormatInt(n, 10) + " B"
}
