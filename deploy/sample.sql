-- A few rows for docker-compose.yml; `waystage demo` has the large data set.
INSERT INTO vn.nurse (id, login, name, phone, hired) VALUES
    (1, 'amina', 'Amina Abbott', '+49305550101', '2019-03-01'),
    (2, 'bruno', 'Bruno Castillo', '+49305550102', '2022-10-15');

INSERT INTO vn.patient (id, insurance, name, born, address, phone, lives_alone, allergies, balance) VALUES
    (100001, '5f0c1a52-3c5e-4a64-9a0b-6b1d6f1f0a01', 'Ilse Kowalski', '1941-05-17', '4 Mill Lane, Harwood', '+49305551001', true, '["penicillin"]', 12.50),
    (100002, '5f0c1a52-3c5e-4a64-9a0b-6b1d6f1f0a02', 'Gustav Holm', '1938-11-02', '81 Station Road, Calder', '+49305551002', false, '[]', 0),
    (100003, '5f0c1a52-3c5e-4a64-9a0b-6b1d6f1f0a03', 'Mei Tanaka', '1950-01-30', '17 River Terrace, Fenwick', '+49305551003', true, '["latex", "nuts"]', -3.20);

INSERT INTO vn.assignment (nurse_id, patient_id, since) VALUES
    (1, 100001, '2026-01-10'), (1, 100002, '2026-02-01'), (2, 100002, '2026-02-01'), (2, 100003, '2026-04-20');

INSERT INTO vn.medication (code, name, form, strength, unit) VALUES
    ('M001-1', 'Ramipril', 'tablet', 5, 'mg'), ('M002-1', 'Insulin glargine', 'injection', 100, 'IU/ml');

INSERT INTO vn.prescription (patient_id, medication, dose, per_day, starts) VALUES
    (100001, 'M001-1', 1, 1, '2026-03-01'), (100002, 'M002-1', 0.12, 2, '2026-05-12');

INSERT INTO vn.visit (id, patient_id, nurse_id, planned) VALUES
    ('0d9e2f1c-7b1a-4c59-8f55-2f1f5c1b0001', 100001, 1, '2026-09-02 08:30+02'),
    ('0d9e2f1c-7b1a-4c59-8f55-2f1f5c1b0002', 100002, 2, '2026-09-02 10:00+02');

INSERT INTO vn.medical_record (id, patient_id, nurse_id, taken, systolic, diastolic, pulse, temperature, weight, note) VALUES
    ('9b6f8a10-2d34-4e0f-b1c8-0c6f5a7e0001', 100001, 1, '2026-09-01 08:41+02', 142, 88, 74, 36.8, 61.30, 'Feeling well.'),
    ('9b6f8a10-2d34-4e0f-b1c8-0c6f5a7e0002', 100002, 2, '2026-09-01 10:12+02', 128, 79, 68, 36.5, 80.05, null),
    ('9b6f8a10-2d34-4e0f-b1c8-0c6f5a7e0003', 100003, 2, '2026-09-01 11:05+02', 151, 93, 81, 37.1, 55.70, 'Ankles swollen.');
