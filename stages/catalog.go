package stages

import (
	"slices"
	"strings"
	"time"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// Catalog is what the stages know of tables and subscriptions at one moment. It does not change: a change of either
// is a new Catalog.
type Catalog struct {
	epoch  string // of the mirror
	layout int64  // number of the mirror's layout that it is of
	defs   *schema.Definitions
	synced []*schema.Table
	tables map[int]*tableSQL
	sets   map[string]*set
	views  views
}

// set is a subscription set.
type set struct {
	name string
	subs []*subscription // in sync order
	byID map[string]*subscription
	wire *protocol.Definitions

	files []*fileSub
	plain *protocol.Definitions // wire for devices that know no files
}

// subscription is a table of a set.
type subscription struct {
	*schema.Subscription
	set     string
	table   *schema.Table
	columns []string // what devices see of the table, in wire order
	reply   *replySQL
}

// NewCatalog makes the catalog of a mirror with this epoch and layout ([schema.Layout]), from checked definitions and the
// tables that they were checked against.
func NewCatalog(epoch string, layout int64, defs *schema.Definitions, tables []*schema.Table) *Catalog {
	c := &Catalog{epoch: epoch, layout: layout, defs: defs, synced: tables, tables: make(map[int]*tableSQL, len(tables)), sets: make(map[string]*set, len(defs.Sets))}
	for _, t := range tables {
		key, _ := defs.SubsetKey(t.FullName())
		c.tables[t.ID] = newTableSQL(t, key)
	}
	for _, d := range defs.Sets {
		c.sets[d.Name] = c.newSet(d.Name, nil)
	}
	return c
}

// newSet makes a set, or what an application sees of it that was built for this.
func (c *Catalog) newSet(name string, built *protocol.Built) *set {
	s := &set{name: name, byID: map[string]*subscription{}, wire: c.defs.WireFor(name, c.synced, built)}
	for _, sub := range c.defs.SubscriptionsOf(name) {
		i := slices.IndexFunc(c.synced, func(t *schema.Table) bool { return t.FullName() == sub.Table })
		if i < 0 {
			continue
		}
		cols, ok := sub.BuiltFor(c.synced[i], built)
		if !ok {
			continue
		}
		one := &subscription{Subscription: sub, set: name, table: c.synced[i]}
		for _, col := range cols {
			one.columns = append(one.columns, col.Name)
		}
		one.reply = newReplySQL(one)
		s.subs = append(s.subs, one)
		s.byID[sub.Table] = one
	}
	for _, f := range c.defs.FilesOf(name) {
		s.files = append(s.files, newFileSub(f))
	}
	s.plain = withoutFiles(s.wire)
	return s
}

// subscription finds a table of a set; nil when there is none.
func (c *Catalog) subscription(setName, table string) *subscription {
	if s := c.sets[setName]; s != nil {
		return s.byID[table]
	}
	return nil
}

// allows tells whether a member of these groups has a set, and which ones there are.
func (c *Catalog) allows(groups []string, setName string) (bool, []string) {
	sets := c.defs.SetsFor(groups)
	return slices.Contains(sets, setName) && c.sets[setName] != nil, sets
}

// opens is how long it takes until devices may sync a set; 0: they may now.
func (c *Catalog) opens(set string) time.Duration {
	if s := c.defs.Set(set); s != nil {
		return s.Opens(time.Now())
	}
	return 0
}

// castType is the type that a value of the column is cast to when it is read from text. It is the column's own, but
// without the length where an explicit cast would cut a value silently: there the assignment to the column refuses it.
func castType(typ string) string {
	base, array := strings.CutSuffix(typ, "[]")
	if name, _, ok := strings.Cut(base, "("); ok {
		switch name {
		case "character varying", "bit varying":
			base = name
		case "character":
			base = "bpchar"
		case "bit":
			base = `"bit"`
		}
	}
	if array {
		return base + "[]"
	}
	return base
}

// textType is castType, but padded as the column pads.
func textType(typ string) string {
	if strings.HasPrefix(typ, "character(") {
		return typ
	}
	return castType(typ)
}
