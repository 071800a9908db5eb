package stages

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// Conflict policies in the merge. Records that rule D3 refuses are the rare case: what a policy needs to know of them is read by one
// further statement for each table and round, and a function is asked about many of them at once.

// ledgerPolicy is what up must know of a record's policy; the column policy of waystage.change.
type ledgerPolicy struct {
	Policy   conflict.Policy `json:"policy"`
	Function string          `json:"function,omitempty"`
	Key      string          `json:"key,omitempty"` // subset key column: a row that has moved is not for the device to write
}

// policyOf is the policy that counts for records of one operation, and its text for the ledger; empty: reject.
func (s *subscription) policyOf(op string) (conflict.Policy, string) {
	p := conflict.Policy(s.Conflict).For(conflict.Op(op[0]), s.Allows(protocol.Update))
	if p == conflict.RejectClash {
		return p, ""
	}
	text, err := json.Marshal(ledgerPolicy{p, s.Function, s.Key})
	if err != nil {
		panic(err) // three texts
	}
	return p, string(text)
}

// resolution is what a policy made of a record; the member merge of the column resolved of waystage.change.
type resolution struct {
	Policy conflict.Policy `json:"policy"`
	Sent   json.RawMessage `json:"sent,omitempty"` // what the device sent, where something else was written
}

// resolve decides clashes by the policies of their records: first's are the places of facts and of their decisions.
func (b *mergeBatch) resolve(q *tableSQL, facts []fact, decisions []decision, places []int) error {
	var look []recordID
	at := map[recordID]int{}
	for _, i := range places {
		d := &decisions[i]
		d.asked = true
		if d.policy == conflict.SourceWins {
			d.settle(conflict.Resolve(d.policy, conflict.Reason(d.code), conflict.Clash{Op: conflict.Op(d.fact.op[0]), Exists: d.fact.version != nil}))
			continue
		}
		id := recordID{facts[i].session, facts[i].idx}
		look, at[id] = append(look, id), i
	}
	if len(look) == 0 {
		return nil
	}
	sessions, idx := columnsOf(look)
	rows, err := b.tx.Query(b.ctx, q.clashes, sessions, idx)
	if err != nil {
		return err
	}
	clashes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[clashFacts])
	if err != nil {
		return err
	}
	asked := map[string][]*clashFacts{} // by function
	var images []staged
	for n := range clashes {
		c := &clashes[n]
		d := &decisions[at[recordID{c.Session, c.Idx}]]
		c.decision = d
		if d.policy == conflict.AskFunction {
			name := b.cat.subscription(b.sessions[c.Session].set, q.table.FullName()).Function
			asked[name] = append(asked[name], c)
			continue
		}
		code := d.code
		d.settle(conflict.Resolve(d.policy, conflict.Reason(code), c.clash()))
		switch {
		case d.code != "" && code == protocol.CodeStale && d.policy == conflict.MergeColumns && len(c.Overlap) > 0:
			d.detail = fmt.Sprintf("somebody else has changed %s since the version that the edit was made on", strings.Join(c.Overlap, ", "))
		case d.code == "" && len(c.Idle) > 0:
			img, err := without(*c.Img, c.Idle)
			if err != nil {
				return err
			}
			images = append(images, staged{c, img})
		}
		d.note(nil)
	}
	for name, list := range asked {
		written, err := b.ask(q, name, list)
		if err != nil {
			return err
		}
		images = append(images, written...)
	}
	return b.restage(q, images)
}

// clashFacts is what is read about a clash.
type clashFacts struct {
	Session  int64
	Idx      int
	Known    bool     // the image that an update was made on
	Overlap  []string // columns that both have changed, to different images
	Idle     []string // columns that the record names and does not change
	Img      *string
	Base     *string
	Theirs   *string
	Mine     string
	Info     string
	decision *decision `db:"-"`
}

func (c *clashFacts) clash() conflict.Clash {
	return conflict.Clash{Op: conflict.Op(c.decision.fact.op[0]), Exists: c.Theirs != nil, Known: c.Known, Overlap: len(c.Overlap) > 0}
}

// settle puts a policy's decision in the place of D3's.
func (d *decision) settle(effect conflict.Effect, reason conflict.Reason) {
	d.effect = effect
	if effect != conflict.Reject {
		d.code, d.detail = "", ""
		d.merged = true
		return
	}
	if was := d.code; protocol.Code(reason) != was {
		d.code, d.detail = protocol.Code(reason), reasons[reason]+": "+d.detail
	}
}

