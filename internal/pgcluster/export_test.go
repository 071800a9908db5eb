package pgcluster

// Processes and Children let tests see which system processes a running cluster has.
func Processes(c *Cluster) []int { return []int{c.proc.pid} }

func Children(c *Cluster) []int { return children(c.proc.pid) }
