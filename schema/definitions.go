package schema

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/waystage/waystage/internal/hours"
)

// Direction of a subscription, seen from the device.
type Direction string

// Directions.
const (
	TwoWay       Direction = "two-way"
	DownloadOnly Direction = "download-only"
	UploadOnly   Direction = "upload-only"
)

// RejectUnit says what is rejected together (rule R8).
type RejectUnit string

// Reject units.
const (
	RejectRecord      RejectUnit = "record"      // each record stands for itself
	RejectTransaction RejectUnit = "transaction" // all records of the device's transaction, or none
)

// ConflictPolicy says what becomes of a device's change of a row that somebody else has changed since (docs/conflicts.md).
type ConflictPolicy string

// Conflict policies.
const (
	ConflictReject     ConflictPolicy = "reject"      // the change is rejected
	ConflictColumns    ConflictPolicy = "columns"     // merged, if nobody else has changed the columns that it changes
	ConflictLastWriter ConflictPolicy = "last-writer" // takes the place of what stands there
	ConflictSource     ConflictPolicy = "source"      // dropped, with a receipt: what stands there wins
	ConflictFunction   ConflictPolicy = "function"    // an SQL function of the mirror decides
)

// Subscription says which part of one table a device holds and may change.
type Subscription struct {
	Name      string
	Table     string   // "schema.table"
	Columns   []string // columns that devices get, in the order written; empty: all
	Key       string   // subset key column: its value decides whose row it is; empty: all rows for everybody
	Rows      string   // SQL query for the key values that a user may see; given with Key, and only then
	Direction Direction
	Allow     string // operations that devices may upload, a subset of "IUD"
	Reject    RejectUnit
	Conflict  ConflictPolicy
	Function  string // "schema.name", with ConflictFunction only

	FileColumn string // column that holds the path of a file; empty: none
	File       string // FileAny, FileBefore; empty as FileAny

	rows    *rowsQuery
	keyType string // the key column's type in the mirror, once checked
	place   place
	places  map[string]place // of its settings
	columns []place
}

// Set is a subscription set: what is synced in one session, in this order.
type Set struct {
	Name          string   `json:"name"`
	Subscriptions []string `json:"subscriptions"` // of tables and of files
	Priority      int      `json:"priority"`      // a device syncs sets of a higher one first; 0 if none is given

	Between []hours.Span `json:"between,omitempty"` // when devices may sync it, by the clock of Zone; none: always
	Zone    string       `json:"zone,omitempty"`    // of the time zone database; empty: UTC
	clock   *time.Location
	place   place
	places  []place
}

// Opens is how long it takes from now until devices may sync the set; 0: they may.
func (s *Set) Opens(now time.Time) time.Duration {
	if s.clock == nil {
		return hours.UntilAny(s.Between, now.UTC())
	}
	return hours.UntilAny(s.Between, now.In(s.clock))
}

// Group gives its members sets.
type Group struct {
	Name      string   `json:"name"`
	Sets      []string `json:"sets"`
	Bandwidth int64    `json:"bandwidth,omitempty"` // bytes per second, of each device of a member; 0: no limit by the group
	place     place
	places    []place
}

// Definitions are a parsed definitions file.
type Definitions struct {
	File          string // for messages
	Body          string // the file as written
	Subscriptions []*Subscription
	Files         []*FileSubscription
	Sets          []Set
	Groups        []Group
}

// place is a position in the definitions file, both from 1.
type place struct{ line, column int }

// SHA256 of the body, in hex: the version's identity.
func (d *Definitions) SHA256() string {
	sum := sha256.Sum256([]byte(d.Body))
	return hex.EncodeToString(sum[:])
}

