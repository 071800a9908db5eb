package protocol

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strconv"
	"time"
)

// Bounds of a verification.
const (
	MaxVerifyBuckets = 4096 // buckets of one table
	MaxVerifySample  = 100  // differences in one result
)

// Verification is what a device asks and tells about the equality of its rows and the mirror's. A device that knows
// verification sends one, be it empty, with every request; only then may the server ask it to verify.
type Verification struct {
	Buckets int           `cbor:"1,keyasint,omitempty" json:"buckets,omitempty"` // a power of two up to MaxVerifyBuckets: sums are wanted, of so many buckets of keys of every table; 0: nothing is wanted
	Rows    []VerifyRows  `cbor:"2,keyasint,omitempty" json:"rows,omitempty"`    // instead of sums: the rows of some of the buckets
	Result  *VerifyResult `cbor:"3,keyasint,omitempty" json:"result,omitempty"`  // of an earlier verification of this set
}

// VerifyRows names buckets of a table.
type VerifyRows struct {
	Table   string `cbor:"1,keyasint" json:"table"`
	Buckets []int  `cbor:"2,keyasint" json:"buckets"` // ascending, each below Verification.Buckets
}

// VerifyResult is what a verification found on the device.
type VerifyResult struct {
	Cursor    string       `cbor:"1,keyasint" json:"cursor"`    // of the reply that was verified
	At        string       `cbor:"2,keyasint" json:"at"`        // RFC 3339, by the device's clock
	Rows      int64        `cbor:"3,keyasint" json:"rows"`      // compared
	Different int64        `cbor:"4,keyasint" json:"different"` // of them
	Repaired  int64        `cbor:"5,keyasint" json:"repaired"`  // of the different ones
	More      bool         `cbor:"6,keyasint" json:"more"`      // there may be more: not all were looked at
	Sample    []Difference `cbor:"7,keyasint,omitempty" json:"sample,omitempty"`
}

// Kinds of a [Difference].
const (
	DiffMissing = "missing" // the device lacks the row
	DiffExtra   = "extra"   // the device has a row that it should not have
	DiffValues  = "values"  // columns differ
	DiffVersion = "version" // the columns are equal, the version is another
)

// Difference is a row of a device that is not the mirror's. It carries no values but the key.
type Difference struct {
	Table   string   `cbor:"1,keyasint" json:"table"`
	Key     []Value  `cbor:"2,keyasint" json:"key"`
	Kind    string   `cbor:"3,keyasint" json:"kind"`
	Columns []string `cbor:"4,keyasint,omitempty" json:"columns,omitempty"` // that differ
}

// Verified is the server's side of a verification, read in the snapshot of the reply's rows. It may be spread over pages.
type Verified struct {
	Ask     bool            `cbor:"1,keyasint,omitempty" json:"ask,omitempty"`     // page 1: the operator wants this set verified
	Buckets int             `cbor:"2,keyasint,omitempty" json:"buckets,omitempty"` // of the request
	Tables  []VerifiedTable `cbor:"3,keyasint,omitempty" json:"tables,omitempty"`
}

// VerifiedTable is a table or a part of it: sums, or rows.
type VerifiedTable struct {
	Table   string   `cbor:"1,keyasint" json:"table"`
	Columns []string `cbor:"2,keyasint" json:"columns"`                  // order of the values in images and Rows
	Sums    []Sum    `cbor:"3,keyasint,omitempty" json:"sums,omitempty"` // of the buckets that are not empty
	Rows    []Row    `cbor:"4,keyasint,omitempty" json:"rows,omitempty"` // all rows of the buckets that were asked for
}

// Sum of one bucket: how many rows it has, and the exclusive or of their hashes ([RowHash]) as 16 hex digits: of the version
// and the key, and of all columns.
type Sum struct {
	_        struct{} `cbor:",toarray"`
	Bucket   int      `json:"bucket"`
	Rows     int64    `json:"rows"`
	Versions string   `json:"versions"`
	Images   string   `json:"images"`
}

// RowHash hashes a list of values: the first 8 bytes, big endian, of the SHA-256 of, for each value, its length in bytes in
// decimal, a colon and its UTF-8 bytes, or a hyphen for null.
func RowHash(vals ...Value) uint64 {
	var buf []byte
	for _, v := range vals {
		if v == nil {
			buf = append(buf, '-')
			continue
		}
		buf = strconv.AppendInt(buf, int64(len(*v)), 10)
		buf = append(append(buf, ':'), *v...)
	}
	sum := sha256.Sum256(buf)
	return binary.BigEndian.Uint64(sum[:])
}

// Bucket is the bucket of a key among n, a power of two.
func Bucket(key []Value, n int) int { return int(RowHash(key...) & uint64(n-1)) }

// HashText is a sum as the wire carries it.
func HashText(h uint64) string { return fmt.Sprintf("%016x", h) }

func (v *Verification) check(lim Limits) error {
	if v == nil {
		return nil
	}
	if v.Buckets < 0 || v.Buckets > MaxVerifyBuckets || v.Buckets&(v.Buckets-1) != 0 {
		return refuse(CodeMalformed, "field verify.buckets must be a power of two up to %d", MaxVerifyBuckets)
	}
	long := func(s string) bool { return lim.Name > 0 && len(s) > lim.Name }
	seen := map[string]bool{}
	for i, r := range v.Rows {
		if seen[r.Table] || long(r.Table) {
			return refuse(CodeMalformed, "verify.rows[%d]: table %s comes twice, or its name is too long", i, excerpt(r.Table))
		}
		seen[r.Table] = true
		for j, b := range r.Buckets {
			if b < 0 || b >= v.Buckets || j > 0 && b <= r.Buckets[j-1] {
				return refuse(CodeMalformed, "verify.rows[%d]: buckets must ascend, from 0 to below %d", i, v.Buckets)
			}
		}
	}
	r := v.Result
	if r == nil {
		return nil
	}
	if _, err := time.Parse(time.RFC3339, r.At); err != nil {
		return refuse(CodeMalformed, "field verify.result.at must be an RFC 3339 time")
	}
	if r.Rows < 0 || r.Different < 0 || r.Repaired < 0 || long(r.Cursor) {
		return refuse(CodeMalformed, "verify.result: counts cannot be negative, and the cursor has at most %d bytes", lim.Name)
	}
	if len(r.Sample) > MaxVerifySample {
		return refuse(CodeTooBig, "verify.result.sample: %d differences, the limit is %d", len(r.Sample), MaxVerifySample)
	}
	for i, d := range r.Sample {
		switch d.Kind {
		case DiffMissing, DiffExtra, DiffValues, DiffVersion:
		default:
			return refuse(CodeMalformed, "verify.result.sample[%d]: kind %s is not missing, extra, values or version", i, excerpt(d.Kind))
		}
		if long(d.Table) {
			return refuse(CodeMalformed, "verify.result.sample[%d]: a table name of %d bytes", i, len(d.Table))
		}
	}
	return nil
}
