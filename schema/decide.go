package schema

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

var functionName = regexp.MustCompile(`^[^\s.()"';]{1,63}\.[^\s.()"';]{1,63}$`)

// conflict reads a subscription's conflict policy: a word, or a mapping with the one key function.
func (p *parser) conflict(s *Subscription, v *yaml.Node) {
	words := []string{string(ConflictReject), string(ConflictColumns), string(ConflictLastWriter), string(ConflictSource)}
	const mapping = "function: schema.name, indented, on a line of its own"
	if v.Kind == yaml.MappingNode {
		s.Conflict = ConflictFunction
		p.mapping(v, "conflict", []string{"function"}, func(_ string, _, v *yaml.Node) {
			s.Function = p.scalar(v, "the full name of an SQL function of the mirror, schema.name")
			s.places["function"] = at(v)
			if s.Function != "" && !functionName.MatchString(s.Function) {
				p.bad(v, fmt.Sprintf("%q is not the full name of a function", s.Function), "write schema.name, without quotes and arguments")
			}
			if name, _, _ := strings.Cut(s.Function, "."); name == "waystage" || name == "waystage_staging" {
				p.bad(v, fmt.Sprintf("schema %s is Waystage's own", name), "create the function in a schema of yours in the mirror")
			}
		})
		if s.Function == "" && len(v.Content) == 0 {
			p.bad(v, "conflict is empty", "one of "+strings.Join(words, ", ")+", or "+mapping)
		}
		return
	}
	word := p.scalar(v, "one of "+strings.Join(words, ", ")+", or "+mapping)
	s.Conflict = ConflictPolicy(word)
	if word == string(ConflictFunction) {
		p.bad(v, "conflict: function needs the function's name", mapping)
	} else if word != "" && !slices.Contains(words, word) {
		p.bad(v, fmt.Sprintf("unknown conflict policy %q", word), orElse(didYouMean(word, words), "one of "+strings.Join(words, ", ")+", or "+mapping))
	}
}
