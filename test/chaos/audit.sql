-- The witness: every write of a row, in the order of the row's writes (whoever writes a row holds its lock).
CREATE SCHEMA audit;
CREATE TABLE audit.entry (
    id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    xid   bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    tbl   text NOT NULL,
    op    text NOT NULL,
    key   text[] NOT NULL,
    old   jsonb,
    new   jsonb,
    depth int NOT NULL DEFAULT pg_trigger_depth() -- 1: a statement of the transaction itself; more: a trigger or a cascade
);
CREATE TABLE audit.marker (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint, seq bigint, carries text, worker text);

CREATE FUNCTION audit.log() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    before jsonb;
    after  jsonb;
    was    text[];
    is_    text[];
BEGIN
    IF TG_OP <> 'INSERT' THEN
        before := to_jsonb(OLD);
        was := ARRAY(SELECT before ->> k FROM unnest(TG_ARGV) WITH ORDINALITY AS a(k, n) ORDER BY n);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        after := to_jsonb(NEW);
        is_ := ARRAY(SELECT after ->> k FROM unnest(TG_ARGV) WITH ORDINALITY AS a(k, n) ORDER BY n);
    END IF;
    IF was IS NOT NULL AND is_ IS NOT NULL AND was <> is_ THEN
        INSERT INTO audit.entry (tbl, op, key, old) VALUES (TG_TABLE_NAME, 'D', was, before);
        INSERT INTO audit.entry (tbl, op, key, new) VALUES (TG_TABLE_NAME, 'I', is_, after);
    ELSE
        INSERT INTO audit.entry (tbl, op, key, old, new) VALUES (TG_TABLE_NAME, left(TG_OP, 1), coalesce(is_, was), before, after);
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION audit.mark() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit.marker (seq, carries, worker) VALUES (NEW.seq, NEW.carries, NEW.worker);
    RETURN NULL;
END $$;
CREATE TRIGGER aa_audit AFTER INSERT OR UPDATE OR DELETE ON c.area FOR EACH ROW EXECUTE FUNCTION audit.log('id');
CREATE TRIGGER aa_audit AFTER INSERT OR UPDATE OR DELETE ON c.item FOR EACH ROW EXECUTE FUNCTION audit.log('id');
CREATE TRIGGER aa_audit AFTER INSERT OR UPDATE OR DELETE ON c.line FOR EACH ROW EXECUTE FUNCTION audit.log('item_id', 'pos');
CREATE TRIGGER aa_audit AFTER INSERT OR UPDATE OR DELETE ON c.memo FOR EACH ROW EXECUTE FUNCTION audit.log('area_id', 'title');
