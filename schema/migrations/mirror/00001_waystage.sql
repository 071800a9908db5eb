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
    -- A stopped table: its changes are not applied, devices' records for it wait (see docs/schema-changes.md).
    stopped_code     text,                      -- null: it takes part
    stopped_detail   text NOT NULL DEFAULT '',
    stopped_at       timestamptz,
    stopped_position pg_lsn,                    -- the source's position that the mirror stood at
    floor            pg_lsn,                    -- a copy shows the source up to here: what the stream brings from before is passed over
    copying          boolean NOT NULL DEFAULT false, -- a new copy is under way: what comes after the floor goes to waystage.deferred
    emptied          boolean NOT NULL DEFAULT false, -- the source has truncated the table since the floor
    UNIQUE (schema_name, table_name)
);
INSERT INTO waystage.meta (key, value) VALUES ('layout', '1'); -- counts the changes of synced tables; workers reload when it moves

-- Versions of the subscription definitions; the highest is in force. Rows are only added: going back is a new version.
CREATE TABLE waystage.definition (
    version    int PRIMARY KEY,                 -- without gaps
    body       text NOT NULL,                   -- the file as written
    sha256     text NOT NULL,                   -- of the body, hex
    applied_at timestamptz NOT NULL DEFAULT now(),
    who        text NOT NULL DEFAULT '',        -- login that applied it; 'serve': taken from the file at the first start
    note       text NOT NULL DEFAULT ''
);

CREATE TABLE waystage.app_user (
    name          text PRIMARY KEY,
    password_hash text NOT NULL,               -- argon2id, PHC string; '!': none
    groups        text[] NOT NULL DEFAULT '{}' CHECK (cardinality(groups) <= 64),
    attributes    jsonb NOT NULL DEFAULT '{}'  -- {name: text}
        CHECK (jsonb_typeof(attributes) = 'object' AND jsonb_array_length(jsonb_path_query_array(attributes, '$.keyvalue()')) <= 64),
    blocked       boolean NOT NULL DEFAULT false,
    created_at    timestamptz NOT NULL DEFAULT now()
);

-- What applications say that they were built for, once for all devices that say the same.
CREATE TABLE waystage.built (
    hash    text PRIMARY KEY,                   -- SHA-256 of what was said, hex
    built   jsonb NOT NULL,                     -- protocol.Built: {"name": ..., "tables": [{"table": ..., "columns": [...]}]}
    told_at timestamptz NOT NULL DEFAULT now()  -- for the first time
);

CREATE TABLE waystage.device (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_name    text NOT NULL REFERENCES waystage.app_user ON DELETE CASCADE,
    name         text NOT NULL,
    public_key   text UNIQUE,                   -- NKEY of type user, how the device logs in; null: not enrolled
    key_at       timestamptz,                   -- since when it is that one
    next_key     text UNIQUE,                   -- takes its place with the first login by it
    new_key_asked_at timestamptz,               -- the operator wants another key; the device hears of it with its next sync
    blocked      boolean NOT NULL DEFAULT false,
    app          text NOT NULL DEFAULT '',
    library      text NOT NULL DEFAULT '',
    built        text REFERENCES waystage.built, -- what the application was built for, as it said last; null: everything
    enrolled_at  timestamptz,
    reset_at     timestamptz,                   -- incarnations from before do not go on
    removed_at   timestamptz,                   -- gone for everybody; kept until what it has sent has its verdict
    forks        int NOT NULL DEFAULT 0,        -- requests that did not continue their incarnation (rule D4): a restored or copied file
    forked_at    timestamptz,
    refused_at   timestamptz,                   -- last login in this device's name that was refused
    refused_code text NOT NULL DEFAULT '',
    refused_host text NOT NULL DEFAULT '',
    last_seen_at timestamptz,
    last_sync_at timestamptz,
    oldest_unsent_at timestamptz,
    verify_asked_at timestamptz,                -- the operator wants each of its sets verified that has not been since
    UNIQUE (user_name, name)
);

-- Enrolment tokens: each enrols one device once.
CREATE TABLE waystage.enrol_token (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    hash        bytea NOT NULL UNIQUE,          -- SHA-256; a token is random, so that no slow hash is needed
    user_name   text NOT NULL REFERENCES waystage.app_user ON DELETE CASCADE,
    device_name text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by  text NOT NULL DEFAULT '',
    expires_at  timestamptz NOT NULL,
    revoked_at  timestamptz,
    used_at     timestamptz,
    used_key    text                            -- the key that it enrolled: whoever lost the answer may ask again with the same
);
CREATE INDEX ON waystage.enrol_token (user_name, device_name);

