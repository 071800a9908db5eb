package protocol

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// maxWindow bounds the memory that a zstd frame may ask for, whatever it decompresses to.
const maxWindow = 8 << 20

// The encoder is stateless between calls of EncodeAll and safe for concurrent use; making one costs a millisecond.
var zstdEncoder = sync.OnceValues(func() (*zstd.Encoder, error) {
	return zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20), zstd.WithEncoderLevel(zstd.SpeedDefault))
})

// Compress encodes data; encoding is Identity, Zstd or Gzip.
func Compress(data []byte, encoding string) ([]byte, error) {
	switch encoding {
	case Identity:
		return data, nil
	case Zstd:
		enc, err := zstdEncoder()
		if err != nil {
			return nil, err
		}
		return enc.EncodeAll(data, make([]byte, 0, len(data)/3+64)), nil
	case Gzip:
		var out bytes.Buffer
		w := gzip.NewWriter(&out)
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
		return out.Bytes(), nil
	}
	return nil, refuse(CodeContentType, "content encoding %s is not known: use none, zstd or gzip", excerpt(encoding))
}

// Decompress reverses Compress. It gives up with too_big as soon as more than most bytes have come out (0: no limit),
// and with malformed on damaged or superfluous input. Memory is bounded by most and a window of 8 MiB.
func Decompress(data []byte, encoding string, most int) ([]byte, error) {
	limit := int64(1) << 40
	if most > 0 {
		limit = int64(most)
	}
	switch encoding {
	case Identity:
		if int64(len(data)) > limit {
			return nil, refuse(CodeTooBig, "%d bytes, the limit is %d: send smaller sessions", len(data), most)
		}
		return data, nil
	case Zstd:
		dec, err := zstd.NewReader(bytes.NewReader(data), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(uint64(max(limit, maxWindow))))
		if err != nil {
			return nil, refuse(CodeMalformed, "not zstd: %v", err)
		}
		defer dec.Close()
		return readLimited(dec, limit, len(data), Zstd)
	case Gzip:
		src := bytes.NewReader(data)
		dec, err := gzip.NewReader(src)
		if err != nil {
			return nil, refuse(CodeMalformed, "not gzip: %v", err)
		}
		dec.Multistream(false)
		out, err := readLimited(dec, limit, len(data), Gzip)
		if err == nil && src.Len() > 0 {
			return nil, refuse(CodeMalformed, "%d bytes after the end of the gzip stream", src.Len())
		}
		return out, err
	}
	return nil, refuse(CodeContentType, "content encoding %s is not known: use none, zstd or gzip", excerpt(encoding))
}

func readLimited(r io.Reader, limit int64, compressed int, encoding string) ([]byte, error) {
	var out bytes.Buffer
	n, err := io.Copy(&out, io.LimitReader(r, limit+1))
	switch {
	case n > limit, errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return nil, refuse(CodeTooBig, "%d bytes of %s decompress to more than the limit of %d: send smaller sessions", compressed, encoding, limit)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrWindowSizeTooSmall):
		return nil, refuse(CodeTooBig, "the zstd window is over the limit of %d bytes: compress with a smaller window", maxWindow)
	case err != nil:
		return nil, refuse(CodeMalformed, "damaged %s data: %v", encoding, err)
	}
	return out.Bytes(), nil
}
