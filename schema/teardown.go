package schema

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// TeardownOptions say what to take away.
type TeardownOptions struct {
	SourceDSN  string // empty: leave the source alone
	MirrorDSN  string // empty: leave the mirror alone; then Epoch is needed
	Epoch      string // of the mirror, when it cannot be asked; empty: ask
	Everything bool   // also Waystage's own schemas, and all mirror tables
}

// Teardown takes back what [Setup] left at the two servers: slots first, which hold log back, then publications and
// the progress row. The source's publication and schema stay while another mirror uses them. It can be repeated.
func Teardown(ctx context.Context, o TeardownOptions) error {
	epoch := o.Epoch
	var errs []error
	if o.MirrorDSN != "" {
		asked, err := teardownMirror(ctx, o)
		if epoch == "" {
			epoch = asked
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("teardown of the mirror: %w", err))
		}
	}
	if o.SourceDSN != "" && epoch != "" {
		if err := teardownSource(ctx, o, epoch); err != nil {
			errs = append(errs, fmt.Errorf("teardown of the source: %w", err))
		}
	}
	return errors.Join(errs...)
}

func teardownMirror(ctx context.Context, o TeardownOptions) (epoch string, err error) {
	conn, err := Connect(ctx, o.MirrorDSN, "waystage-teardown")
	if err != nil {
		return "", err
	}
	defer closeConn(conn)
	var there bool
	if err := conn.QueryRow(ctx, "SELECT to_regclass('waystage.meta') IS NOT NULL").Scan(&there); err != nil || !there {
		return "", err
	}
	if epoch, err = Epoch(ctx, conn); err != nil || epoch == "" {
		return "", err
	}
	if err := dropSlot(ctx, conn, SlotUp(epoch)); err != nil {
		return epoch, err
	}
	if _, err := conn.Exec(ctx, "DROP PUBLICATION IF EXISTS "+PublicationUp); err != nil {
		return epoch, err
	}
	if !o.Everything {
		// The next set-up begins with a new copy.
		return epoch, writeMeta(ctx, conn, "copy", "none")
	}
	return epoch, pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		tables, err := LoadTables(ctx, tx)
		if err != nil {
			return err
		}
		for _, t := range tables {
			if err := dropMirrorTable(ctx, tx, t); err != nil {
				return err
			}
		}
		_, err = tx.Exec(ctx, "DROP SCHEMA waystage, waystage_staging CASCADE")
		return err
	})
}

func teardownSource(ctx context.Context, o TeardownOptions, epoch string) error {
	conn, err := Connect(ctx, o.SourceDSN, "waystage-teardown")
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if err := dropSlot(ctx, conn, SlotDown(epoch)); err != nil {
		return err
	}
	var there, others bool
	if err := conn.QueryRow(ctx, "SELECT to_regclass('waystage.progress') IS NOT NULL").Scan(&there); err != nil {
		return err
	}
	if there {
		if _, err := conn.Exec(ctx, "DELETE FROM waystage.progress WHERE epoch = $1", epoch); err != nil {
			return err
		}
		if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM waystage.progress)").Scan(&others); err != nil {
			return err
		}
	}
	if others {
		return nil
	}
	if _, err := conn.Exec(ctx, "DROP PUBLICATION IF EXISTS "+PublicationDown); err != nil {
		return err
	}
	if o.Everything && there {
		_, err = conn.Exec(ctx, "DROP SCHEMA waystage CASCADE")
	}
	return err
}
