package queue

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/waystage/waystage/protocol"
)

// Accounts. Devices are in one that has no JetStream and neither imports nor exports: the broker checks the subject of a
// publish but not its reply subject, and JetStream answers there with its own rights, so a device in reach of JetStream
// could store requests as somebody else and delete streams (docs/adr/0005-devices-never-touch-jetstream.md).
const (
	accountAuth    = "AUTH"
	accountApp     = "APP"
	accountDevices = "DEVICES"
	accountSys     = "SYS"
)

// Static users. No device can be called so: a device's login name has a slash.
const (
	userGateway = "gw"      // takes the devices' calls; may publish nothing but answers
	userNotify  = "notify"  // publishes live notices
	userApp     = "app"     // streams
	userCallout = "callout" // decides logins
	userSys     = "sys"     // closes connections
	userMonitor = "monitor" // for people: sees the gateways as micro services (inbox prefix _INBOX.MON)
)

// Secrets are the passwords of the static users and the seeds of the keys that sign and seal logins.
type Secrets struct {
	Gateway, Notify, App, Callout, Sys, Monitor string

	IssuerSeed string // account NKEY ("SA..."): signs what a login may do
	SealSeed   string // curve NKEY ("SX..."): logins travel sealed between broker and callout
}

// NewSecrets makes random ones.
func NewSecrets() (Secrets, error) {
	var s Secrets
	for _, p := range []*string{&s.Gateway, &s.Notify, &s.App, &s.Callout, &s.Sys, &s.Monitor} {
		b := make([]byte, 24)
		rand.Read(b)
		*p = base64.RawURLEncoding.EncodeToString(b)
	}
	issuer, err := nkeys.CreateAccount()
	if err != nil {
		return Secrets{}, fmt.Errorf("queue: make issuer key: %w", err)
	}
	seal, err := nkeys.CreateCurveKeys()
	if err != nil {
		return Secrets{}, fmt.Errorf("queue: make sealing key: %w", err)
	}
	is, err := issuer.Seed()
	if err != nil {
		return Secrets{}, fmt.Errorf("queue: make issuer key: %w", err)
	}
	ss, err := seal.Seed()
	if err != nil {
		return Secrets{}, fmt.Errorf("queue: make sealing key: %w", err)
	}
	s.IssuerSeed, s.SealSeed = string(is), string(ss)
	return s, nil
}

func (s *Secrets) password(user string) string {
	switch user {
	case userGateway:
		return s.Gateway
	case userNotify:
		return s.Notify
	case userApp:
		return s.App
	case userCallout:
		return s.Callout
	case userSys:
		return s.Sys
	case userMonitor:
		return s.Monitor
	}
	return ""
}

const printable = "!#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefghijklmnopqrstuvwxyz{|}~"

// keys are the key pairs of the seeds.
type keys struct {
	issuer, seal             nkeys.KeyPair
	issuerPublic, sealPublic string
}

func (s *Secrets) keys() (k keys, err error) {
	if k.issuer, err = nkeys.FromSeed([]byte(s.IssuerSeed)); err != nil {
		return k, fmt.Errorf("queue: issuer seed: %w", err)
	}
	if k.issuerPublic, err = k.issuer.PublicKey(); err != nil || !nkeys.IsValidPublicAccountKey(k.issuerPublic) {
		return k, fmt.Errorf("queue: the issuer seed is not that of an account NKEY (it must begin with SA)")
	}
	for _, u := range staticUsers {
		if p := s.password(u.user); p == "" || strings.ContainsAny(p, "\"\\") || strings.Trim(p, printable) != "" {
			return k, fmt.Errorf("queue: the password of user %q is empty, or has characters that a NATS configuration cannot hold: use letters and digits", u.user)
		}
	}
	if k.seal, err = nkeys.FromCurveSeed([]byte(s.SealSeed)); err != nil {
		return k, fmt.Errorf("queue: sealing seed: %w", err)
	}
	if k.sealPublic, err = k.seal.PublicKey(); err != nil {
		return k, fmt.Errorf("queue: sealing seed: %w", err)
	}
	return k, nil
}

