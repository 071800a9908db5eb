package schema

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

//go:embed migrations/mirror/*.sql migrations/source/*.sql
var migrations embed.FS

// ErrNewer is returned when a database was migrated by a newer version of Waystage than this one.
var ErrNewer = errors.New("database is newer than this version of waystage")

// ErrWrongDatabase is returned when the mirror is to be made in a source database or the other way round.
var ErrWrongDatabase = errors.New("wrong database")

// Advisory locks of set-up, in a class of their own (the two-key form).
const (
	lockClass     = 22357
	lockSchema    = 1 // creating schema waystage
	lockSetup     = 2 // one Setup at a time
	lockDDL       = 3 // mirror tables
	lockMigration = lockClass<<32 | 4
)

// MigrateMirror brings Waystage's own tables in the mirror database to this version. Concurrent calls wait for one another.
func MigrateMirror(ctx context.Context, dsn string) error {
	return migrate(ctx, dsn, "mirror", "source")
}

// MigrateSource does the same for the one table at the source.
func MigrateSource(ctx context.Context, dsn string) error {
	return migrate(ctx, dsn, "source", "mirror")
}

func migrate(ctx context.Context, dsn, kind, other string) error {
	if err := ensureSchema(ctx, dsn, kind, other); err != nil {
		return fmt.Errorf("migrate %s: %w", kind, err)
	}
	cfg, err := ConnConfig(dsn, "waystage-migrate")
	if err != nil {
		return err
	}
	db := stdlib.OpenDB(*cfg)
	defer func() { _ = db.Close() }()
	files, err := fs.Sub(migrations, "migrations/"+kind)
	if err != nil {
		return err
	}
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockID(lockMigration), lock.WithLockTimeout(1, 300), lock.WithUnlockTimeout(1, 30))
	if err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithTableName("waystage.migration_"+kind),
		goose.WithSessionLocker(locker), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("migrate %s: %w", kind, err)
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("migrate %s: %w", kind, err)
	}
	if have > want {
		return fmt.Errorf("migrate %s: %w: the database has schema version %d, this program knows %d; "+
			"run the newer program, a downgrade is not possible", kind, ErrNewer, have, want)
	}
	if have == want {
		return nil
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("migrate %s: %w", kind, err)
	}
	return nil
}

// ensureSchema makes schema waystage, where the version table lives. It asks first: CREATE SCHEMA IF NOT EXISTS needs
// the privilege even when the schema exists, and a careful administrator may have made it for us.
func ensureSchema(ctx context.Context, dsn, kind, other string) error {
	conn, err := Connect(ctx, dsn, "waystage-migrate")
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		var exists, isOther bool
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1, $2)", lockClass, lockSchema); err != nil {
			return err
		}
		err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = 'waystage'),
			EXISTS (SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'waystage' AND c.relname = $1)`,
			"migration_"+other).Scan(&exists, &isOther)
		if err != nil {
			return err
		}
		if isOther {
			return fmt.Errorf("%w: this database is already a %s of Waystage; source and mirror must be two databases", ErrWrongDatabase, other)
		}
		if exists {
			return nil
		}
		_, err = tx.Exec(ctx, "CREATE SCHEMA waystage")
		return err
	})
}
