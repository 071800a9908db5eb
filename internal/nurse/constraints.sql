-- What is quicker to add when the tables are full.

ALTER TABLE vn.assignment
    ADD FOREIGN KEY (nurse_id) REFERENCES vn.nurse,
    ADD FOREIGN KEY (patient_id) REFERENCES vn.patient;
ALTER TABLE vn.prescription
    ADD FOREIGN KEY (patient_id) REFERENCES vn.patient,
    ADD FOREIGN KEY (medication) REFERENCES vn.medication;
ALTER TABLE vn.visit
    ADD FOREIGN KEY (patient_id) REFERENCES vn.patient,
    ADD FOREIGN KEY (nurse_id) REFERENCES vn.nurse;
ALTER TABLE vn.medical_record
    ADD FOREIGN KEY (patient_id) REFERENCES vn.patient,
    ADD FOREIGN KEY (nurse_id) REFERENCES vn.nurse;

CREATE INDEX ON vn.assignment (patient_id);
CREATE INDEX ON vn.visit (patient_id);
CREATE INDEX ON vn.medical_record (patient_id);

-- Each write of a record is stamped by the database, whatever the writer sends.
CREATE FUNCTION vn.stamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := clock_timestamp();
    RETURN NEW;
END $$;
CREATE TRIGGER stamp BEFORE INSERT OR UPDATE ON vn.medical_record
    FOR EACH ROW EXECUTE FUNCTION vn.stamp();

-- Names and telephone numbers are kept in one form, however they were typed.
CREATE FUNCTION vn.normalise() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.name := btrim(regexp_replace(NEW.name, '\s+', ' ', 'g'));
    NEW.phone := nullif(regexp_replace(NEW.phone, '[^+0-9]', '', 'g'), '');
    RETURN NEW;
END $$;
CREATE TRIGGER normalise BEFORE INSERT OR UPDATE OF name, phone ON vn.patient
    FOR EACH ROW EXECUTE FUNCTION vn.normalise();

ANALYZE vn.nurse, vn.patient, vn.assignment, vn.medication, vn.prescription, vn.visit, vn.medical_record;