// grant is what a user may do. An empty list allows nothing, a nil one everything.
type grant struct {
	user, account string
	pub, sub      []string
}

// staticUsers bypass the callout. The gateway's own list is the second line of defence behind its checks: whatever it is
// asked to answer to, the broker lets it answer to device inboxes only.
var staticUsers = []grant{
	{userCallout, accountAuth, nil, nil},
	{userGateway, accountDevices, []string{"_INBOX.*.*.>", "$SYS.REQ.USER.INFO"}, []string{"rq.*.*.>", "$SRV.>", "_INBOX.>"}},
	{userNotify, accountDevices, []string{"ev.*.*"}, []string{}},
	{userMonitor, accountDevices, []string{"$SRV.>"}, []string{"_INBOX.MON.>"}},
	{userApp, accountApp,
		[]string{"sync.in.>", "sync.out.>", "sync.dlq.>", "sync.file.>", "cd.>", "ws.>", "$JS.API.>", "$JS.ACK.>", "$SRV.>", "_INBOX.>", "$SYS.REQ.USER.INFO"},
		[]string{"ws.>", "$SRV.>", "_INBOX.>"}},
	{userSys, accountSys, []string{"$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.SERVER.*.KICK", "$SYS.REQ.USER.INFO"}, []string{"_INBOX.>"}},
}

// enrolGrant is what a connection may do that came by a secret which is good for one call. It hears nothing that is for the device's
// other connections.
func enrolGrant(user, device, verb, secret string) grant {
	return grant{
		user: user + "/" + device + "/" + verb, account: accountDevices, // not closed with the device's: it may be on its way back
		pub: []string{protocol.RequestSubject(user, device, verb)},
		sub: []string{protocol.EnrolInbox(user, device, secret) + ".>"},
	}
}

// deviceGrant is what a device may do, whether it came by key or by password.
func deviceGrant(user, device string) grant {
	return grant{
		user: user + "/" + device, account: accountDevices,
		pub: []string{protocol.RequestSubject(user, device, ">")},
		sub: []string{protocol.InboxPrefix(user, device) + ".>", protocol.NoticeSubject(user, device)},
	}
}

// Limits of one device's connection.
const (
	maxPayload = 1 << 20  // of the broker
	maxLine    = 24 << 10 // of the protocol's lines, the one with the login among them: a JWT has its place in it

	// A part may have [MaxPart] bytes; what is a little larger still gets an answer that says so instead of a cut connection.
	devicePayload = 768 << 10
	deviceSubs    = 16

	// tokenLife is how long a login is good for; the device then logs in again by itself. A device that was blocked while
	// the connection could not be closed is out after this time at the latest.
	tokenLife = time.Hour

	authTimeout = 5 * time.Second // of a login, at the broker
)

// ServerConfigOptions are the parts of [ServerConfig] that depend on where the server runs.
type ServerConfigOptions struct {
	Name      string // server_name; unique in a cluster
	Host      string // default 0.0.0.0
	Port      int    // default 4222
	StoreDir  string // default /data
	Websocket int    // port for browsers and devices behind proxies, 0: none
	CertFile  string // TLS for both, with KeyFile; empty: none
	KeyFile   string
	HTTP      int      // port of the monitoring page, 0: none
	Sync      string   // sync_interval: "" (the default, 2 minutes), a duration, or "always"
	Cluster   string   // name of the cluster, empty: a single server
	Listen    string   // cluster listen address, default 0.0.0.0:6222
	Routes    []string // nats-route://... of the other servers
}

