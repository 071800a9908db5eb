package device

import (
	"context"
	"encoding/json"

	"github.com/waystage/waystage/protocol"
)

// buildFor notes what the file's application was built for; nil: as it was.
func (t *txn) buildFor(built *protocol.Built) error {
	if built == nil {
		return nil
	}
	text := ""
	if len(built.Tables) > 0 {
		if err := built.Check(); err != nil {
			return err
		}
		b, err := json.Marshal(built)
		if err != nil {
			return err
		}
		text = string(b)
	}
	n, err := t.run(`UPDATE _ws_state SET built = ? WHERE built <> ?`, text, text)
	if err != nil || n == 0 {
		return err
	}
	return t.exec(`UPDATE _ws_set SET hash = ''`) // each set needs a session, and its definitions
}

// BuildFor says what the file's application was built for, as Options.Built does.
func (d *Device) BuildFor(ctx context.Context, built protocol.Built) error {
	return d.write(ctx, func(t *txn) error { return t.buildFor(&built) })
}

// Built tells what the file's application was built for; nil: everything.
func (d *Device) Built(ctx context.Context) (*protocol.Built, error) {
	st, err := d.state(ctx)
	return st.Built, err
}
