package protocol

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// Content types of requests and pages.
const (
	ContentCBOR = "application/cbor"
	ContentJSON = "application/json"

	ContentChunk = "application/octet-stream" // of a chunk of a file
)

// Content encodings of requests and pages.
const (
	Identity = ""
	Zstd     = "zstd"
	Gzip     = "gzip"
)

// Header names of messages between device and gateway.
const (
	HeaderContentType     = "Content-Type"
	HeaderContentEncoding = "Content-Encoding"
	HeaderError           = "Ws-Error" // a [Code]; the body is then an [Error] in JSON
)

// Verbs of the gateway, third token after the identity in a request subject.
const (
	VerbEnrol  = "enrol"
	VerbPut    = "put"
	VerbGet    = "get"
	VerbAck    = "ack"
	VerbStatus = "status"
	VerbWatch  = "watch"
	VerbRedeem = "redeem" // enrolment with a token
	VerbRotate = "rotate"
)

// MaxSecret is the longest password, enrolment token or JWT of a login, in bytes.
const MaxSecret = 12 << 10

// TokenPrefix is how enrolment tokens begin; no password does.
const TokenPrefix = "wst_"

// OperatorUser is the user of what operators submit at the server. It is no valid name: nobody can log in as it, and no
// subject carries it.
const OperatorUser = "@operator"

// MaxParts is the largest number of parts of one request.
const MaxParts = 1024

// IncarnationLen is the length of an incarnation id in hex digits.
const IncarnationLen = 32

// RequestSubject is the subject of a gateway call, "rq.<user>.<device>.<verb>[.<token>...]".
func RequestSubject(user, device, verb string, tokens ...string) string {
	return strings.Join(append([]string{"rq", user, device, verb}, tokens...), ".")
}

// NoticeSubject is where a device hears that pages wait for it.
func NoticeSubject(user, device string) string { return "ev." + user + "." + device }

// InboxPrefix is the only place where a device may receive answers.
func InboxPrefix(user, device string) string { return "_INBOX." + user + "." + device }

// EnrolInbox is the only place where a connection may receive answers that was let in by an enrolment token or a JWT: such a
// connection can enrol and nothing else, and hears nothing that is for the device's other connections.
func EnrolInbox(user, device, secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return InboxPrefix(user, device) + ".enrol-" + hex.EncodeToString(sum[:8])
}

// Fingerprint stands for a public key where people compare: "SHA256:" and 43 characters.
func Fingerprint(publicKey string) string {
	sum := sha256.Sum256([]byte(publicKey))
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// ValidName tells whether a user, device or set name can be a subject token: [a-z0-9_-]{1,64}.
func ValidName(token string) bool {
	if len(token) == 0 || len(token) > 64 {
		return false
	}
	for i := 0; i < len(token); i++ {
		c := token[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			return false
		}
	}
	return true
}

// ValidIncarnation tells whether s is 32 lower-case hex digits.
func ValidIncarnation(s string) bool {
	if len(s) != IncarnationLen {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// SessionToken names a session in subjects: "<incarnation>-<n>".
func SessionToken(incarnation string, n int64) string {
	return incarnation + "-" + strconv.FormatInt(n, 10)
}

// ParseSession reads a session token. Only the form that SessionToken writes is taken.
func ParseSession(token string) (incarnation string, n int64, err error) {
	inc, num, ok := strings.Cut(token, "-")
	n, perr := strconv.ParseInt(num, 10, 64)
	if !ok || perr != nil || n < 1 || !ValidIncarnation(inc) || strconv.FormatInt(n, 10) != num {
		return "", 0, &Error{Code: CodeName, Message: fmt.Sprintf("%s is not a session token (32 hex digits, a hyphen, a number from 1)", excerpt(token))}
	}
	return inc, n, nil
}

// PartToken names part i of k in a put subject: "<i>-<k>", both from 1.
func PartToken(i, k int) string { return strconv.Itoa(i) + "-" + strconv.Itoa(k) }

// ParsePart reads a part token. Only the form that PartToken writes is taken, with 1 <= i <= k <= MaxParts.
func ParsePart(token string) (i, k int, err error) {
	a, b, ok := strings.Cut(token, "-")
	i, err1 := strconv.Atoi(a)
	k, err2 := strconv.Atoi(b)
	if !ok || err1 != nil || err2 != nil || i < 1 || k < i || k > MaxParts || PartToken(i, k) != token {
		return 0, 0, &Error{Code: CodeSeries, Message: fmt.Sprintf("%s is not a part token (i-k with 1 <= i <= k <= %d)", excerpt(token), MaxParts)}
	}
	return i, k, nil
}

// Hash identifies the bytes of a request (rule D4): SHA-256 of its decompressed encoding.
func Hash(request []byte) []byte {
	h := sha256.Sum256(request)
	return h[:]
}

// excerpt quotes foreign text for an error message, shortened.
func excerpt(s string) string {
	const most = 80
	if len(s) > most {
		return strconv.QuoteToASCII(s[:most]) + "..."
	}
	return strconv.QuoteToASCII(s)
}
