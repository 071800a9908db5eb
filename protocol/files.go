package protocol

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

// FileChunk is the size of every chunk of a file but the last, in bytes.
const FileChunk = 256 << 10

// Bounds of a file's path, and of a file as the protocol can carry it.
const (
	MaxPath         = 512      // bytes
	MaxPathDepth    = 32       // segments
	MaxSegment      = 200      // bytes
	MaxFileSize     = 64 << 30 // bytes
	MaxContentType  = 100      // bytes
	UploadIDLen     = 32       // hex digits
	maxFileHashText = 2 * sha256.Size
)

// Verbs of the gateway for files. Their calls carry no session.
const (
	VerbFileGet    = "file-get"    // rq.<user>.<device>.file-get.<sha256>.<chunk>
	VerbFileOffer  = "file-offer"  // rq.<user>.<device>.file-offer.<id>
	VerbFilePut    = "file-put"    // rq.<user>.<device>.file-put.<id>.<chunk>
	VerbFileCommit = "file-commit" // rq.<user>.<device>.file-commit.<id>
)

// FilesRequest says that a device knows files; in a [Request].
type FilesRequest struct {
	Waiting int64 `cbor:"1,keyasint,omitempty" json:"waiting,omitempty"` // files whose content is still to be fetched, for the operator's eyes
}

// FilesPart carries what changed in one file subscription. Apply order: Gone, Deletes, Files.
type FilesPart struct {
	Subscription string      `cbor:"1,keyasint" json:"subscription"`
	Gone         []string    `cbor:"2,keyasint,omitempty" json:"gone,omitempty"`    // keys that left the user's subset: every file with one of them goes
	Deletes      []string    `cbor:"3,keyasint,omitempty" json:"deletes,omitempty"` // paths
	Files        []FileEntry `cbor:"4,keyasint,omitempty" json:"files,omitempty"`
	Wanted       []string    `cbor:"5,keyasint,omitempty" json:"wanted,omitempty"` // hashes of contents that the server has lost: a device that has one offers it again
}

// FileEntry is one file as it is now. Its content is fetched by hash.
type FileEntry struct {
	Path    string `cbor:"1,keyasint" json:"path"`
	Version string `cbor:"2,keyasint" json:"version"`
	SHA256  string `cbor:"3,keyasint" json:"sha256"` // of the content, 64 lower-case hex digits
	Size    int64  `cbor:"4,keyasint" json:"size"`   // bytes
	Type    string `cbor:"5,keyasint,omitempty" json:"type,omitempty"`
	Key     string `cbor:"6,keyasint,omitempty" json:"key,omitempty"` // the key in the path
}

// FileSubscription describes files of a set to the device; in [Definitions].
type FileSubscription struct {
	Name    string `cbor:"1,keyasint" json:"name"`
	Path    string `cbor:"2,keyasint" json:"path"` // pattern, see ParsePattern
	Upload  bool   `cbor:"3,keyasint,omitempty" json:"upload,omitempty"`
	MaxSize int64  `cbor:"4,keyasint,omitempty" json:"max_size,omitempty"` // of one upload, bytes
}

// Operations of a [FileOffer].
const (
	FilePut    = "put"
	FileRemove = "rm"
)

// FileOffer announces a change of a file by a device, under an id that the device draws. The same offer may be made
// again at any time: it says how far the upload is, and what has become of it.
type FileOffer struct {
	Path   string `json:"path"`
	Op     string `json:"op"`               // put, rm
	Base   string `json:"base,omitempty"`   // hash of the content that the change was made on; empty: the device knew of no such file
	SHA256 string `json:"sha256,omitempty"` // put: of the new content
	Size   int64  `json:"size,omitempty"`   // put: bytes
	Type   string `json:"type,omitempty"`   // put: content type
}

// States of an upload. Applied and Rejected, as of a record, are final.
const (
	FileReceiving = "receiving" // chunks are missing
	FileStored    = "stored"    // the content is there: commit
)

// FileReceipt says how far an upload is; the answer to offer, put and commit.
type FileReceipt struct {
	State   string `json:"state,omitempty"`   // receiving, stored, applied, rejected
	Missing []int  `json:"missing,omitempty"` // receiving: chunks that are to be sent, from 1, some or all
	Version string `json:"version,omitempty"` // applied: that the file has by it
	Code    Code   `json:"code,omitempty"`    // rejected: why
	Detail  string `json:"detail,omitempty"`
	Right   string `json:"right,omitempty"` // rejected: hash of the content that stands there; empty: there is no such file
	Error   *Error `json:"error,omitempty"` // the call could not be taken
}

// FileChunks is the number of chunks of a file; an empty file has none.
func FileChunks(size int64) int { return int((size + FileChunk - 1) / FileChunk) }

// FileChunkSize is the size of a chunk, from 1, of a file of the given size; 0: it has no such chunk.
func FileChunkSize(size int64, n int) int {
	if n < 1 || n > FileChunks(size) {
		return 0
	}
	return int(min(FileChunk, size-int64(n-1)*FileChunk))
}

