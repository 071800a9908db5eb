package nurse

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"
)

// today is the day on which the data set was written down.
var today = time.Date(2026, 9, 1, 0, 0, 0, 0, time.UTC)

const visitsPerPatient = 2

// contents lists the tables in an order in which foreign keys hold.
func contents(size Size) []table {
	catalogue := medications()
	people := Nurses(size.Nurses)
	return []table{
		{"nurse", size.Nurses, func(i int) []string { return nurseRow(people[i]) }},
		{"patient", size.Patients, patientRow},
		{"assignment", size.Patients + (size.Patients+3)/4, func(i int) []string { return assignmentRow(i, size) }},
		{"medication", len(catalogue), func(i int) []string { return catalogue[i] }},
		{"prescription", 2 * size.Patients, func(i int) []string { return prescriptionRow(i, catalogue) }},
		{"visit", visitsPerPatient * size.Patients, func(i int) []string { return visitRow(i, size) }},
		{"medical_record", size.Records, func(i int) []string { return recordRow(i, size) }},
	}
}

// dice makes one row's own random numbers, so that a row does not depend on how many there are.
func dice(table, i int) *rand.Rand { return rand.New(rand.NewPCG(uint64(table), uint64(i))) }

func pick(r *rand.Rand, list []string) string { return list[r.IntN(len(list))] }

func uuid(r *rand.Rand) string {
	hi, lo := r.Uint64(), r.Uint64()
	hi = hi&^0xf000 | 0x4000           // version 4
	lo = lo&^(0x3<<62) | uint64(2)<<62 // variant 10
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", hi>>32, hi>>16&0xffff, hi&0xffff, lo>>48, lo&0xffffffffffff)
}

func bytesHex(r *rand.Rand, n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return fmt.Sprintf(`\x%x`, b)
}

func date(t time.Time) string      { return t.Format(time.DateOnly) }
func timestamp(t time.Time) string { return t.Format("2006-01-02 15:04:05.999999-07") }

func phone(r *rand.Rand) string { return fmt.Sprintf("+4930%07d", r.IntN(10_000_000)) }

func yes(r *rand.Rand, percent int) string { return strconv.FormatBool(r.IntN(100) < percent) }

// primary is the nurse who looks after patient i; every fourth patient has the next nurse too.
func primary(i int, size Size) int { return i%size.Nurses + 1 }

func second(i int, size Size) int { return (i+1)%size.Nurses + 1 }

func nurseRow(p Person) []string {
	r := dice(1, p.ID)
	return []string{strconv.Itoa(p.ID), p.Login, p.Name, phone(r), date(today.AddDate(0, 0, -r.IntN(20*365))), "true"}
}

func patientRow(i int) []string {
	r := dice(2, i)
	list := "["
	for j := range r.IntN(3) {
		if j > 0 {
			list += ", "
		}
		list += strconv.Quote(allergies[(i+j*3)%len(allergies)])
	}
	photo, remarks := null, null
	if r.IntN(3) == 0 {
		photo = bytesHex(r, 100+r.IntN(200))
	}
	if r.IntN(5) == 0 {
		remarks = "Prefers " + pick(r, []string{"mornings", "afternoons", "the same nurse each time"}) + "."
	}
	return []string{
		strconv.Itoa(FirstPatient + i), uuid(r), pick(r, firstNames) + " " + pick(r, lastNames),
		date(today.AddDate(-60-r.IntN(38), 0, -r.IntN(365))),
		fmt.Sprintf("%d %s, %s", 1+r.IntN(180), pick(r, streets), pick(r, towns)),
		phone(r), yes(r, 40), list + "]", fmt.Sprintf("%d.%02d", r.IntN(900)-200, r.IntN(100)), photo, remarks,
	}
}

func assignmentRow(i int, size Size) []string {
	r := dice(3, i)
	patient, nurse := i, 0
	if i < size.Patients {
		nurse = primary(patient, size)
	} else {
		patient = (i - size.Patients) * 4
		nurse = second(patient, size)
	}
	return []string{strconv.Itoa(nurse), strconv.Itoa(FirstPatient + patient), date(today.AddDate(0, 0, -r.IntN(3*365)))}
}

