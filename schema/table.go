// Package schema knows the tables: it reads them from the source's catalog, keeps their mirror and staging tables,
// Waystage's own tables (embedded migrations), the subscription definitions and the initial copy.
//
// It promises that every identifier in SQL that it generates is quoted, that a table which cannot be synced is
// refused by name with the remedy, and that set-up can be killed at any line and run again.
// cmd calls it for init, check, and at the start of serve; stages, capture and apply use its types.
package schema

import "strings"

// Column of a synced table.
type Column struct {
	Name       string   `json:"name"`
	Type       string   `json:"type"`        // format_type at the source, e.g. "numeric(12,2)"; for a domain over a pg_catalog type that one
	MirrorType string   `json:"mirror_type"` // type in the mirror: Type for pg_catalog types, else "text"
	NotNull    bool     `json:"not_null"`
	Default    string   `json:"default,omitempty"`  // constant default as text, if it is one
	Identity   string   `json:"identity,omitempty"` // "", "a" (always) or "d" (by default)
	Labels     []string `json:"labels,omitempty"`   // enum labels, when Type is an enum
	// Shape has the members of every user-defined enum and composite that the type is made of: labels by "enum name",
	// "attribute type" by "row name".
	Shape   map[string][]string `json:"shape,omitempty"`
	Num     int16               `json:"num,omitempty"`      // attnum at the source: it survives a renaming
	TypeOID uint32              `json:"type_oid,omitempty"` // type and modifier as the change stream describes them
	TypeMod int32               `json:"type_mod,omitempty"`
}

// ForeignKey of a synced table to another synced table.
type ForeignKey struct {
	Name    string   `json:"name"`
	Columns []string `json:"columns"`
	Table   string   `json:"table"` // "schema.table"
	Refers  []string `json:"refers"`
}

// Table is a synced table. Generated columns are not in Columns: they are computed, not carried.
type Table struct {
	ID      int          `json:"id"` // waystage.synced_table.id
	Schema  string       `json:"schema"`
	Name    string       `json:"name"`
	Rank    int          `json:"rank"` // parents have lower ranks than the children that refer to them
	Columns []Column     `json:"columns"`
	Key     []string     `json:"key"` // primary key columns in key order
	Unique  [][]string   `json:"unique,omitempty"`
	Foreign []ForeignKey `json:"foreign,omitempty"`
	OID     uint32       `json:"oid,omitempty"` // at the source: it survives a renaming
	// Partitioned is set when the source's table is the root of partitions. In the mirror it is an ordinary table.
	Partitioned bool   `json:"partitioned,omitempty"`
	Stop        *Stop  `json:"-"` // why the table does not take part; nil: it does
	Floor       string `json:"-"` // a copy shows the source up to this position; empty: the slot's beginning
}

// FullName is "schema.table", the name on the wire and in definitions.
func (t *Table) FullName() string { return t.Schema + "." + t.Name }

// Ident is the quoted, qualified SQL name; the same at the source and in the mirror.
func (t *Table) Ident() string { return Quote(t.Schema) + "." + Quote(t.Name) }

// Own is the table in a FROM or LOCK clause at the source: with its partitions, without inheritance children.
func (t *Table) Own() string {
	if t.Partitioned {
		return t.Ident()
	}
	return "ONLY " + t.Ident()
}

// Column finds a column by name.
func (t *Table) Column(name string) (Column, bool) {
	for _, c := range t.Columns {
		if c.Name == name {
			return c, true
		}
	}
	return Column{}, false
}

// IsKey tells whether the column is part of the primary key.
func (t *Table) IsKey(name string) bool {
	for _, k := range t.Key {
		if k == name {
			return true
		}
	}
	return false
}

// Quote quotes an SQL identifier.
func Quote(name string) string {
	return `"` + strings.ReplaceAll(strings.ReplaceAll(name, "\x00", ""), `"`, `""`) + `"`
}

// Literal quotes an SQL string literal.
func Literal(s string) string {
	s = strings.ReplaceAll(strings.ReplaceAll(s, "\x00", ""), `'`, `''`)
	if strings.Contains(s, `\`) {
		return ` E'` + strings.ReplaceAll(s, `\`, `\\`) + `'`
	}
	return `'` + s + `'`
}

// System columns of every mirror table.
const (
	ColVersion = "_ws_version" // bigint: mirror transaction that last wrote the row
	ColWriter  = "_ws_lw"      // text: incarnation of the last device writer, null: the source
	ColMerged  = "_ws_mver"    // bigint: version given by that device's merge, 0: none
)

// TableLockClass is the first number of the transaction-level advisory locks by which merge, down and settlement
// exclude each other for each table; the second is the table's id. They are taken in ascending order, before anything is
// read.
const TableLockClass = 22355

// LayoutLockClass is the first number of the shared advisory locks that merge (for its transaction) and reply (until its pages
// are out) hold while they go by one layout; the second is [LayoutLock] of it. [Apply] waits for those by older ones.
const LayoutLockClass = 22359

// LayoutLock is the second number of a layout's advisory lock.
func LayoutLock(layout int64) int64 { return layout & 0x7fffffff }

// Session settings that make text representations canonical (rule R5). Set on every connection that carries values,
// replication connections too.
var Canonical = map[string]string{
	"datestyle":          "ISO",
	"intervalstyle":      "postgres",
	"extra_float_digits": "3",
	"bytea_output":       "hex",
	"timezone":           "UTC",
	"search_path":        "",
	"client_encoding":    "UTF8",
	"lc_monetary":        "C",
	// These decide how values are read.
	"array_nulls":                 "on",
	"xmloption":                   "content",
	"standard_conforming_strings": "on",
	"transform_null_equals":       "off",
	"row_security":                "on",
	"quote_all_identifiers":       "off", // and this how types are named
}