// note keeps for the ledger that the policy took the record; sent is the device's image if another one is written.
func (d *decision) note(sent *string) {
	if !d.merged {
		return
	}
	r := resolution{Policy: d.policy}
	if sent != nil {
		r.Sent = json.RawMessage(*sent)
	}
	text, err := json.Marshal(map[string]resolution{"merge": r})
	if err != nil {
		panic(err) // what the database gave
	}
	d.resolved = string(text)
}

// staged is an image to be written in the place of the one that came.
type staged struct {
	*clashFacts
	img string
}

func without(img string, columns []string) (string, error) {
	m := map[string]*string{}
	if err := json.Unmarshal([]byte(img), &m); err != nil {
		return "", err
	}
	for _, c := range columns {
		delete(m, c)
	}
	out, err := json.Marshal(m)
	return string(out), err
}

func (b *mergeBatch) restage(q *tableSQL, list []staged) error {
	if len(list) == 0 {
		return nil
	}
	sessions, idx, imgs := make([]int64, len(list)), make([]int, len(list)), make([]string, len(list))
	for i, s := range list {
		sessions[i], idx[i], imgs[i] = s.Session, s.Idx, s.img
	}
	_, err := b.tx.Exec(b.ctx, `UPDATE waystage.staging s SET img = u.img FROM unnest($1::bigint[], $2::int[], $3::jsonb[]) AS u(session_id, idx, img)
		WHERE s.tbl = $4 AND s.session_id = u.session_id AND s.idx = u.idx`, sessions, idx, imgs, q.table.ID)
	return wrap("stage the images that policies gave", err)
}

// ask has a function decide clashes. What it gives is held against the table before anything is written.
func (b *mergeBatch) ask(q *tableSQL, function string, list []*clashFacts) ([]staged, error) {
	questions := make([]schema.Question, len(list))
	for i, c := range list {
		questions[i] = schema.Question{Base: c.Base, Theirs: c.Theirs, Mine: c.Mine, Info: c.Info}
	}
	replies, err := schema.Ask(b.ctx, b.tx, function, questions)
	if err != nil {
		return nil, err
	}
	rulings, err := schema.Rule(b.ctx, b.tx, q.table, questions, replies)
	if err != nil {
		return nil, err
	}
	var out []staged
	for i, c := range list {
		r, d := &rulings[i], c.decision
		answer := answers[r.Kind]
		d.settle(conflict.Answered(answer, conflict.Reason(d.code), c.clash()))
		if r.Why != "" && d.code != "" {
			d.detail = function + ": " + r.Why
			if r.Log != "" {
				b.m.log.Warn("a conflict function failed", zap.String("function", function), zap.String("table", q.table.FullName()),
					zap.Int64("session", c.Session), zap.Int("record", c.Idx), zap.String("error", r.Log))
			}
		}
		if answer == conflict.Another && d.merged {
			d.note(cmp.Or(c.Img, &c.Mine))
			out = append(out, staged{c, r.Write})
		} else {
			d.note(nil)
		}
	}
	return out, nil
}

// answers of functions, as package conflict has them.
var answers = map[schema.Kind]conflict.Answer{
	schema.Silent: conflict.Silent, schema.Absent: conflict.Absent, schema.Standing: conflict.Standing, schema.Another: conflict.Another,
	schema.Raised: conflict.Refusing, schema.Senseless: conflict.Senseless,
}

// waiting are records of a table that wait for a later round, because a record of the same row comes before them.
type waiting []waitingRecord

type waitingRecord struct {
	recordID
	key string
}

// due takes out of the list what the next round looks at: all, but of a row that a policy was asked about only the first, since
// what becomes of the others depends on it.
func (w waiting) due(asked map[string]bool) (now []recordID, later waiting) {
	slices.SortFunc(w, func(a, b waitingRecord) int {
		return cmp.Or(cmp.Compare(a.session, b.session), cmp.Compare(a.idx, b.idx))
	})
	first := map[string]bool{}
	for _, r := range w {
		if asked[r.key] && first[r.key] {
			later = append(later, r)
			continue
		}
		first[r.key] = true
		now = append(now, r.recordID)
	}
	return now, later
}

func columnsOf(list []recordID) (sessions []int64, idx []int) {
	for _, r := range list {
		sessions, idx = append(sessions, r.session), append(idx, r.idx)
	}
	return sessions, idx
}
