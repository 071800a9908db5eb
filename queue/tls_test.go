package queue_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/waystage/waystage/protocol"
)

// selfSigned makes a certificate for 127.0.0.1 and the pool that trusts it.
func selfSigned(t testing.TB) (*tls.Config, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "waystage"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, pool
}

func TestTLS(t *testing.T) {
	cfg, roots := selfSigned(t)
	for _, tcp := range []bool{false, true} {
		name := map[bool]string{false: "in process", true: "over TCP"}[tcp]
		t.Run(name, func(t *testing.T) {
			b := start(t, func(b *bench) {
				b.options.TLS, b.tcp = cfg, tcp
				b.trust = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
			})
			if _, err := nats.Connect(b.url(), nats.UserInfo("alice/phone", "alice-password")); err == nil {
				t.Error("a connection without trust was made")
			}
			d := b.device("alice/phone", nats.Secure(b.trust))
			if r := d.put(session(1), "1-1", []byte("x"), nil); !r.Stored {
				t.Fatalf("%+v", r)
			}
			if ok, err := d.nc.TLSConnectionState(); err != nil || !ok.HandshakeComplete {
				t.Error("not encrypted:", err)
			}
			ws, err := nats.Connect(b.server.WebsocketURL(), nats.Secure(b.trust), nats.Compression(true), nats.UserInfo("alice/phone", "alice-password"),
				nats.CustomInboxPrefix(protocol.InboxPrefix("alice", "phone")), nats.Timeout(patience))
			if err != nil {
				t.Fatal(err)
			}
			defer ws.Close()
			if m, err := ws.Request(protocol.RequestSubject("alice", "phone", "status", session(1)), nil, patience); err != nil || decode[protocol.Status](t, m).State != "received" {
				t.Fatal(m, err)
			}
		})
	}
}