// ValidFileHash tells whether s is 64 lower-case hex digits.
func ValidFileHash(s string) bool { return lowerHex(s, maxFileHashText) }

// ValidUploadID tells whether s is 32 lower-case hex digits.
func ValidUploadID(s string) bool { return lowerHex(s, UploadIDLen) }

func lowerHex(s string, n int) bool {
	return len(s) == n && strings.Trim(s, "0123456789abcdef") == ""
}

// FileHash is the name of a content.
func FileHash(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// ParseChunk reads the chunk token of a subject, from 1.
func ParseChunk(token string) (int, error) {
	n, err := strconv.Atoi(token)
	if err != nil || n < 1 || n > FileChunks(MaxFileSize) || strconv.Itoa(n) != token {
		return 0, refuse(CodeNotFound, "%s is not a chunk number", excerpt(token))
	}
	return n, nil
}

// reservedNames cannot be file names on Windows, with any extension.
var reservedNames = map[string]bool{"con": true, "prn": true, "aux": true, "nul": true, "conin$": true, "conout$": true}

// CheckPath refuses (with invalid_path) what is not a file's path: relative, segments separated by a slash, in NFC, and such
// that every system can keep it under that name. Both ends check each path, whoever it comes from.
func CheckPath(path string) error {
	bad := func(why string, args ...any) error {
		return refuse(CodePath, "%s cannot be a file's path: %s", excerpt(path), fmt.Sprintf(why, args...))
	}
	switch {
	case path == "":
		return bad("it is empty")
	case len(path) > MaxPath:
		return bad("it has %d bytes, more than %d", len(path), MaxPath)
	case !utf8.ValidString(path):
		return bad("it is not UTF-8")
	case !norm.NFC.IsNormalString(path):
		return bad("it is not in Unicode normalisation form C")
	case strings.HasPrefix(path, "/"):
		return bad("it is absolute: paths begin with a name")
	}
	segments := strings.Split(path, "/")
	if len(segments) > MaxPathDepth {
		return bad("it has %d levels, more than %d", len(segments), MaxPathDepth)
	}
	for _, s := range segments {
		switch {
		case s == "":
			return bad("a name between two slashes is empty")
		case s == "." || s == "..":
			return bad("%q is not a name", s)
		case len(s) > MaxSegment:
			return bad("a name has %d bytes, more than %d", len(s), MaxSegment)
		case strings.HasSuffix(s, ".") || strings.HasSuffix(s, " ") || strings.HasPrefix(s, " "):
			return bad("the name %q ends with a full stop or begins or ends with a space, which some systems drop", s)
		case reserved(s):
			return bad("%q is reserved on Windows", s)
		}
		for _, r := range s {
			switch {
			case strings.ContainsRune(`\:*?"<>|`, r):
				return bad("the character %q is not allowed on some systems", r)
			case unicode.Is(unicode.C, r), unicode.Is(unicode.Zl, r), unicode.Is(unicode.Zp, r):
				return bad("the character %U is invisible or a control character", r)
			}
		}
	}
	return nil
}

// reserved tells whether Windows keeps a name for itself: NUL, NUL.txt, COM1, LPT¹ ...
func reserved(name string) bool {
	stem, _, _ := strings.Cut(strings.ToLower(name), ".")
	stem = strings.TrimRight(stem, " ")
	if reservedNames[stem] {
		return true
	}
	n, ok := strings.CutPrefix(stem, "com")
	if !ok {
		n, ok = strings.CutPrefix(stem, "lpt")
	}
	if !ok {
		return false
	}
	r, size := utf8.DecodeRuneInString(n)
	return size > 0 && size == len(n) && strings.ContainsRune("0123456789¹²³", r)
}

// Check refuses an offer that makes no sense, whoever makes it.
func (o *FileOffer) Check() error {
	if err := CheckPath(o.Path); err != nil {
		return err
	}
	switch {
	case o.Op != FilePut && o.Op != FileRemove:
		return refuse(CodeMalformed, "op must be %q or %q", FilePut, FileRemove)
	case o.Base != "" && !ValidFileHash(o.Base):
		return refuse(CodeMalformed, "base must be 64 lower-case hex digits, or left out")
	case o.Op == FileRemove && (o.SHA256 != "" || o.Size != 0 || o.Type != ""):
		return refuse(CodeMalformed, "a removal has no sha256, size or type")
	case o.Op == FileRemove:
		return nil
	case !ValidFileHash(o.SHA256):
		return refuse(CodeMalformed, "sha256 must be 64 lower-case hex digits")
	case o.Size < 0:
		return refuse(CodeMalformed, "size must not be negative")
	}
	return CheckContentType(o.Type)
}

// CheckContentType refuses what is not a media type; empty is allowed.
func CheckContentType(t string) error {
	if len(t) > MaxContentType {
		return refuse(CodeMalformed, "the content type has %d bytes, more than %d", len(t), MaxContentType)
	}
	for i := 0; i < len(t); i++ {
		if t[i] < ' ' || t[i] > '~' {
			return refuse(CodeMalformed, "the content type %s has characters outside ASCII", excerpt(t))
		}
	}
	return nil
}
