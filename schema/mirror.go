package schema

// ReaderRole is the role as which rows queries are evaluated: it may read the mirror tables and nothing else.
const ReaderRole = "waystage_reader"