// TableNames are the full names of all tables that have a subscription, sorted. A subscription that is in no set
// still has its table mirrored, for the rows queries of others.
func (d *Definitions) TableNames() []string {
	var out []string
	for _, s := range d.Subscriptions {
		out = append(out, s.Table)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// SubsetKey is the subset key column of a table, the same in all its subscriptions that have one; all tells whether
// some subscription of the table takes all rows.
func (d *Definitions) SubsetKey(table string) (key string, all bool) {
	for _, s := range d.Subscriptions {
		if s.Table != table {
			continue
		}
		if s.Key == "" {
			all = true
		} else {
			key = s.Key
		}
	}
	return key, all
}

// SetsFor are the sets of a member of these groups, in sync order, each once: by priority, and where that is the same groups as given
// and sets as written.
func (d *Definitions) SetsFor(groups []string) []string {
	var out []string
	for _, name := range groups {
		for _, g := range d.Groups {
			if g.Name != name {
				continue
			}
			for _, s := range g.Sets {
				if !slices.Contains(out, s) {
					out = append(out, s)
				}
			}
		}
	}
	priority := func(name string) int {
		if s := d.Set(name); s != nil {
			return s.Priority
		}
		return 0
	}
	slices.SortStableFunc(out, func(a, b string) int { return cmp.Compare(priority(b), priority(a)) })
	return out
}

// Set finds a set; nil when there is none.
func (d *Definitions) Set(name string) *Set {
	if i := slices.IndexFunc(d.Sets, func(s Set) bool { return s.Name == name }); i >= 0 {
		return &d.Sets[i]
	}
	return nil
}

// Bandwidth is how many bytes per second a device of a member of these groups may send and receive: the least that one of them says; 0: no limit.
func (d *Definitions) Bandwidth(groups []string) (least int64) {
	for _, g := range d.Groups {
		if slices.Contains(groups, g.Name) && g.Bandwidth > 0 && (least == 0 || g.Bandwidth < least) {
			least = g.Bandwidth
		}
	}
	return least
}

// SubscriptionsOf are a set's subscriptions in order; nil when there is no such set.
func (d *Definitions) SubscriptionsOf(set string) []*Subscription {
	var out []*Subscription
	for _, s := range d.Sets {
		if s.Name != set {
			continue
		}
		for _, name := range s.Subscriptions {
			if sub := d.subscription(name); sub != nil {
				out = append(out, sub)
			}
		}
	}
	return out
}

// HasGroup tells whether a group is defined.
func (d *Definitions) HasGroup(name string) bool {
	return slices.ContainsFunc(d.Groups, func(g Group) bool { return g.Name == name })
}

// Conflicts names the tables that a member of all these groups would get by more than one subscription: a device keeps
// a table once. Empty when the combination is good.
func (d *Definitions) Conflicts(groups []string) []string {
	seen := map[string]string{}
	var out []string
	for _, set := range d.SetsFor(groups) {
		for _, s := range d.SubscriptionsOf(set) {
			// The same subscription in two sets is twice the same table, too: each set has a cursor of its own.
			if first, ok := seen[s.Table]; ok && first != set+"\x00"+s.Name && !slices.Contains(out, s.Table) {
				out = append(out, s.Table)
			}
			seen[s.Table] = set + "\x00" + s.Name
		}
	}
	return out
}

func (d *Definitions) subscription(name string) *Subscription {
	for _, s := range d.Subscriptions {
		if s.Name == name {
			return s
		}
	}
	return nil
}

// Allows tells whether devices may upload this operation ("I", "U" or "D").
func (s *Subscription) Allows(op string) bool { return op != "" && strings.Contains(s.Allow, op) }

// Downloads tells whether devices get rows.
func (s *Subscription) Downloads() bool { return s.Direction != UploadOnly }

// ColumnsOf are the columns that devices get, in the table's order.
func (s *Subscription) ColumnsOf(t *Table) []Column {
	if len(s.Columns) == 0 {
		return t.Columns
	}
	var out []Column
	for _, c := range t.Columns {
		if slices.Contains(s.Columns, c.Name) {
			out = append(out, c)
		}
	}
	return out
}

// KeyQuery is a query with one text column, key: the distinct subset key values of one user, in the form that
// [Column.Text] gives (but see [Subscription.LooseKey]). userExpr and attrExpr are SQL expressions for the user's name (text) and attributes (jsonb):
// "$1" and "$2" for one user (both must be bound, not null, whether the query uses them or not), "u.name" and
// "u.attributes" inside LATERAL for many. It is evaluated as role
// [ReaderRole]. It needs checked definitions ([Definitions.Check]) and is empty for a subscription of all rows.
func (s *Subscription) KeyQuery(userExpr, attrExpr string) string {
	if s.Key == "" || s.rows == nil {
		return ""
	}
	key := Column{MirrorType: s.keyType}
	user, attr := "("+userExpr+")::pg_catalog.text", "("+attrExpr+")::pg_catalog.jsonb"
	var unused string
	if strings.HasPrefix(userExpr, "$") {
		unused += " AND " + user + " IS NOT NULL"
	}
	if strings.HasPrefix(attrExpr, "$") {
		unused += " AND " + attr + " IS NOT NULL"
	}
	// The line break ends a comment that the query may end with.
	from := " FROM (" + s.rows.render(user, attr) + "\n) AS q(k) WHERE q.k IS NOT NULL" + unused
	if s.LooseKey() { // numeric: one text for each value
		return "SELECT DISTINCT pg_catalog.trim_scale(q.k::" + s.keyType + ")::pg_catalog.text AS key" + from
	}
	return "SELECT DISTINCT " + key.Text("q.k::"+s.keyType) + " AS key" + from
}

// LooseKey tells whether equal values of the subset key may have different texts (see [Column.Loose]): texts of such keys must
// not be compared, and those of KeyQuery are the shortest. Such a key is a numeric. It needs checked definitions.
func (s *Subscription) LooseKey() bool { return Column{MirrorType: s.keyType}.Loose() }

// Text is an SQL expression for the canonical text of a value of the column's type, as the wire and the change data
// have it. For a few types the cast to text says something else than the type's output ('true' for 't', '10.0.0.1/32' for
// '10.0.0.1', no padding).
func (c Column) Text(expr string) string {
	base, _, _ := strings.Cut(c.MirrorType, "(")
	switch base {
	case "boolean", "character", "bpchar", `"char"`, "inet", "cidr", "name":
		return "(CASE WHEN (" + expr + ") IS NOT NULL THEN pg_catalog.format('%s', " + expr + ") END)"
	case "text":
		return expr
	}
	return "(" + expr + ")::pg_catalog.text"
}

// Loose tells whether equal values of the column's type in the mirror may have different texts (1.0 and 1.00, 0 and -0):
// a key of such a type can be rewritten at the source and still be equal to what it was.
func (c Column) Loose() bool {
	base, _, _ := strings.Cut(c.MirrorType, "(")
	switch base = strings.TrimSpace(base); base {
	case "text", "character varying", "character", "smallint", "integer", "bigint", "boolean", "uuid", "bytea", "date", "name", `"char"`,
		"bit", "bit varying", "oid", "inet", "cidr", "macaddr", "macaddr8", "money", "pg_lsn", "xid8":
		return false
	}
	return !strings.HasPrefix(base, "time") || strings.HasSuffix(base, "]")
}
