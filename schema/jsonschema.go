package schema

import _ "embed" // the published schema

//go:embed definitions.schema.json
var jsonSchema string

// JSONSchema is the published JSON Schema of definitions files (draft 2020-12), for editors. It says what can be said of the
// form; [ParseDefinitions] says the rest.
func JSONSchema() string { return jsonSchema }
