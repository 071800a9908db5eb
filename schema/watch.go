package schema

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

// Watch compares the source's catalog with the synced tables from time to time, until ctx ends. What does not show in the stream
// of changes is found here: a table that was dropped or taken out of the publication, or altered and not written since. A table
// that cannot go on is stopped; labels, defaults and constraints are taken over.
func Watch(ctx context.Context, sourceDSN, mirrorDSN string, every time.Duration, log *zap.Logger) {
	failed := false
	for sleep(ctx, every) == nil {
		err := look(ctx, sourceDSN, mirrorDSN, log)
		if err != nil && ctx.Err() == nil && !failed {
			log.Warn("cannot compare the source's tables with the mirror's; it will be tried again", zap.Error(err))
		}
		failed = err != nil
	}
}

func look(ctx context.Context, sourceDSN, mirrorDSN string, log *zap.Logger) error {
	source, err := Connect(ctx, sourceDSN, "waystage-watch")
	if err != nil {
		return err
	}
	defer closeConn(source)
	mirror, err := Connect(ctx, mirrorDSN, "waystage-watch")
	if err != nil {
		return err
	}
	defer closeConn(mirror)
	layout, err := Layout(ctx, mirror)
	if err != nil {
		return err
	}
	found, err := Inspect(ctx, source, mirror, nil)
	if err != nil {
		return err
	}
	for _, i := range found {
		if err := actAlone(ctx, mirror, layout, i, log); err != nil {
			return err
		}
		// What was done has moved the layout, and what was not is found again next time.
		if layout, err = Layout(ctx, mirror); err != nil {
			return err
		}
	}
	return nil
}

// actAlone does what can be done about one table without anybody.
func actAlone(ctx context.Context, mirror *pgx.Conn, layout int64, i *Inspection, log *zap.Logger) error {
	if i.Stopped != "" || i.Stored == nil {
		return nil
	}
	if d, ok := i.stops(); ok {
		detail := d.What
		if d.Column != "" {
			detail = "column " + d.Column + " " + d.What
		}
		ours, err := StopTable(ctx, mirror, i.Stored.ID, layout, d.Stops, detail)
		if ours {
			log.Error("a table is stopped; all others go on. Look with `waystage schema diff`, go on with `waystage schema apply`",
				zap.String("table", i.Table), zap.String("code", string(d.Stops)), zap.String("detail", detail))
		}
		return err
	}
	if i.Action == ActRefresh {
		if err := Refresh(ctx, mirror, i); err != nil {
			return err
		}
		log.Info("what devices are told of a table has changed at the source, and was taken over", zap.String("table", i.Table), zap.Any("differences", i.Differences))
	}
	return nil
}
