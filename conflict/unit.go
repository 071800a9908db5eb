package conflict

import "slices"

// Member is one record of a session, or of a batch, as rule R8 sees it.
type Member struct {
	Unit   int64 // records with the same number other than 0 stand or fall together
	Failed bool  // rejected or refused for a fault of its own
	Refers []int // places in the list of inserts whose rows it refers to by a foreign key
}

// Fallen is a record that has no fault of its own, and falls with another.
type Fallen struct {
	Member, With int // places in the list
	Reason       Reason
}

// Fall decides rule R8: who falls with those that failed. The records of an atomic unit fall with any one of it (Transaction);
// a record that refers to the row of an insert that failed falls (Dependency), since what it meant is not there, or is somebody
// else's; and with each that falls others may. Each is named once, with the record that it falls with directly.
func Fall(list []Member) (out []Fallen) {
	down := make([]bool, len(list))
	var queue []int
	referring := map[int][]int{}
	units := map[int64][]int{}
	for i, m := range list {
		if m.Failed {
			down[i] = true
			queue = append(queue, i)
		}
		if m.Unit != 0 {
			units[m.Unit] = append(units[m.Unit], i)
		}
		for _, r := range m.Refers {
			referring[r] = append(referring[r], i)
		}
	}
	for len(queue) > 0 {
		with := queue[0]
		queue = queue[1:]
		fall := func(places []int, why Reason) {
			for _, i := range places {
				if !down[i] {
					down[i] = true
					queue = append(queue, i)
					out = append(out, Fallen{i, with, why})
				}
			}
		}
		if u := list[with].Unit; u != 0 {
			fall(units[u], Transaction)
		}
		fall(referring[with], Dependency)
	}
	return out
}

// Order says in what order records can be written one after the other: each after those that it needs, and, where that leaves
// a choice, as they stand in the list. What is written together (an atomic unit, or records that need one another) is one
// element. after[i] names the places that i must come after.
func Order(units []int64, after [][]int) (order [][]int) {
	n := len(units)
	first := map[int64]int{} // a unit is a ring: each of its records needs the others
	next := make([][]int, n)
	for i := range n {
		next[i] = slices.Clone(after[i])
		if u := units[i]; u != 0 {
			if j, ok := first[u]; ok {
				next[i], next[j] = append(next[i], j), append(next[j], i)
			} else {
				first[u] = i
			}
		}
	}
	// Tarjan's algorithm, without recursion: it names a strongly connected component after all that it needs.
	index, low := make([]int, n), make([]int, n)
	onStack := make([]bool, n)
	var stack []int
	type frame struct{ node, edge int }
	count := 0
	for root := range n {
		if index[root] != 0 {
			continue
		}
		work := []frame{{root, 0}}
		for len(work) > 0 {
			f := &work[len(work)-1]
			v := f.node
			if f.edge == 0 && index[v] == 0 {
				count++
				index[v], low[v] = count, count
				stack, onStack[v] = append(stack, v), true
			}
			if f.edge < len(next[v]) {
				w := next[v][f.edge]
				f.edge++
				switch {
				case index[w] == 0:
					work = append(work, frame{w, 0})
				case onStack[w]:
					low[v] = min(low[v], index[w])
				}
				continue
			}
			work = work[:len(work)-1]
			if len(work) > 0 {
				p := work[len(work)-1].node
				low[p] = min(low[p], low[v])
			}
			if low[v] != index[v] {
				continue
			}
			at := slices.Index(stack, v)
			part := slices.Clone(stack[at:])
			stack = stack[:at]
			for _, i := range part {
				onStack[i] = false
			}
			slices.Sort(part)
			order = append(order, part)
		}
	}
	return order
}
