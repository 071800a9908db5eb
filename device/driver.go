package device

import (
	"database/sql"
	"fmt"
	"net/url"

	_ "modernc.org/sqlite" // the default driver; Options.DB brings another
)

// openFile opens the file with the default driver: waiting for other writers, and with a write-ahead log so that
// readers are not blocked while a reply is applied.
func openFile(path string) (*sql.DB, error) {
	if path == "" {
		return nil, fmt.Errorf("device: no file name")
	}
	q := url.Values{"_pragma": {"busy_timeout(15000)", "journal_mode(WAL)", "synchronous(NORMAL)"}}
	u := url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: q.Encode()}
	db, err := sql.Open("sqlite", u.String())
	if err != nil {
		return nil, fmt.Errorf("device: %s: %w", path, err)
	}
	db.SetMaxOpenConns(8) // each connection has its own page cache
	return db, nil
}
