package apply

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/schema"
)

// Conflict policies at the source: what rule R4 refuses because somebody else wrote, a record's policy may take all the same. It
// decides by base, and the record then expects base: should the source have moved on, it misses and is decided anew.

// policy is what the merge noted in the ledger about a record's conflict policy.
type policy struct {
	Policy   conflict.Policy `json:"policy"`
	Function string          `json:"function"`
	Key      string          `json:"key"` // subset key column; empty: all rows are everybody's
}

func readPolicy(text *string) (p policy, err error) {
	if text != nil {
		err = json.Unmarshal([]byte(*text), &p)
	}
	return p, err
}

// resolution is what a policy made of a record at the source; the member source of the column resolved of waystage.change.
type resolution struct {
	Policy conflict.Policy `json:"policy"`
	Stood  json.RawMessage `json:"stood"`           // the image that it was written over; null: no row
	Wrote  json.RawMessage `json:"wrote,omitempty"` // by a function: in the place of the device's image

	op  conflict.Op // by a function: what is done now
	img map[string]*string
}

// moved tells whether base is of another subset than the row that the change was made on.
func (c *upChange) moved(base image) (bool, error) {
	if c.policy.Key == "" || base == nil {
		return false, nil
	}
	i, ok := c.t.at[c.policy.Key]
	if !ok {
		return true, nil
	}
	was := c.img[c.policy.Key]
	if c.op != conflict.Insert {
		old, err := c.t.image(c.old)
		if err != nil {
			return false, err
		}
		if old == nil {
			return true, nil
		}
		was = old[i]
	}
	return !equalImages(image{was}, image{base[i]}), nil
}

// resolve decides by a change's policy about a clash with base.
func (s *upSession) resolve(ctx context.Context, tx pgx.Tx, c *upChange, base image) (effect conflict.Effect, why refusal, res resolution, err error) {
	why = c.conflicting(conflict.Source)
	moved, err := c.moved(base)
	if err != nil {
		return effect, why, res, err
	}
	clash := conflict.Clash{Op: c.op, Exists: base != nil, Known: c.old != nil, Moved: moved}
	stood := c.t.json(base)
	res = resolution{Policy: c.policy.Policy, Stood: json.RawMessage("null")}
	if stood != nil {
		res.Stood = json.RawMessage(*stood)
	}
	if c.policy.Policy == conflict.AskFunction && !moved {
		effect, why, err = s.ask(ctx, tx, c, clash, stood, &res)
		return effect, why, res, err
	}
	if c.policy.Policy == conflict.MergeColumns && c.op == conflict.Update && c.old != nil && stood != nil {
		mine, err := json.Marshal(c.img)
		if err != nil {
			return effect, why, res, err
		}
		var names []string
		if err := tx.QueryRow(ctx, c.t.overlap, *c.old, *stood, string(mine)).Scan(&names); err != nil {
			return effect, why, res, fmt.Errorf("compare columns of %s: %w", c.t.FullName(), err)
		}
		if clash.Overlap = len(names) > 0; clash.Overlap {
			why.detail += fmt.Sprintf(": %v", names)
		}
	}
	effect, reason := conflict.Resolve(c.policy.Policy, conflict.Source, clash)
	if reason == conflict.Yields {
		why = refusal{code: string(reason), detail: "what stands there wins: " + why.detail}
	}
	return effect, why, res, nil
}

