package apply

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/waystage/waystage/change"
)

// The marker names the changes that a source transaction carries as ranges of their numbers: "3-7,9".

func formatCarries(ids []int64) string {
	ids = slices.Clone(ids)
	slices.Sort(ids)
	var b strings.Builder
	for i := 0; i < len(ids); {
		j := i
		for j+1 < len(ids) && ids[j+1] == ids[j]+1 {
			j++
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.FormatInt(ids[i], 10))
		if j > i {
			b.WriteByte('-')
			b.WriteString(strconv.FormatInt(ids[j], 10))
		}
		i = j + 1
	}
	return b.String()
}

// maxCarries bounds what a marker can make us allocate; it is far above what up sends.
const maxCarries = 1 << 20

func parseCarries(text string) ([]int64, error) {
	if text == "" {
		return nil, nil
	}
	var ids []int64
	for part := range strings.SplitSeq(text, ",") {
		from, to, ranged := strings.Cut(part, "-")
		lo, err := strconv.ParseInt(from, 10, 64)
		hi := lo
		if err == nil && ranged {
			hi, err = strconv.ParseInt(to, 10, 64)
		}
		if err != nil || lo < 1 || hi < lo || hi-lo >= maxCarries || len(ids)+int(hi-lo) >= maxCarries {
			return nil, fmt.Errorf("%w: marker carries %q", change.ErrNotChangeData, part)
		}
		for id := lo; id <= hi; id++ {
			ids = append(ids, id)
		}
	}
	return ids, nil
}
