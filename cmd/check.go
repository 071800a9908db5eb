package cmd

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/queue"
	"github.com/waystage/waystage/schema"
)

func newCheck(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "check", Short: "Preflight: everything that would keep the server from working, each with its remedy", Args: cobra.NoArgs,
		Long: `Look at configuration, definitions, both databases and the broker, and name everything that would keep Waystage from
working safely, each with its remedy. Nothing is changed. Exit code 6 if something would not work; warnings do not count.`,
		RunE: func(c *cobra.Command, _ []string) error {
			conf, err := a.config()
			if err != nil {
				return err
			}
			findings, err := a.check(c.Context(), conf)
			if err != nil {
				return err
			}
			if err := printRows(a.out, f, findings, []column[schema.Finding]{
				{"level", func(x schema.Finding) string { return string(x.Level) }},
				{"where", func(x schema.Finding) string { return x.Where }},
				{"finding", func(x schema.Finding) string { return oneLine(x.What) }},
			}); err != nil {
				return err
			}
			return a.verdict(findings, f == "table")
		}}
	withOutput(c, &f)
	return c
}

// verdict sums the findings up and says what to do about them.
func (a *app) verdict(findings []schema.Finding, remedies bool) error {
	of := map[schema.Level]int{}
	for _, x := range findings {
		of[x.Level]++
		if remedies && x.Remedy != "" && (x.Level == schema.Failure || x.Level == schema.Warning) {
			a.say("%s: %s: %s\n  do: %s", x.Level, x.Where, oneLine(x.What), x.Remedy)
		}
	}
	warnings := count(of[schema.Warning], "warning")
	if n := of[schema.Failure]; n > 0 {
		a.say("%d of %s failed, %s", n, count(len(findings), "check"), warnings)
		return silent(exitPrecondition)
	}
	a.say("%s passed, %s; next: waystage serve", count(len(findings)-of[schema.Warning], "check"), warnings)
	return nil
}

// check looks at everything. Only a cancelled context is an error.
func (a *app) check(ctx context.Context, conf Config) ([]schema.Finding, error) {
	var all []schema.Finding
	add := func(level schema.Level, code, where, what, remedy string) {
		all = append(all, schema.Finding{Level: level, Code: code, Where: where, What: what, Remedy: remedy})
	}
	for _, name := range a.strayVariables() {
		add(schema.Warning, "stray_variable", "environment", "$"+name+" sets no key of the configuration", "'waystage config reference' shows every key; unset it")
	}
	problems := func(ps []schema.Problem) {
		for _, p := range ps {
			level := schema.Failure
			if p.Warning {
				level = schema.Warning
			}
			where := "definitions"
			if p.Line > 0 {
				where = fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
			}
			what := p.Message
			if p.Table != "" {
				what = "table " + p.Table + ": " + what
			}
			add(level, "definitions", where, what, p.Remedy)
		}
	}
	var tables []string
	defs, ps, err := readDefinitions(conf.Definitions)
	switch {
	case err != nil:
		add(schema.Failure, "definitions", "definitions", err.Error(), "'waystage init' writes a beginning")
	default:
		problems(ps)
		if defs != nil {
			tables = defs.TableNames()
			add(schema.OK, "definitions", "definitions", strings.Join([]string{count(len(defs.Subscriptions), "subscription"), count(len(defs.Sets), "set"), count(len(defs.Groups), "group"), count(len(tables), "table")}, ", "), "")
		}
	}
	if defs != nil {
		if v := versionInForce(ctx, conf.Mirror.DSN); v != nil && v.SHA256 != defs.SHA256() {
			add(schema.Warning, "definitions_differ", "definitions", fmt.Sprintf("the file differs from version %d in the mirror, which is in force", v.Number),
				"'waystage subscriptions apply' puts the file in force, 'waystage subscriptions export' prints the version")
		}
	}
	looked, err := schema.Preflight(ctx, conf.Source.DSN, conf.Mirror.DSN, tables, slotSuffix(ctx, conf.Mirror.DSN))
	if err != nil {
		return nil, err
	}
	all = append(all, looked...)
	if defs != nil {
		if conn, err := schema.Connect(ctx, conf.Source.DSN, "waystage-check"); err == nil { // else Preflight has said so
			read, refused, err := schema.ReadTables(ctx, conn, tables)
			_ = conn.Close(context.WithoutCancel(ctx))
			if err != nil {
				add(schema.Failure, "catalog", "source", err.Error(), "")
			} else {
				problems(refused)
				problems(defs.Check(read))
			}
		}
	}
	a.checkBroker(ctx, conf, add)
	return all, ctx.Err()
}

// checkBroker looks at the external broker: that it can be reached with the keys, and what its JetStream may hold.
func (a *app) checkBroker(ctx context.Context, conf Config, add func(level schema.Level, code, where, what, remedy string)) {
	if len(conf.NATS.External.URLs) == 0 {
		add(schema.OK, "broker", "broker", "embedded, devices connect to "+conf.NATS.Embedded.Listen, "")
		if conf.NATS.Embedded.TLSCert == "" && !loopback(conf.NATS.Embedded.Listen) {
			add(schema.Warning, "broker_tls", "broker", "devices connect without TLS to "+conf.NATS.Embedded.Listen+": passwords and data can be read on the way",
				"set nats.embedded.tls_cert and tls_key, or put a TLS proxy in front")
		}
		return
	}
	b, err := a.broker(ctx, conf)
	if err != nil {
		add(schema.Failure, "broker", "broker", err.Error(), "are the NATS servers running with the nats-server.conf of 'waystage init --nats'?")
		return
	}
	defer b.close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	info, err := b.account(ctx)
	if err != nil {
		add(schema.Failure, "jetstream", "broker", "JetStream does not answer: "+err.Error(), "enable JetStream in account APP, as nats-server.conf of 'waystage init --nats' does")
		return
	}
	add(schema.OK, "broker", "broker", "reached "+strings.Join(conf.NATS.External.URLs, ", "), "")
	need := int64(conf.Limits.QueueBytes) + int64(conf.Limits.OutputBytes) + 2*int64(conf.Limits.ChangeBytes)
	if max := info.Limits.MaxStore; max >= 0 && max < need {
		add(schema.Failure, "jetstream_store", "broker", fmt.Sprintf("account APP may store %s, the streams may need %s", human(max), human(need)),
			"raise the account's max_file, or lower limits.queue_bytes, output_bytes and change_bytes")
	}
	if size := b.nc.MaxPayload(); size < queue.MaxPart+64<<10 {
		add(schema.Failure, "max_payload", "broker", fmt.Sprintf("max_payload is %s, the parts of a request need %s", human(size), human(queue.MaxPart+64<<10)),
			"set max_payload: 1MB in nats-server.conf")
	}
}

// versionInForce is the version in the mirror; nil before the first start, or when the mirror does not answer.
func versionInForce(ctx context.Context, mirrorDSN string) *schema.Version {
	conn, err := schema.Connect(ctx, mirrorDSN, "waystage-check")
	if err != nil {
		return nil
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	v, err := schema.LoadVersion(ctx, conn, 0)
	if err != nil {
		return nil
	}
	return v
}