-- What a device found when it last compared a set with the mirror.
CREATE TABLE waystage.device_check (
    device_id  bigint NOT NULL REFERENCES waystage.device ON DELETE CASCADE,
    set_name   text   NOT NULL,
    session_id bigint NOT NULL,                 -- that told it
    cursor     text   NOT NULL,                 -- of the reply that was verified
    checked_at timestamptz NOT NULL,            -- by the device's clock
    told_at    timestamptz NOT NULL,
    rows       bigint NOT NULL,
    different  bigint NOT NULL,
    repaired   bigint NOT NULL,
    more       boolean NOT NULL,
    sample     jsonb  NOT NULL,                 -- [{table, key, kind, columns}]
    PRIMARY KEY (device_id, set_name)
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
    judged_by     bigint NOT NULL DEFAULT 0,    -- layout whose definitions intake judged the records by
    content_type  text   NOT NULL,
    encoding      text   NOT NULL,
    wait_source   boolean NOT NULL DEFAULT false,
    new_key       boolean NOT NULL DEFAULT false, -- the reply asks for another key
    records       int    NOT NULL DEFAULT 0,
    state         text   NOT NULL DEFAULT 'staged' CHECK (state IN ('staged', 'merged', 'replied', 'closed')),
    received_at   timestamptz NOT NULL,
    staged_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    merged_at     timestamptz,
    replied_at    timestamptz,
    told          pg_snapshot,                  -- what the reply's snapshot saw: verdicts whose stamp is in it were told
    closed_at     timestamptz,                  -- when the device said, or showed, that it has applied the reply
    pages         int    NOT NULL DEFAULT 0,
    verify        jsonb,                        -- what is to be verified in the reply; null: the device knows of no verification
    files         jsonb,                        -- what the device says of files; null: it knows of none
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
    unit       bigint NOT NULL DEFAULT 0,       -- atomic unit in the session (rule R8), as the device numbered it; -1: its unnumbered records; 0: none
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
    -- The catalogue of reasons is closed: docs/rejects.md has them all.
    code        text CHECK (code IN ('stale_version', 'row_deleted', 'row_exists', 'unknown_table', 'unknown_column', 'invalid_value', 'missing_key',
        'key_change', 'not_subscribed', 'operation_not_allowed', 'duplicate_row', 'row_too_big', 'invalid_record',
        'source_constraint', 'source_trigger', 'source_conflict', 'source_value', 'source_permission', 'dependency_rejected', 'transaction_rejected', 'schema_changed', 'epoch',
        'source_wins', 'function_refused', 'function_failed')),
    detail      text,
    constraint_name text,
    winner      text,                           -- rejected, or resolved: who wrote what stood there, 'source' or 'user/device'
    unit        bigint NOT NULL DEFAULT 0,      -- as in staging: records of a session with the same unit other than 0 have one fate
    -- Conflict policies (docs/conflicts.md). policy: what counts for the record, {policy, function, key: the subset key column}; null: reject.
    -- resolved: what it did, {merge: {policy, sent: the device's image where img is another}, source: {policy, stood, wrote}}; null: nothing.
    policy      jsonb,
    resolved    jsonb,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    decided_at  timestamptz,
    source_end  pg_lsn,                         -- applied: end of the source's transaction that has it
    source_at   timestamptz,                    -- and when that was committed there
    UNIQUE (session_id, idx)
) WITH (fillfactor = 80);
CREATE INDEX change_pending ON waystage.change (tbl, key, id) WHERE state = 'merged';
CREATE INDEX change_verdict ON waystage.change (device_id, stamp);
CREATE INDEX change_rejected ON waystage.change (id) WHERE state IN ('rejected', 'refused');
CREATE INDEX change_rejected_stamp ON waystage.change (stamp) WHERE state IN ('rejected', 'refused');

-- What operators did about rejected records. A retry names the record that it became: session and place in it.
CREATE TABLE waystage.reject_action (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    record     bigint NOT NULL REFERENCES waystage.change ON DELETE CASCADE,
    actor      text   NOT NULL,
    action     text   NOT NULL CHECK (action IN ('retry', 'discard')),
    note       text   NOT NULL DEFAULT '',
    session_id bigint,
    idx        int,
    at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((action = 'retry') = (session_id IS NOT NULL AND idx IS NOT NULL))
);
CREATE INDEX ON waystage.reject_action (record, id);
CREATE INDEX ON waystage.reject_action (session_id, idx);

-- The log of rejected records as operators see it. status: retried while the last retry stands (on its way or applied), discarded
-- while the last action says so, settled when the conflict policy dropped it, superseded when the record is itself a retry, or when the same device has since got through
-- a change of the same row and columns; else open.
CREATE VIEW waystage.reject AS
SELECT c.id, c.decided_at AS at, coalesce(d.user_name, '') AS user_name, coalesce(d.name, '') AS device_name,
    c.incarnation || '-' || c.n AS token, c.session_id, c.idx, c.tbl, c.tname, c.key, c.op, c.state, c.stamp,
    coalesce(c.code, '') AS code, coalesce(c.detail, '') AS detail, coalesce(c.constraint_name, '') AS constraint_name,
    coalesce(c.winner, '') AS winner, c.base, c.img, c.old, c.unit,
    CASE
        WHEN EXISTS (SELECT FROM waystage.reject_action a WHERE a.session_id = c.session_id AND a.idx = c.idx) THEN 'superseded'
        WHEN last.action = 'discard' THEN 'discarded'
        WHEN last.action = 'retry' AND coalesce(r.state, 'staged') NOT IN ('rejected', 'refused') THEN 'retried'
        WHEN EXISTS (SELECT FROM waystage.change l WHERE l.device_id = c.device_id AND l.stamp > c.stamp AND l.id > c.id
            AND l.tbl = c.tbl AND l.key = c.key AND l.state IN ('merged', 'applied')
            AND (l.op = 'D' OR c.op <> 'D' AND l.img ?& ARRAY(SELECT jsonb_object_keys(c.img)))) THEN 'superseded'
        WHEN c.code = 'source_wins' THEN 'settled'
        ELSE 'open'
    END AS status
FROM waystage.change c
LEFT JOIN waystage.device d ON d.id = c.device_id
LEFT JOIN LATERAL (SELECT a.action, a.session_id, a.idx FROM waystage.reject_action a WHERE a.record = c.id ORDER BY a.id DESC LIMIT 1) last ON true
LEFT JOIN waystage.change r ON r.session_id = last.session_id AND r.idx = last.idx
WHERE c.state IN ('rejected', 'refused');

-- Requests that were refused as a whole, of which nothing was staged: the last refusal of each session.
CREATE TABLE waystage.refusal (
    user_name   text NOT NULL,
    device_name text NOT NULL,
    token       text NOT NULL,
    code        text NOT NULL,
    message     text NOT NULL,
    received_at timestamptz NOT NULL,
    refused_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    times       int  NOT NULL DEFAULT 1,
    PRIMARY KEY (user_name, device_name, token)
);
CREATE INDEX ON waystage.refusal (refused_at);

-- Rule R2: the source's image of a key while changes of it are pending. No row: the source still has the old
-- image of the key's first pending change.
CREATE TABLE waystage.base (
    tbl    int    NOT NULL,
    key    text[] NOT NULL,
    img    jsonb,                               -- null: absent at the source
    writer text   NOT NULL CHECK (writer IN ('initial', 'own', 'foreign')),
    lw     text,                                -- incarnation of the image's author; null: the source
    mver   bigint NOT NULL DEFAULT 0,
    refused boolean NOT NULL DEFAULT false,     -- a change of the key was refused: those pending are on top of it, and fall too
    PRIMARY KEY (tbl, key)
);

-- Merged records that wait because their table, or one that they depend on, is stopped. The up worker passes them and
-- takes them up again, in the order of their ids, when the table goes on.
CREATE TABLE waystage.parked (
    change_id bigint PRIMARY KEY,
    tbl       int NOT NULL
);

-- Changes of the source to a stopped table since the copy under way: the last image of each key. A column that is
-- not in img did not change (an out-of-line value).
CREATE TABLE waystage.deferred (
    tbl      int    NOT NULL,
    key      text[] NOT NULL,
    img      jsonb,                             -- null: deleted
    others  boolean NOT NULL,                  -- somebody else than the up worker wrote it
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
    committed_at timestamptz,                   -- commit time of the transaction that ends at position; null: not known
    system     text   NOT NULL DEFAULT '',      -- system identifier of the captured server, which position belongs to
    timeline   int    NOT NULL DEFAULT 0,       -- and its timeline; written by capture, which checks both
    updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 20);

-- Why a part of the pipeline stands still until a person acts; taken back when it works again.
CREATE TABLE waystage.trouble (
    part    text PRIMARY KEY,                   -- stage: capture-down, apply-up ...
    code    text NOT NULL,
    detail  text NOT NULL,
    remedy  text NOT NULL,
    process text NOT NULL,                      -- who found it last
    since   timestamptz NOT NULL DEFAULT clock_timestamp(),
    at      timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Cursor tokens that devices may hold: the confirmed one and those of replies on their way.
CREATE TABLE waystage.cursor (
    token      text PRIMARY KEY,
    device_id  bigint NOT NULL REFERENCES waystage.device ON DELETE CASCADE,
    incarnation text NOT NULL,
    set_name   text   NOT NULL,
    session_id bigint NOT NULL,
    since      bigint NOT NULL,                -- xmin of the snapshot that the reply was read in: rows from here on are news
    refresh    bigint NOT NULL DEFAULT 0,      -- the last order of waystage.refresh that the device has been sent everything for
    keysets    jsonb  NOT NULL DEFAULT '{}',    -- {"schema.table": keyset id}
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON waystage.cursor (device_id, set_name);

-- Orders to send everything anew, as operators gave them. One is in force for a device and set while the cursor that a
-- request begins with is of before: nothing else says whether it was carried out.
CREATE TABLE waystage.refresh (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- given under a lock: a higher one was committed later
    device_id    bigint REFERENCES waystage.device ON DELETE CASCADE,   -- null: all devices
    user_name    text REFERENCES waystage.app_user ON DELETE CASCADE,   -- null: of all users
    sets         text[],                       -- null: all sets
    subscription text NOT NULL DEFAULT '',     -- that the operator named, for the record
    who          text NOT NULL,
    note         text NOT NULL DEFAULT '',
    asked_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Key sets that replies were composed from, shared by all devices that have the same.
CREATE TABLE waystage.keyset (
    id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    hash bytea NOT NULL UNIQUE,
    keys text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Contents of files, by their hash. The bytes are in the queue's store, cut into chunks, each under its own hash; what is
-- true of a file is here.
CREATE TABLE waystage.blob (
    sha256    bytea PRIMARY KEY CHECK (length(sha256) = 32),
    size      bigint NOT NULL,
    chunks    bytea[] NOT NULL,                 -- hashes of the chunks, in order
    stored_at timestamptz NOT NULL DEFAULT now(), -- last time that somebody wanted it
    lost_at   timestamptz                       -- a chunk of it was not in the store; null: not known to be lost
);
CREATE INDEX blob_lost ON waystage.blob (sha256) WHERE lost_at IS NOT NULL;

-- Files as they are. A removed one leaves its path, until no cursor needs to hear of it.
CREATE TABLE waystage.file (
    path         text COLLATE "C" PRIMARY KEY,
    version      bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    sha256       bytea REFERENCES waystage.blob, -- null: removed
    size         bigint NOT NULL DEFAULT 0,
    content_type text NOT NULL DEFAULT '',
    published_at timestamptz NOT NULL DEFAULT now(),
    published_by text NOT NULL DEFAULT '',      -- 'user/device', or who ran the command
    origin       text NOT NULL DEFAULT '' CHECK (origin IN ('', 'directory', 'device')),
    device_id    bigint                         -- origin device: which
);
CREATE INDEX ON waystage.file (version);
CREATE INDEX ON waystage.file (sha256) WHERE sha256 IS NOT NULL;
CREATE INDEX ON waystage.file (published_by) WHERE origin = 'device';

-- Contents that a path had before, and may be on their way to devices: fetched under the rules of the path until the grace
-- time is over. Those of a removed file are not here.
CREATE TABLE waystage.file_before (
    path        text COLLATE "C" NOT NULL REFERENCES waystage.file ON DELETE CASCADE,
    sha256      bytea NOT NULL REFERENCES waystage.blob,
    replaced_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (sha256, path)
);
CREATE INDEX ON waystage.file_before (path);

-- Changes of files by devices, from the offer to the outcome, and its receipt.
CREATE TABLE waystage.upload (
    device_id    bigint NOT NULL REFERENCES waystage.device ON DELETE CASCADE,
    id           text   NOT NULL,               -- drawn by the device
    path         text   COLLATE "C" NOT NULL,
    op           text   NOT NULL CHECK (op IN ('put', 'rm')),
    base         bytea,                         -- content that the change was made on; null: there was no such file
    sha256       bytea,
    size         bigint NOT NULL DEFAULT 0,
    content_type text   NOT NULL DEFAULT '',
    chunks       bytea[] NOT NULL DEFAULT '{}', -- hashes of those that are in the store; null: not yet
    state        text   NOT NULL CHECK (state IN ('receiving', 'stored', 'applied', 'rejected')),
    code         text   CHECK (code IN ('stale_version', 'row_deleted', 'row_exists', 'not_subscribed', 'operation_not_allowed', 'file_too_big', 'file_quota', 'file_content')),
    detail       text,
    right_sha256 bytea,                         -- rejected: what stood there
    version      bigint NOT NULL DEFAULT 0,     -- applied: that the file has by it
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    touched_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    decided_at   timestamptz,
    PRIMARY KEY (device_id, id)
);
CREATE INDEX upload_open ON waystage.upload (touched_at) WHERE state IN ('receiving', 'stored');
CREATE INDEX ON waystage.upload (decided_at) WHERE decided_at IS NOT NULL;

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