// ask has the change's function decide.
func (s *upSession) ask(ctx context.Context, tx pgx.Tx, c *upChange, clash conflict.Clash, stood *string, res *resolution) (conflict.Effect, refusal, error) {
	why := c.conflicting(conflict.Source)
	var img *string
	if c.op != conflict.Delete {
		text, err := json.Marshal(c.img)
		if err != nil {
			return conflict.Reject, why, err
		}
		sent := string(text)
		img = &sent
	}
	q := []schema.Question{{Base: c.old, Theirs: stood}}
	err := tx.QueryRow(ctx, `SELECT coalesce((coalesce($2::jsonb, '{}') || $3::jsonb)::text, 'null'),
			jsonb_build_object('at', 'source', 'table', c.tname, 'op', c.op, 'key', c.key, 'user', d.user_name, 'device', d.name,
				'attributes', coalesce(u.attributes, '{}'), 'received_at', s.received_at, 'stood_by', CASE WHEN $4 THEN 'source' END)::text
		FROM waystage.change AS c LEFT JOIN waystage.device AS d ON d.id = c.device_id LEFT JOIN waystage.app_user AS u ON u.name = d.user_name
			LEFT JOIN waystage.session AS s ON s.id = c.session_id WHERE c.id = $1`, c.id, c.old, img, stood != nil).Scan(&q[0].Mine, &q[0].Info)
	if err != nil {
		return conflict.Reject, why, fmt.Errorf("read change %d: %w", c.id, err)
	}
	replies, err := schema.Ask(ctx, tx, c.policy.Function, q)
	if err != nil {
		return conflict.Reject, why, err
	}
	rulings, err := schema.Rule(ctx, tx, c.t.Table, q, replies)
	if err != nil {
		return conflict.Reject, why, err
	}
	r := rulings[0]
	effect, reason := conflict.Answered(conflict.AnswerOf(byte(r.Kind)), conflict.Source, clash)
	if effect == conflict.Reject && reason != conflict.Source {
		why = refusal{code: string(reason), detail: c.policy.Function + ": " + cmp.Or(r.Why, "what stands there wins")}
	}
	if r.Log != "" {
		s.u.log.Warn("a conflict function failed", zap.String("function", c.policy.Function), zap.Int64("change", c.id), zap.String("error", r.Log))
	}
	switch effect {
	case conflict.Create:
		res.op = conflict.Insert
	case conflict.Change:
		res.op = conflict.Update
	default:
		return effect, why, nil
	}
	res.Wrote = json.RawMessage(r.Write)
	res.img, err = jsonValues(r.Write)
	return effect, why, err
}

// resolveTogether lets policies decide about many changes that met somebody else's work, after one barrier for all of them: it tells
// whether some expect another image now. Units, and changes of a row that others come before, are decided in their turn.
func (s *upSession) resolveTogether(ctx context.Context, list []group, missed map[*upChange]bool) (some bool, err error) {
	var met group
	seen := map[string]bool{}
	for _, c := range flat(list) {
		key := authorKey(c.tbl, keyID(c.key))
		if !seen[key] && missed[c] && c.unit == 0 && c.policy.Policy != "" {
			met = append(met, c)
		}
		seen[key] = true
	}
	if len(met) < 2 {
		return false, nil
	}
	if err := s.barrier(ctx); err != nil {
		return false, err
	}
	tx, err := s.mirror.Begin(ctx)
	if err != nil {
		return false, fmt.Errorf("read base: %w", err)
	}
	defer rollback(tx)
	if err := s.holdTerm(ctx, tx); err != nil {
		return false, err
	}
	if err := lockTables(ctx, tx, met.tables()); err != nil {
		return false, fmt.Errorf("read base: %w", err)
	}
	resolved := map[*upChange]resolution{}
	for _, c := range met {
		base, err := s.base(ctx, tx, c)
		if err != nil {
			return false, err
		}
		if !conflict.Met(base.writer, base.refused, c.rebases) {
			continue
		}
		res, _, err := s.reconsiderOne(ctx, tx, c, base)
		if err != nil {
			return false, err
		}
		if res != nil {
			resolved[c], some = *res, true
		}
	}
	return some, noteResolved(ctx, tx, resolved)
}

// noteResolved writes to the ledger what policies made of changes at the source, before they are tried: down must know whose image
// it is when it comes back. What is noted and then not needed makes the image the source's own, which is safe.
func noteResolved(ctx context.Context, tx pgx.Tx, list map[*upChange]resolution) error {
	var ids []int64
	var texts []string
	for c, r := range list {
		text, err := json.Marshal(r)
		if err != nil {
			return err
		}
		ids, texts = append(ids, c.id), append(texts, string(text))
	}
	if len(ids) > 0 {
		_, err := tx.Exec(ctx, `UPDATE waystage.change AS c SET resolved = coalesce(c.resolved, '{}') || jsonb_build_object('source', u.r), winner = 'source'
			FROM unnest($1::bigint[], $2::jsonb[]) AS u(id, r) WHERE c.id = u.id AND c.state = 'merged'`, ids, texts)
		if err != nil {
			return fmt.Errorf("note what policies decided: %w", err)
		}
	}
	return commit(ctx, tx)
}
