-- A source made for conflicts: few rows, triggers of every kind, constraints, cascades, composite keys.
CREATE SCHEMA c;
CREATE SEQUENCE c.rev; -- every write of a row with column rev gets the next number

-- Who sees what: a user has the areas that he owns or helps in. Pot and purses of an area sum up to 1000, always.
CREATE TABLE c.area (id int PRIMARY KEY, owner text NOT NULL, helper text NOT NULL DEFAULT '', pot bigint NOT NULL);
CREATE TABLE c.purse (id int PRIMARY KEY, area_id int NOT NULL REFERENCES c.area, amount bigint NOT NULL);
CREATE TABLE c.tally (area_id int PRIMARY KEY REFERENCES c.area, writes bigint NOT NULL DEFAULT 0); -- kept by a deferred trigger

CREATE TABLE c.item (
    id         int PRIMARY KEY,
    area_id    int NOT NULL REFERENCES c.area,
    name       text NOT NULL,
    qty        int NOT NULL DEFAULT 0 CONSTRAINT qty_possible CHECK (qty BETWEEN 0 AND 100),
    code       text CONSTRAINT one_code UNIQUE,
    lines      int NOT NULL DEFAULT 0,                  -- kept by a trigger of c.line
    tag        text NOT NULL,                           -- who wrote the row, every writing its own
    updated_at timestamptz NOT NULL DEFAULT now(),
    rev        bigint NOT NULL DEFAULT 0
);
CREATE TABLE c.line (
    item_id int NOT NULL REFERENCES c.item ON DELETE CASCADE,
    pos     text NOT NULL,
    area_id int NOT NULL,
    note    text,
    amount  numeric(10,2) NOT NULL DEFAULT 0 CONSTRAINT amount_possible CHECK (amount >= 0),
    tag     text NOT NULL,
    rev     bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (item_id, pos)
);
-- Without triggers: what is compared must be the very image.
CREATE TABLE c.memo (
    area_id int NOT NULL,
    title   text NOT NULL,
    body    text,
    weight  numeric,
    tag     text NOT NULL,
    PRIMARY KEY (area_id, title)
);

CREATE FUNCTION c.normal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.name := lower(btrim(NEW.name));
    NEW.updated_at := clock_timestamp();
    NEW.rev := nextval('c.rev');
    RETURN NEW;
END $$;
CREATE TRIGGER normal BEFORE INSERT OR UPDATE ON c.item FOR EACH ROW EXECUTE FUNCTION c.normal();

CREATE FUNCTION c.follow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.area_id := coalesce((SELECT area_id FROM c.item WHERE id = NEW.item_id), NEW.area_id);
    NEW.rev := nextval('c.rev');
    RETURN NEW;
END $$;
CREATE TRIGGER follow BEFORE INSERT OR UPDATE ON c.line FOR EACH ROW EXECUTE FUNCTION c.follow();

CREATE FUNCTION c.count() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        UPDATE c.item SET lines = lines + 1 WHERE id = NEW.item_id;
    ELSE
        UPDATE c.item SET lines = lines - 1 WHERE id = OLD.item_id;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER count AFTER INSERT OR DELETE ON c.line FOR EACH ROW EXECUTE FUNCTION c.count();

CREATE FUNCTION c.move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE c.line SET area_id = NEW.area_id WHERE item_id = NEW.id;
    RETURN NULL;
END $$;
CREATE TRIGGER move AFTER UPDATE OF area_id ON c.item FOR EACH ROW WHEN (OLD.area_id <> NEW.area_id) EXECUTE FUNCTION c.move();

-- At the end of the transaction: one refuses, one writes another row.
CREATE FUNCTION c.late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.name LIKE 'late%' THEN
        RAISE EXCEPTION 'item % is late', NEW.id;
    END IF;
    UPDATE c.tally SET writes = writes + 1 WHERE area_id = NEW.area_id;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT OR UPDATE OF name, qty, tag ON c.item DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION c.late();

INSERT INTO c.area VALUES (1, 'ada', 'ben', 700), (2, 'ada', '', 700), (3, 'ben', 'ada', 700), (4, 'ben', '', 700), (5, 'nobody', '', 700), (6, 'nobody', '', 700);
INSERT INTO c.tally SELECT id FROM c.area;
INSERT INTO c.purse SELECT a.id * 10 + k, a.id, 100 FROM c.area a, generate_series(1, 3) AS k;
INSERT INTO c.item (id, area_id, name, qty, code, tag) SELECT a.id * 100 + k, a.id, 'item ' || a.id || k, 1, 'code-' || a.id || k, 'first' FROM c.area a, generate_series(1, 4) AS k;
INSERT INTO c.line (item_id, pos, area_id, note, amount, tag) SELECT i.id, 'pos ' || k, i.area_id, 'line', 1, 'first' FROM c.item i, generate_series(1, 2) AS k;
INSERT INTO c.memo SELECT a.id, 'Memo ' || k, 'written', 1.0, 'first' FROM c.area a, generate_series(1, 3) AS k;