// medications is the catalogue: each substance in three strengths.
func medications() [][]string {
	var rows [][]string
	for i, s := range substances {
		form := forms[i%len(forms)]
		for j, factor := range []float64{1, 2.5, 10} {
			r := dice(4, i*10+j)
			leaflet := null
			if j == 0 {
				leaflet = fmt.Sprintf(`{"with_meal": %s, "max_per_day": %d, "warnings": ["%s"]}`, yes(r, 50), 1+r.IntN(6), pick(r, []string{"drowsiness", "no alcohol", "keep cool"}))
			}
			strength := strconv.FormatFloat(factor*float64(1+i%5)/2, 'f', 3, 64)
			controlled := strconv.FormatBool(s == "Morphine" || s == "Tilidine")
			rows = append(rows, []string{fmt.Sprintf("M%03d-%d", i+1, j+1), s, form, strength, units[form], controlled, leaflet})
		}
	}
	return rows
}

func prescriptionRow(i int, catalogue [][]string) []string {
	r := dice(5, i)
	patient := i / 2
	medication := catalogue[(patient*5+i%2*37)%len(catalogue)][0] // 37: the patient's two always differ
	starts := today.AddDate(0, 0, -r.IntN(400))
	ends := null
	if r.IntN(3) == 0 {
		ends = date(starts.AddDate(0, 0, 7+r.IntN(200)))
	}
	return []string{strconv.Itoa(FirstPatient + patient), medication, fmt.Sprintf("%d.%03d", 1+r.IntN(3), 500*r.IntN(2)),
		strconv.Itoa(1 + r.IntN(4)), date(starts), ends}
}

func visitRow(i int, size Size) []string {
	r := dice(6, i)
	patient := i / visitsPerPatient
	planned := today.Add(time.Duration(r.IntN(14*24*4)-7*24*4) * 15 * time.Minute)
	state, minutes, mileage, remarks := "planned", null, null, null
	if planned.Before(today) {
		state, minutes, mileage = "done", strconv.Itoa(10+r.IntN(50)), fmt.Sprintf("%d.%d", r.IntN(40), r.IntN(10))
		if r.IntN(20) == 0 {
			state, minutes, mileage = "missed", null, null
		}
	}
	if r.IntN(4) == 0 {
		remarks = pick(r, visitRemarks)
	}
	return []string{uuid(r), strconv.Itoa(FirstPatient + patient), strconv.Itoa(primary(patient, size)), timestamp(planned), state, minutes, mileage, remarks}
}

func recordRow(i int, size Size) []string {
	r := dice(7, i)
	patient := i % size.Patients
	usual := dice(8, patient) // what is usual for this patient
	systolic := 110 + usual.IntN(45) + r.IntN(20)
	diastolic := 62 + usual.IntN(20) + r.IntN(12)
	weight := 4800 + usual.IntN(5500) + r.IntN(200)
	taken := today.Add(-time.Duration(i/size.Patients)*7*24*time.Hour - time.Duration(r.IntN(7*24*60))*time.Minute - time.Duration(r.IntN(1_000_000))*time.Microsecond)
	details, signature, note := null, null, null
	if r.IntN(2) == 0 {
		details = fmt.Sprintf(`{"spo2": %d, "pain": %d, "position": "%s", "mood": "%s"}`, 92+r.IntN(8), r.IntN(8), pick(r, positions), pick(r, moods))
	}
	if r.IntN(4) == 0 {
		signature = bytesHex(r, 24+r.IntN(40))
	}
	if r.IntN(3) != 0 {
		note = pick(r, notes)
	}
	return []string{
		uuid(r), strconv.Itoa(FirstPatient + patient), strconv.Itoa(primary(patient, size)), timestamp(taken),
		strconv.Itoa(systolic), strconv.Itoa(diastolic), strconv.Itoa(55 + r.IntN(45)),
		fmt.Sprintf("%d.%d", 36+r.IntN(2), r.IntN(10)), fmt.Sprintf("%d.%02d", weight/100, weight%100),
		yes(r, 3), details, signature, note, timestamp(taken.Add(5 * time.Minute)),
	}
}
