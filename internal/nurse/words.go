package nurse

// The words that the data set is made of.
var (
	nurseNames = []string{
		"Amina", "Bruno", "Chiara", "David", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas",
		"Karima", "Lena", "Mateo", "Nadia", "Oskar", "Paula", "Quentin", "Rosa", "Samir", "Teresa",
		"Ursula", "Victor", "Wanda", "Xenia", "Yusuf", "Zoe", "Anton", "Beata", "Carlos", "Dina",
		"Emil", "Fatima", "Georg", "Hana", "Ivan", "Julia", "Kofi", "Laura", "Milan", "Noor",
		"Olga", "Pedro", "Rania", "Stefan", "Tanja", "Umar", "Vera", "Willem", "Yara", "Zeno",
		"Adele", "Boris", "Clara", "Dario", "Eva", "Felix", "Gita", "Henrik", "Irma", "Jakob",
	}
	firstNames = []string{
		"Ada", "Albert", "Alma", "André", "Anneliese", "Astrid", "Béatrice", "Benedict", "Björn", "Cécile",
		"Charlotte", "Conrad", "Dagny", "Dolores", "Edith", "Elias", "Émile", "Erika", "Eugène", "Fernando",
		"Frieda", "Gabriele", "Gerda", "Gustav", "Hedwig", "Helga", "Hiroshi", "Ilse", "Ingrid", "Irene",
		"Jürgen", "Kamala", "Karl", "Katharina", "Leopold", "Lieselotte", "Ludwig", "Magda", "Margarete", "Mário",
		"Mei", "Mohamed", "Nikolai", "Ottilie", "Otto", "Pål", "Rosalind", "Rúna", "Søren", "Theodora",
		"Tove", "Walter", "Wilhelmina", "Xóchitl", "Yolanda", "Zdeněk",
	}
	lastNames = []string{
		"Abbott", "Åkesson", "Almeida", "Baumann", "Bianchi", "Brandt", "Castillo", "Čapek", "Dubois", "Eriksen",
		"Fischer", "Fitzgerald", "Fontaine", "García", "Grimm", "Haddad", "Hartmann", "Holm", "Ivanova", "Jansen",
		"Jørgensen", "Keller", "Kowalski", "Larsson", "Lindqvist", "López", "Marino", "Meyer", "Moreau", "Müller",
		"Nakamura", "Ngata", "Novák", "O'Brien", "Okafor", "Papadopoulos", "Pereira", "Quist", "Ribeiro", "Rossi",
		"Sánchez", "Schäfer", "Schneider", "Silva", "Šimek", "Tanaka", "Tóth", "Van den Berg", "Weiß", "Yilmaz",
	}
	streets = []string{
		"Acorn Lane", "Bridge Street", "Castle Hill", "Church Road", "Elm Grove", "Garden Walk", "Harbour Street",
		"High Street", "Linden Avenue", "Market Square", "Mill Lane", "North Parade", "Orchard Close", "Park Road",
		"Quarry Way", "River Terrace", "School Lane", "Station Road", "Victoria Place", "Willow Crescent",
	}
	towns     = []string{"Ashford", "Birkdale", "Calder", "Dunmore", "Eastwick", "Fenwick", "Glenburn", "Harwood"}
	allergies = []string{"penicillin", "nuts", "latex", "pollen", "iodine", "wasp stings", "sulfonamides", "lactose"}
	positions = []string{"sitting", "lying", "standing"}
	moods     = []string{"cheerful", "tired", "calm", "worried", "talkative", "sleepy"}
	notes     = []string{
		"Feeling well, slept through the night.",
		"Complains of dizziness when getting up.",
		"Wound on the left shin is healing; dressing changed.",
		"Took the evening tablets too late; plan explained again.",
		"Daughter was there; talked about the new medication.",
		"Appetite is back. Drinks too little, reminded.",
		"Ankles swollen, legs raised, doctor informed.",
		"Short of breath on the stairs, recovers within a minute.",
		"Blood sugar before breakfast 6.1 mmol/l.",
		"Walked to the baker's and back without the frame!",
		"Asked for the visit to be an hour earlier.",
		"Injection site changed; no redness.\nNext change in three days.",
	}
	visitRemarks = []string{"Key is with the neighbour at number 4.", "Ring twice.", "Dog is friendly.", "Bring dressings.", "Blood sample needed."}
	substances   = []string{
		"Acetylsalicylic acid", "Amlodipine", "Atorvastatin", "Bisoprolol", "Candesartan", "Digoxin", "Enalapril", "Furosemide",
		"Glimepiride", "Hydrochlorothiazide", "Ibuprofen", "Insulin glargine", "Levothyroxine", "Metformin", "Morphine",
		"Nitrendipine", "Omeprazole", "Paracetamol", "Quetiapine", "Ramipril", "Salbutamol", "Tilidine", "Torasemide", "Vitamin D3", "Warfarin",
	}
	forms = []string{"tablet", "capsule", "drops", "injection", "ointment", "inhaler"}
	units = map[string]string{"tablet": "mg", "capsule": "mg", "drops": "mg/ml", "injection": "mg/ml", "ointment": "%", "inhaler": "µg"}
)
