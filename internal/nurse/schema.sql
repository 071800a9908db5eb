-- The database of a home health care service: nurses visit the patients assigned to them and write down what they measure.
-- Types, constraints and triggers are those that real databases have, because they are what makes syncing hard.

CREATE SCHEMA vn;

CREATE TYPE vn.visit_state AS ENUM ('planned', 'under way', 'done', 'missed');
CREATE TYPE vn.form AS ENUM ('tablet', 'capsule', 'drops', 'injection', 'ointment', 'inhaler');

CREATE TABLE vn.nurse (
    id      integer     PRIMARY KEY,
    login   text        NOT NULL UNIQUE CHECK (login ~ '^[a-z0-9_-]{1,64}$'),
    name    text        NOT NULL,
    phone   text,
    hired   date        NOT NULL,
    active  boolean     NOT NULL DEFAULT true
);

CREATE TABLE vn.patient (
    id         bigint         PRIMARY KEY,
    insurance  uuid           NOT NULL UNIQUE,
    name       text           NOT NULL,
    born       date           NOT NULL CHECK (born BETWEEN '1900-01-01' AND '2100-01-01'),
    address    text           NOT NULL,
    phone      text           CHECK (phone ~ '^\+?[0-9]{4,20}$'),
    lives_alone boolean       NOT NULL DEFAULT false,
    allergies  jsonb          NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(allergies) = 'array'),
    balance    numeric(10,2)  NOT NULL DEFAULT 0,
    photo      bytea,
    remarks    text
);

CREATE TABLE vn.assignment (
    nurse_id    integer  NOT NULL,
    patient_id  bigint   NOT NULL,
    since       date     NOT NULL,
    PRIMARY KEY (nurse_id, patient_id)
);

CREATE TABLE vn.medication (
    code        text           PRIMARY KEY,
    name        text           NOT NULL,
    form        vn.form        NOT NULL,
    strength    numeric(8,3)   NOT NULL CHECK (strength > 0),
    unit        text           NOT NULL,
    controlled  boolean        NOT NULL DEFAULT false,
    leaflet     jsonb
);

CREATE TABLE vn.prescription (
    patient_id  bigint        NOT NULL,
    medication  text          NOT NULL,
    dose        numeric(8,3)  NOT NULL CHECK (dose > 0),
    per_day     integer       NOT NULL CHECK (per_day BETWEEN 1 AND 12),
    starts      date          NOT NULL,
    ends        date,
    PRIMARY KEY (patient_id, medication),
    CONSTRAINT ends_after_it_starts CHECK (ends >= starts)
);

CREATE TABLE vn.visit (
    id          uuid           PRIMARY KEY,
    patient_id  bigint         NOT NULL,
    nurse_id    integer        NOT NULL,
    planned     timestamptz    NOT NULL,
    state       vn.visit_state NOT NULL DEFAULT 'planned',
    minutes     integer        CHECK (minutes BETWEEN 0 AND 1440),
    mileage     numeric(6,1)   CHECK (mileage >= 0),
    remarks     text
);

CREATE TABLE vn.medical_record (
    id           uuid          PRIMARY KEY,
    patient_id   bigint        NOT NULL,
    nurse_id     integer       NOT NULL,
    taken        timestamptz   NOT NULL,
    systolic     integer,
    diastolic    integer,
    pulse        integer       CONSTRAINT pulse_possible CHECK (pulse BETWEEN 20 AND 300),
    temperature  numeric(4,1)  CONSTRAINT temperature_possible CHECK (temperature BETWEEN 25 AND 45),
    weight       numeric(5,2)  CONSTRAINT weight_possible CHECK (weight BETWEEN 0.5 AND 500),
    urgent       boolean       NOT NULL DEFAULT false,
    details      jsonb,
    signature    bytea,
    note         text,
    updated_at   timestamptz   NOT NULL DEFAULT now(),
    CONSTRAINT blood_pressure_possible CHECK (systolic BETWEEN 40 AND 300 AND diastolic BETWEEN 20 AND 200 AND diastolic < systolic)
);
