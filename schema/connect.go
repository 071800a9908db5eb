package schema

import (
	"context"
	"fmt"
	"maps"
	"net"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/internal/pgerr"
)

// Querier is what most functions of this package need of a connection, pool or transaction.
type Querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// patient settings keep a role's or a database's own timeouts from cutting off copies, streams and pools. What the
// connection string sets itself stands.
var patient = map[string]string{
	"statement_timeout":                   "0",
	"lock_timeout":                        "0",
	"idle_in_transaction_session_timeout": "0",
	"idle_session_timeout":                "0",
	"default_transaction_isolation":       "read committed",
	"default_transaction_read_only":       "off",
	"default_transaction_deferrable":      "off",
}

// Config reads a connection string (URL or keyword form, several hosts allowed) for a pool whose sessions have the
// [Canonical] settings and the given application_name.
func Config(dsn, app string) (*pgxpool.Config, error) {
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("connection string: %w", err)
	}
	canonical(&cfg.ConnConfig.Config, app)
	return cfg, nil
}

// ConnConfig is [Config] for a single connection.
func ConnConfig(dsn, app string) (*pgx.ConnConfig, error) {
	cfg, err := Config(dsn, app)
	if err != nil {
		return nil, err
	}
	return cfg.ConnConfig, nil
}

// ByIndex gives connections the settings for statements that look up small sets in large tables: rows are found by index only.
// A plan that scans one, made while it was still empty and kept by the connection, costs more with every row (measured:
// three times for merge, any factor for lookups). Parallel workers take longer to start (40 ms) than such a statement takes.
func ByIndex(cfg *pgx.ConnConfig) {
	maps.Copy(cfg.RuntimeParams, map[string]string{"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off",
		"plan_cache_mode": "force_generic_plan", "jit": "off", "max_parallel_workers_per_gather": "0"})
}

// ReplicationConfig is [Config] for a connection that speaks the replication protocol (CREATE_REPLICATION_SLOT,
// START_REPLICATION); its sessions have the same settings, so the change data's values are canonical.
func ReplicationConfig(dsn, app string) (*pgconn.Config, error) {
	cfg, err := ConnConfig(dsn, app)
	if err != nil {
		return nil, err
	}
	cfg.RuntimeParams["replication"] = "database"
	return &cfg.Config, nil
}

// Connect opens one connection with canonical settings.
func Connect(ctx context.Context, dsn, app string) (*pgx.Conn, error) {
	cfg, err := ConnConfig(dsn, app)
	if err != nil {
		return nil, err
	}
	return pgx.ConnectConfig(ctx, cfg)
}

func canonical(cfg *pgconn.Config, app string) {
	for k, v := range patient {
		if _, ok := cfg.RuntimeParams[k]; !ok {
			cfg.RuntimeParams[k] = v
		}
	}
	maps.Copy(cfg.RuntimeParams, Canonical)
	// lc_monetary is set after the start: a server that does not know the locale would refuse the whole connection.
	delete(cfg.RuntimeParams, "lc_monetary")
	if app != "" {
		cfg.RuntimeParams["application_name"] = app
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 15 * time.Second
	}
	cfg.DialFunc = dialer(cfg.ConnectTimeout).DialContext
	before := cfg.AfterConnect
	cfg.AfterConnect = func(ctx context.Context, c *pgconn.PgConn) error {
		if before != nil {
			if err := before(ctx, c); err != nil {
				return err
			}
		}
		return settle(ctx, c)
	}
}

// A peer that has gone without a word (a machine that is off, a firewall that forgot the connection) is noticed within half a
// minute, not after the quarter of an hour that TCP would take: by us, and by the server, whose locks are then free.
const (
	peerIdle     = 10 * time.Second
	peerInterval = 5 * time.Second
	peerProbes   = 3
	peerGone     = peerIdle + (peerProbes+1)*peerInterval // sent data that is not acknowledged
)

func dialer(timeout time.Duration) *net.Dialer {
	return &net.Dialer{Timeout: timeout, Control: limitUnacknowledged,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: peerIdle, Interval: peerInterval, Count: peerProbes}}
}

// settle sets the settings once more, by statement: a pooler in between may have swallowed the start parameters, and
// values written under other settings would corrupt data silently.
func settle(ctx context.Context, c *pgconn.PgConn) error {
	names := make([]string, 0, len(Canonical))
	for k := range Canonical {
		if k != "lc_monetary" && k != "client_encoding" {
			names = append(names, k)
		}
	}
	sort.Strings(names)
	var calls []string
	for _, k := range names {
		calls = append(calls, "pg_catalog.set_config("+Literal(k)+", "+Literal(Canonical[k])+", false)")
	}
	// The server's side of peerGone; without effect on Unix sockets.
	for k, v := range map[string]string{"tcp_keepalives_idle": seconds(peerIdle), "tcp_keepalives_interval": seconds(peerInterval), "tcp_keepalives_count": strconv.Itoa(peerProbes)} {
		calls = append(calls, "pg_catalog.set_config('"+k+"', '"+v+"', false)")
	}
	// What is acknowledged to the other side must be on disk here: a role's synchronous_commit = off would lose it.
	calls = append(calls, "CASE WHEN pg_catalog.current_setting('synchronous_commit') = 'off' THEN pg_catalog.set_config('synchronous_commit', 'on', false) END")
	if _, err := c.Exec(ctx, "SELECT "+strings.Join(calls, ", ")).ReadAll(); err != nil {
		return fmt.Errorf("canonical settings: %w", err)
	}
	// Matters to the type money only; a server without the locale keeps its own.
	_, err := c.Exec(ctx, "SET lc_monetary = "+Literal(Canonical["lc_monetary"])).ReadAll()
	if err != nil && !pgerr.Is(err, "22023", "42501", "42704") {
		return fmt.Errorf("canonical settings: %w", err)
	}
	return nil
}

func seconds(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }

// closeConn closes a connection without waiting for a dead server.
func closeConn(conn interface{ Close(context.Context) error }) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}
