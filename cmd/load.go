package cmd

import (
	"encoding"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/go-viper/mapstructure/v2"
	koanfyaml "github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/env/v2"
	"github.com/knadh/koanf/providers/file"
	"github.com/knadh/koanf/v2"
	"go.yaml.in/yaml/v3"
)

// key is one leaf of Config.
type key struct {
	path   string // "nats.embedded.listen"
	doc    string
	secret bool
	field  []int // reflect index
	typ    reflect.Type
}

// keys lists the leaves of Config in the order of the struct.
func keys() []key {
	var out []key
	var walk func(t reflect.Type, prefix string, index []int)
	walk = func(t reflect.Type, prefix string, index []int) {
		for f := range fieldsOf(t) {
			path, at := prefix+f.Tag.Get("koanf"), append(slices.Clone(index), f.Index...)
			if f.Type.Kind() == reflect.Struct {
				walk(f.Type, path+".", at)
				continue
			}
			out = append(out, key{path: path, doc: f.Tag.Get("doc"), secret: f.Tag.Get("secret") == "true", field: at, typ: f.Type})
		}
	}
	walk(reflect.TypeFor[Config](), "", nil)
	return out
}

// fieldsOf yields the configurable fields of a struct.
func fieldsOf(t reflect.Type) func(func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for i := range t.NumField() {
			if f := t.Field(i); f.Tag.Get("koanf") != "" && !yield(f) {
				return
			}
		}
	}
}

// envName is the variable that sets a key.
func envName(path string) string {
	return "WAYSTAGE_" + strings.ToUpper(strings.NewReplacer(".", "_", "-", "_").Replace(path))
}

// load puts the configuration together: defaults < file < environment < --set. path "" means the usual places, and
// that no file is needed. It fails on keys that do not exist, with line and column, and reads *_file secrets.
func load(t *terminal, path string, set []string) (Config, error) {
	c := Defaults()
	c.origins = map[string]string{}
	known := map[string]key{}
	for _, k := range keys() {
		known[k.path] = k
		c.origins[k.path] = "default"
	}
	k := koanf.New(".")
	took := func(layer *koanf.Koanf, origin string) error {
		for path := range known {
			if layer.Exists(path) {
				c.origins[path] = origin
			}
		}
		return k.Merge(layer)
	}

	if path = configFile(t, path); path != "" {
		c.file = path
		body, err := os.ReadFile(path)
		if err != nil {
			return c, &failure{code: exitUsage, what: "cannot read the configuration", where: path, err: bare(err),
				remedy: "name the file with -c, or let 'waystage init' write one"}
		}
		if err := checkKeys(path, body, known); err != nil {
			return c, err
		}
		layer := koanf.New(".")
		if err := layer.Load(file.Provider(path), koanfyaml.Parser()); err != nil {
			return c, &failure{code: exitUsage, what: "the configuration is not YAML", where: path, err: err}
		}
		if err := took(layer, "file"); err != nil {
			return c, err
		}
	}

	names := map[string]string{}
	for path := range known {
		names[envName(path)] = path
	}
	layer := koanf.New(".")
	err := layer.Load(env.Provider(".", env.Opt{Prefix: "WAYSTAGE_", EnvironFunc: func() []string { return t.env },
		TransformFunc: func(name, value string) (string, any) { return names[name], value }}), nil)
	if err == nil {
		err = took(layer, "environment")
	}
	if err != nil {
		return c, err
	}

	layer = koanf.New(".")
	for _, s := range set {
		path, value, ok := strings.Cut(s, "=")
		switch kk, exists := known[path]; {
		case !ok:
			return c, usage("--set wants key=value, not %q", s)
		case !exists:
			return c, usage("--set %s: there is no such key%s", path, didYouMean(path, known))
		case kk.secret:
			return c, usage("--set %s: a secret on the command line can be read by every user of the machine; use %s or %s_file", path, envName(path), path)
		}
		if err := layer.Set(path, value); err != nil {
			return c, err
		}
	}
	if err := took(layer, "flag"); err != nil {
		return c, err
	}

	err = k.UnmarshalWithConf("", &c, koanf.UnmarshalConf{DecoderConfig: &mapstructure.DecoderConfig{
		TagName: "koanf", Result: &c, WeaklyTypedInput: true,
		DecodeHook: mapstructure.ComposeDecodeHookFunc(textHook, mapstructure.StringToSliceHookFunc(",")),
	}})
	if err != nil {
		return c, &failure{code: exitUsage, what: "a value of the configuration does not fit", where: c.file, err: errors.New(oneLine(err.Error())),
			remedy: "'waystage config reference' shows every key with an example"}
	}
	return c, c.resolve()
}

// textHook feeds scalars of YAML to types that read text (Size, Duration).
func textHook(_, to reflect.Type, v any) (any, error) {
	if !reflect.PointerTo(to).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
		return v, nil
	}
	if reflect.TypeOf(v) == to {
		return v, nil
	}
	out := reflect.New(to)
	if err := out.Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(fmt.Sprint(v))); err != nil {
		return nil, err
	}
	return out.Elem().Interface(), nil
}

