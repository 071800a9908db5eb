-- +goose Up
-- The only table that Waystage keeps at the source (rule R3): the up worker's fence, its position, and, because the
-- table is published, the marker that tells the down side which records a source transaction carried.
CREATE TABLE waystage.progress (
    epoch    text   PRIMARY KEY,                -- mirror epoch
    seq      bigint NOT NULL,                   -- chain: every transaction of the up worker adds one
    position pg_lsn NOT NULL,                   -- end of the last mirror transaction whose records are all decided
    carries  text   NOT NULL DEFAULT '',        -- ids of waystage.change rows that this transaction applied: "3-7,9"
    worker   text   NOT NULL DEFAULT '',
    at       timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 20);

-- +goose Down
DROP TABLE waystage.progress;