// ServerConfig is a configuration file for nats-server with the accounts, users and permissions that Waystage needs, the
// same as those of the embedded server. A password of the form $NAME is written as a reference to that
// environment variable of the server.
func ServerConfig(s Secrets, o ServerConfigOptions) (string, error) {
	k, err := s.keys()
	if err != nil {
		return "", err
	}
	nonce, err := nkeys.CreateUser()
	if err != nil {
		return "", fmt.Errorf("queue: make key: %w", err)
	}
	noncePublic, err := nonce.PublicKey()
	if err != nil {
		return "", fmt.Errorf("queue: make key: %w", err)
	}
	set(&o.Name, "waystage")
	set(&o.Host, "0.0.0.0")
	set(&o.Port, 4222)
	set(&o.StoreDir, "/data")
	set(&o.Listen, "0.0.0.0:6222")

	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("# nats-server for Waystage. Generated; the accounts and permissions are part of its security: do not widen them.")
	p("server_name: %q", o.Name)
	p("listen: %q", fmt.Sprintf("%s:%d", o.Host, o.Port))
	if o.HTTP > 0 {
		p("http: %d", o.HTTP)
	}
	p("max_payload: %d", maxPayload)
	p("max_control_line: %d", maxLine)
	tls := ""
	if o.CertFile != "" {
		tls = fmt.Sprintf("tls { cert_file: %q, key_file: %q }", o.CertFile, o.KeyFile)
		p("%s", tls)
	}
	if o.Websocket > 0 {
		if tls == "" {
			tls = "no_tls: true"
		}
		p("websocket { port: %d, %s, compression: true, handshake_timeout: \"5s\" }", o.Websocket, tls)
	}
	p("jetstream {")
	p("  store_dir: %q", o.StoreDir)
	if o.Sync != "" {
		p("  sync_interval: %s", o.Sync)
	}
	p("}")
	if o.Cluster != "" {
		p("cluster { name: %q, listen: %q, routes: [%s] }", o.Cluster, o.Listen, quoted(o.Routes))
	}
	b.WriteString(accountsText(s, k, noncePublic))
	return b.String(), nil
}

// accountsText is the part of a configuration that the embedded server has too. nonce is a public key that makes the
// server send nonces, empty where an option does that.
func accountsText(s Secrets, k keys, noncePublic string) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("accounts {")
	for _, account := range []string{accountAuth, accountApp, accountDevices, accountSys} {
		p("  %s {", account)
		if account == accountApp {
			p("    jetstream: enabled")
		}
		p("    users: [")
		for _, u := range staticUsers {
			if u.account == account {
				p("      { user: %q, password: %s%s }", u.user, secret(s.password(u.user)), permissionText(u))
			}
		}
		if account == accountAuth && noncePublic != "" {
			p("      # Nobody has this key. The server sends the nonce that devices sign only if it knows of a key at all.")
			p("      { nkey: %s, permissions { publish { deny: \">\" }, subscribe { deny: \">\" } } }", noncePublic)
		}
		p("    ]")
		p("  }")
	}
	p("}")
	p("system_account: %s", accountSys)
	p("authorization {")
	p("  timeout: %d", int(authTimeout.Seconds()))
	p("  auth_callout {")
	p("    issuer: %s", k.issuerPublic)
	p("    account: %s", accountAuth)
	p("    xkey: %s", k.sealPublic)
	p("    auth_users: [%s]", quoted(staticNames()))
	p("  }")
	p("}")
	return b.String()
}

func permissionText(g grant) string {
	if g.pub == nil && g.sub == nil {
		return ""
	}
	list := func(allow []string) string {
		if len(allow) == 0 {
			return `{ deny: ">" }`
		}
		return "{ allow: [" + quoted(allow) + "] }"
	}
	return ", permissions { publish " + list(g.pub) + ", subscribe " + list(g.sub) + " }"
}

func staticNames() []string {
	var names []string
	for _, u := range staticUsers {
		names = append(names, u.user)
	}
	return names
}

func quoted(list []string) string {
	q := make([]string, len(list))
	for i, s := range list {
		q[i] = fmt.Sprintf("%q", s)
	}
	return strings.Join(q, ", ")
}

// secret writes a password, or the name of the variable that has it.
func secret(s string) string {
	if name, ok := strings.CutPrefix(s, "$"); ok && name != "" && strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") == "" {
		return s
	}
	return fmt.Sprintf("%q", s)
}
