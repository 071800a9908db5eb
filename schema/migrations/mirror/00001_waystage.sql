-- +goose Up
-- Waystage's own tables on the mirror. Mirror tables themselves keep the names that they have at the source;
-- their staging partitions are in schema waystage_staging.
CREATE SCHEMA IF NOT EXISTS waystage_staging;

-- Single values: epoch, source_system, mirror_system, copy (none|running|done), ...
CREATE TABLE waystage.meta (
    key   text PRIMARY KEY,
    value text NOT NULL
);

-- The synced tables, as read from the source's catalog. rank orders parents before children.
CREATE TABLE waystage.synced_table (
    id          int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    rank        int  NOT NULL DEFAULT 0,
    definition  jsonb NOT NULL,
    copied      boolean NOT NULL DEFAULT false,
    UNIQUE (schema_name, table_name)
);

-- Subscription definitions; the highest version is in force.
CREATE TABLE waystage.definition (
    version    int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    body       text NOT NULL,
    sha256     text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE waystage.app_user (
    name          text PRIMARY KEY,
    password_hash text NOT NULL,               -- argon2id, PHC string
    groups        text[] NOT NULL DEFAULT '{}',
    attributes    jsonb NOT NULL DEFAULT '{}',
    blocked       boolean NOT NULL DEFAULT false,
    created_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE waystage.device (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_name    text NOT NULL REFERENCES waystage.app_user ON DELETE CASCADE,
    name         text NOT NULL,
    public_key   text UNIQUE,                   -- NKEY of type user, how the device logs in; null: not enrolled
    blocked      boolean NOT NULL DEFAULT false,
    app          text NOT NULL DEFAULT '',
    enrolled_at  timestamptz,
    last_seen_at timestamptz,
    last_sync_at timestamptz,
    oldest_unsent_at timestamptz,
    UNIQUE (user_name, name)
);

-- One row per life of a device file (rule D4): the last session taken and the hash of its bytes.
CREATE TABLE waystage.incarnation (
    id         text PRIMARY KEY,
    device_id  bigint NOT NULL REFERENCES waystage.device ON DELETE CASCADE,
    last_n     bigint NOT NULL DEFAULT 0,
    last_hash  bytea,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON waystage.incarnation (device_id);

CREATE TABLE waystage.session (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id     bigint NOT NULL REFERENCES waystage.device ON DELETE CASCADE,
    user_name     text   NOT NULL,
    device_name   text   NOT NULL,
    token         text   NOT NULL,              -- session token of the subjects: incarnation-n
    incarnation   text   NOT NULL,
    n             bigint NOT NULL,
    hash          bytea  NOT NULL,
    nonce         text   NOT NULL,
    set_name      text   NOT NULL,
    cursor_from   text   NOT NULL DEFAULT '',
    epoch         text   NOT NULL DEFAULT '',   -- epoch of the base versions
    schema_hash   text   NOT NULL DEFAULT '',
    content_type  text   NOT NULL,
    encoding      text   NOT NULL,
    wait_source   boolean NOT NULL DEFAULT false,
    records       int    NOT NULL DEFAULT 0,
    state         text   NOT NULL DEFAULT 'staged' CHECK (state IN ('staged', 'merged', 'replied', 'closed')),
    received_at   timestamptz NOT NULL,
    staged_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    merged_at     timestamptz,
    replied_at    timestamptz,
    pages         int    NOT NULL DEFAULT 0,
    UNIQUE (incarnation, n)
) WITH (fillfactor = 80);
CREATE INDEX session_staged ON waystage.session (id) WHERE state = 'staged';
CREATE INDEX session_merged ON waystage.session (id) WHERE state = 'merged';
CREATE INDEX ON waystage.session (device_id, id);

-- Uploaded records between intake and merge, one partition per synced table (waystage_staging."schema.table");
-- the default partition takes records that name no known table. bad_code: refused already at intake.
CREATE TABLE waystage.staging (
    tbl        int    NOT NULL,                 -- waystage.synced_table.id, 0: unknown
    session_id bigint NOT NULL,
    idx        int    NOT NULL,                 -- position in the session's changes
    tname      text   NOT NULL,                 -- "schema.table" as the device named it
    op         text   NOT NULL,
    key        text[] NOT NULL,
    bver       bigint NOT NULL DEFAULT 0,       -- base version, 0: the device had no row
    base       jsonb,                           -- base image, {column: text or null}
    img        jsonb,                           -- insert: all sent columns; update: the changed columns; delete: null
    bad_code   text,
    bad_detail text
) PARTITION BY LIST (tbl);
CREATE TABLE waystage_staging.unknown PARTITION OF waystage.staging DEFAULT;
CREATE INDEX ON waystage.staging (session_id, idx);

-- The ledger: every uploaded record from its merge on. state merged = pending at the source (rule R1); the
-- insert of such a row is what the up capture publishes. A rejected record keeps what was sent (img), what it
-- was based on (base), what stood there (old) and who had written that (winner).
CREATE TABLE waystage.change (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session_id  bigint NOT NULL,
    idx         int    NOT NULL,
    device_id   bigint NOT NULL,
    incarnation text   NOT NULL,
    n           bigint NOT NULL,
    tbl         int    NOT NULL,
    tname       text   NOT NULL,
    op          text   NOT NULL,
    key         text[] NOT NULL,
    state       text   NOT NULL CHECK (state IN ('merged', 'applied', 'rejected', 'refused')),
    stamp       bigint NOT NULL,                -- mirror transaction that gave the state
    version     bigint NOT NULL DEFAULT 0,      -- version given to the row by the merge, 0 after a delete
    bver        bigint NOT NULL DEFAULT 0,
    base        jsonb,
    img         jsonb,
    old         jsonb,                          -- mirror row just before the merge, null: absent
    old_version bigint NOT NULL DEFAULT 0,
    old_lw      text,
    old_mver    bigint NOT NULL DEFAULT 0,
    code        text,
    detail      text,
    constraint_name text,
    winner      text,                           -- who wrote what stood there: 'source' or 'user/device'
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    decided_at  timestamptz,
    UNIQUE (session_id, idx)
) WITH (fillfactor = 80);
CREATE INDEX change_pending ON waystage.change (tbl, key, id) WHERE state = 'merged';
CREATE INDEX change_verdict ON waystage.change (device_id, stamp);
CREATE INDEX change_rejected ON waystage.change (id) WHERE state IN ('rejected', 'refused');

-- Rule R2: the source's image of a key while changes of it are pending. No row: the source still has the old
-- image of the key's first pending change.
CREATE TABLE waystage.base (
    tbl    int    NOT NULL,
    key    text[] NOT NULL,
    img    jsonb,                               -- null: absent at the source
    writer text   NOT NULL CHECK (writer IN ('initial', 'own', 'foreign')),
    lw     text,                                -- incarnation of the image's author; null: the source
    mver   bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (tbl, key)
);

-- Deleted keys, and rows that moved from one subset key value to another. Written by triggers of the mirror tables.
CREATE TABLE waystage.tombstone (
    tbl   int    NOT NULL,
    val   text,                                 -- value of the subset key column before; null: table without one
    key   text[] NOT NULL,
    stamp bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint
);
CREATE INDEX ON waystage.tombstone (tbl, val, stamp);
CREATE INDEX ON waystage.tombstone (stamp);

-- How far each direction's change data is applied; the chain that fences zombies (rules R3, R7).
CREATE TABLE waystage.progress (
    direction  text PRIMARY KEY CHECK (direction IN ('down', 'up')),
    position   pg_lsn NOT NULL,                 -- end of the last applied transaction of the captured server
    seq        bigint NOT NULL DEFAULT 0,       -- down: counts applied batches; up: the term, see apply.Up
    up_seq     bigint NOT NULL DEFAULT 0,       -- down only: last marker of the source's progress table that was seen
    rewind     boolean NOT NULL DEFAULT false,  -- the applier asks its capture to start again from position
    committed_at timestamptz,                   -- commit time of the last applied transaction, for the lag in seconds
    updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 20);

-- Cursor tokens that devices may hold: the confirmed one and those of replies on their way.
CREATE TABLE waystage.cursor (
    token      text PRIMARY KEY,
    device_id  bigint NOT NULL REFERENCES waystage.device ON DELETE CASCADE,
    incarnation text NOT NULL,
    set_name   text   NOT NULL,
    session_id bigint NOT NULL,
    since      bigint NOT NULL,                -- xmin of the snapshot that the reply was read in: rows from here on are news
    keysets    jsonb  NOT NULL DEFAULT '{}',    -- {"schema.table": keyset id}
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON waystage.cursor (device_id, set_name);

-- Key sets that replies were composed from, shared by all devices that have the same.
CREATE TABLE waystage.keyset (
    id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    hash bytea NOT NULL UNIQUE,
    keys text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- What the operator asked of each worker pool.
CREATE TABLE waystage.pool (
    stage      text PRIMARY KEY,
    size       int  NOT NULL CHECK (size BETWEEN 0 AND 256),
    mode       text NOT NULL DEFAULT 'run' CHECK (mode IN ('run', 'pause', 'drain')),
    changed_at timestamptz NOT NULL DEFAULT now()
);

-- The first value of a record that does not fit its column, and the database's words for it; nulls when all fit.
-- Used after a set statement failed, to find the records that made it fail: input functions, unlike casts, know
-- the column's length limit too.
-- +goose StatementBegin
CREATE FUNCTION waystage.bad_value(rel regclass, vals jsonb, OUT col text, OUT why text) LANGUAGE plpgsql STABLE AS $$
DECLARE
    doc text[];
    val text;
    typ regtype;
BEGIN
    SELECT coalesce(array_agg(a.attname), '{}') INTO doc FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = rel AND NOT a.attisdropped AND a.atttypid IN ('json'::regtype, 'jsonb'::regtype);
    BEGIN
        IF NOT vals ?| doc THEN
            EXECUTE format('SELECT jsonb_populate_record(NULL::%s, $1)', rel) USING vals;
            RETURN;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        NULL; -- which one it is, is looked for below
    END;
    FOR col, val, typ IN
        SELECT e.key, e.value, a.atttypid::regtype FROM jsonb_each_text(vals) e
        JOIN pg_catalog.pg_attribute a ON a.attrelid = rel AND a.attname = e.key AND NOT a.attisdropped
        ORDER BY a.attnum
    LOOP
        BEGIN
            IF col = ANY (doc) THEN
                EXECUTE format('SELECT $1::%s', typ) USING val;
            ELSE
                EXECUTE format('SELECT jsonb_populate_record(NULL::%s, $1)', rel) USING jsonb_build_object(col, val);
            END IF;
        EXCEPTION WHEN OTHERS THEN
            why := SQLERRM;
            RETURN;
        END;
    END LOOP;
    col := NULL;
END
$$;
-- +goose StatementEnd

-- +goose Down
DROP SCHEMA waystage_staging CASCADE;