// resolve reads secrets from their files and makes paths relative to the configuration file.
func (c *Config) resolve() error {
	base := filepath.Dir(c.file)
	rel := func(p *string) {
		if c.file != "" && *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(base, *p)
		}
	}
	for _, p := range []*string{&c.Definitions, &c.NATS.Embedded.Store, &c.NATS.Embedded.TLSCert, &c.NATS.Embedded.TLSKey,
		&c.NATS.External.Credentials, &c.NATS.External.CA, &c.Identity.OIDC.JWKSFile, &c.Source.DSNFile, &c.Mirror.DSNFile} {
		rel(p)
	}
	for name, db := range map[string]*Database{"source": &c.Source, "mirror": &c.Mirror} {
		if db.DSNFile == "" {
			continue
		}
		if db.DSN != "" {
			return &failure{code: exitUsage, what: "the configuration contradicts itself", where: c.whereIs(name + ".dsn"),
				err: fmt.Errorf("%s.dsn and %s.dsn_file are both set", name, name), remedy: "keep one of them"}
		}
		b, err := os.ReadFile(db.DSNFile)
		if err != nil {
			return &failure{code: exitUsage, what: "cannot read a secret", where: db.DSNFile, err: bare(err), remedy: "see " + name + ".dsn_file"}
		}
		db.DSN = strings.TrimSpace(string(b))
	}
	return nil
}

// configFile finds the file: the flag, $WAYSTAGE_CONFIG, ./waystage.yaml, /etc/waystage/waystage.yaml.
func configFile(t *terminal, path string) string {
	if path != "" {
		return path
	}
	if p := t.getenv("WAYSTAGE_CONFIG"); p != "" {
		return p
	}
	for _, p := range []string{"waystage.yaml", "/etc/waystage/waystage.yaml"} {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return ""
}

// checkKeys refuses keys that do not exist, with their position.
func checkKeys(path string, body []byte, known map[string]key) error {
	var doc yaml.Node
	if err := yaml.Unmarshal(body, &doc); err != nil {
		return &failure{code: exitUsage, what: "the configuration is not YAML", where: path, err: err}
	}
	if len(doc.Content) == 0 {
		return nil
	}
	var walk func(n *yaml.Node, prefix string) error
	walk = func(n *yaml.Node, prefix string) error {
		if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
			return nil // "nats:" with everything below it commented out
		}
		if n.Kind != yaml.MappingNode {
			return &failure{code: exitUsage, what: "the configuration does not fit", where: fmt.Sprintf("%s:%d:%d", path, n.Line, n.Column),
				err: fmt.Errorf("%s wants keys below it", strings.TrimSuffix(prefix, "."))}
		}
		seen := map[string]bool{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			name, at := prefix+n.Content[i].Value, fmt.Sprintf("%s:%d:%d", path, n.Content[i].Line, n.Content[i].Column)
			if seen[name] {
				return &failure{code: exitUsage, what: "a key is there twice", where: at, err: errors.New(name), remedy: "keep one of them"}
			}
			seen[name] = true
			if _, leaf := known[name]; leaf {
				continue
			}
			if !hasSection(known, name+".") {
				return &failure{code: exitUsage, what: "unknown key in the configuration", where: at,
					err: fmt.Errorf("there is no key %q%s", name, didYouMean(name, known)), remedy: "'waystage config reference' shows every key"}
			}
			if err := walk(n.Content[i+1], name+"."); err != nil {
				return err
			}
		}
		return nil
	}
	return walk(doc.Content[0], "")
}

func hasSection(known map[string]key, prefix string) bool {
	for p := range known {
		if strings.HasPrefix(p, prefix) {
			return true
		}
	}
	return false
}

// didYouMean finds the nearest known key.
func didYouMean(path string, known map[string]key) string {
	best, at := "", 1+len(path)/3
	try := func(p string) {
		if d := distance(path, p); d < at || d == at && best != "" && p < best {
			best, at = p, d
		}
	}
	for p := range known {
		try(p)
		for i, r := range p { // sections too
			if r == '.' {
				try(p[:i])
			}
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// distance counts the single-letter edits between two words.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		prev := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := prev
			if a[i-1] != b[j-1] {
				cost++
			}
			prev = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}

var passwordWord = regexp.MustCompile(`(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|\S+)`)

// redactDSN hides the password of a connection string.
func redactDSN(dsn string) string {
	if u, err := url.Parse(dsn); err == nil && u.Scheme != "" {
		q := u.Query()
		if q.Has("password") {
			q.Set("password", "xxxxx")
			u.RawQuery = q.Encode()
		}
		return u.Redacted()
	}
	if strings.Contains(dsn, "://") {
		return "(hidden)" // not parseable: show nothing rather than a part of a password
	}
	return passwordWord.ReplaceAllString(dsn, "${1}xxxxx")
}

// bare strips "open <path>:" from file errors, whose path is told already.
func bare(err error) error {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}
