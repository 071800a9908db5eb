//go:build sabotage

package chaos

// buildTags of the server program: those of this test.
const buildTags = "sabotage"
