package stages

// lease is a session of a device that is under way: others of the same device wait, unless they are of the same file, whose next
// session says that this one is over (rule D1).
type lease struct {
	incarnation string
	left        int // seconds after which it counts as broken off, at least 1
}

// leasesSQL finds them: $1 devices, which are locked, $2 how long after its last step a session counts as broken off. Only a
// device's newest sessions are looked at. All times are by the mirror's clock: the broker's may be another.
const leasesSQL = `
SELECT s.device_id, s.incarnation, ceil(extract(epoch FROM s.step + make_interval(secs => $2) - clock_timestamp()))::int
FROM waystage.device d
CROSS JOIN LATERAL (
	SELECT device_id, incarnation, state, staged_at, greatest(staged_at, merged_at, replied_at) AS step
	FROM waystage.session WHERE device_id = d.id ORDER BY id DESC LIMIT 4) s
WHERE d.id = ANY ($1) AND s.state <> 'closed' AND s.staged_at > coalesce(d.reset_at, '-infinity') AND s.step > clock_timestamp() - make_interval(secs => $2)`

// ofAnother finds a lease of another file.
func ofAnother(leases []lease, incarnation string) *lease {
	for i := range leases {
		if leases[i].incarnation != incarnation {
			return &leases[i]
		}
	}
	return nil
}

// next tells whether a request would be taken as the incarnation's next session.
func (l *ledger) next(r *incoming) bool {
	return l != nil && l.deviceID == r.deviceID && r.req.N == l.lastN+1 && !l.createdAt.Before(r.resetAt)
}
