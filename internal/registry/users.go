package registry

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
)

// noPassword stands for the hash of a user who has no password.
const noPassword = "!"

// UserChange says what a user is to be. Whatever is nil or empty stays as it is.
type UserChange struct {
	Password string
	Groups   []string          // instead of the present ones; empty and not nil: none
	Set      map[string]string // attributes
	Unset    []string          // attributes to be taken away; one that is not there is no error
}

// attributeName is what a rows query can write behind ":user.".
var attributeName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,62}$`)

func (c *UserChange) check() error {
	if len(c.Groups) > MaxGroups {
		return ErrGroups
	}
	for _, g := range c.Groups {
		if !protocol.ValidName(g) {
			return fmt.Errorf("group %q: %w", g, ErrName)
		}
	}
	if len(c.Set) > MaxAttributes {
		return ErrAttribute
	}
	for k, v := range c.Set {
		if !attributeName.MatchString(k) || len(v) > maxAttribute || !utf8.ValidString(v) || strings.ContainsRune(v, 0) {
			return fmt.Errorf("attribute %q: %w", k, ErrAttribute)
		}
	}
	return nil
}

// hashOf is the hash to store; empty: none is given.
func (c *UserChange) hashOf(ctx context.Context, h *hasher) (string, error) {
	if c.Password == "" {
		return "", nil
	}
	return h.make(ctx, c.Password)
}

// AddUser adds a user who logs in with the password.
func (r *Registry) AddUser(ctx context.Context, name, password string, groups ...string) error {
	if password == "" {
		return ErrPassword
	}
	return r.CreateUser(ctx, name, UserChange{Password: password, Groups: groups})
}

// CreateUser adds a user. Without a password no login by password is possible: the user's devices are enrolled in another
// way.
func (r *Registry) CreateUser(ctx context.Context, name string, c UserChange) error {
	added, _, err := r.putUser(ctx, name, c, "DO NOTHING")
	if err == nil && !added {
		return ErrUserExists
	}
	return err
}

// PutUser adds a user, or changes the one there is. It tells whether the user is new, and whether anything is another way now.
func (r *Registry) PutUser(ctx context.Context, name string, c UserChange) (added, changed bool, err error) {
	return r.putUser(ctx, name, c, `DO UPDATE SET password_hash = CASE WHEN $2 <> '' THEN $2 ELSE u.password_hash END,
			groups = coalesce($3, u.groups), attributes = (u.attributes || $4) - $5::text[]
		 WHERE $2 <> '' OR u.groups IS DISTINCT FROM coalesce($3, u.groups) OR u.attributes <> (u.attributes || $4) - $5::text[]`)
}

func (r *Registry) putUser(ctx context.Context, name string, c UserChange, conflict string) (added, changed bool, err error) {
	if !protocol.ValidName(name) {
		return false, false, ErrName
	}
	if err := c.check(); err != nil {
		return false, false, err
	}
	phc, err := c.hashOf(ctx, r.hash)
	if err != nil {
		return false, false, err
	}
	err = r.pool.QueryRow(ctx, `
		INSERT INTO waystage.app_user AS u (name, password_hash, groups, attributes)
		SELECT $1, CASE WHEN $2 <> '' THEN $2 ELSE '`+noPassword+`' END, coalesce($3::text[], '{}'), $4::jsonb - $5::text[]
		ON CONFLICT (name) `+conflict+` RETURNING xmax = 0`, name, phc, distinct(c.Groups), orEmpty(c.Set), c.unset()).Scan(&added)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return false, false, nil
	case isCheck(err):
		return false, false, ErrAttribute
	}
	return added, err == nil, wrap("add user", err)
}

// ChangeUser changes a user who is there. It holds from the next sync of each of the user's devices.
func (r *Registry) ChangeUser(ctx context.Context, name string, c UserChange) error {
	if err := c.check(); err != nil {
		return err
	}
	phc, err := c.hashOf(ctx, r.hash)
	if err != nil {
		return err
	}
	err = r.one(ctx, "change user", ErrUnknownUser, `
		UPDATE waystage.app_user SET password_hash = CASE WHEN $2 <> '' THEN $2 ELSE password_hash END,
			groups = coalesce($3::text[], groups), attributes = (attributes || $4::jsonb) - $5::text[]
		 WHERE name = $1`, name, phc, distinct(c.Groups), orEmpty(c.Set), c.unset())
	if isCheck(err) {
		return ErrAttribute
	}
	return err
}

func (c *UserChange) unset() []string {
	if c.Unset == nil {
		return []string{}
	}
	return c.Unset
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// distinct leaves out what stands in a list a second time. nil stays nil.
func distinct(list []string) []string {
	if list == nil {
		return nil
	}
	out := make([]string, 0, len(list))
	for _, s := range list {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// SetPassword changes a user's password. Devices that are enrolled keep their keys.
func (r *Registry) SetPassword(ctx context.Context, name, password string) error {
	if password == "" {
		return ErrPassword
	}
	return r.ChangeUser(ctx, name, UserChange{Password: password})
}

// SetGroups replaces the groups that a user belongs to.
func (r *Registry) SetGroups(ctx context.Context, name string, groups []string) error {
	if groups == nil {
		groups = []string{}
	}
	return r.ChangeUser(ctx, name, UserChange{Groups: groups})
}

// JoinGroup puts a user into a group, behind those that the user is in already.
func (r *Registry) JoinGroup(ctx context.Context, name, group string) error {
	if !protocol.ValidName(group) {
		return ErrName
	}
	err := r.one(ctx, "join group", ErrUnknownUser, `
		UPDATE waystage.app_user SET groups = CASE WHEN $2 = ANY (groups) THEN groups ELSE groups || $2::text END WHERE name = $1`, name, group)
	if isCheck(err) {
		return ErrGroups
	}
	return err
}

// LeaveGroup takes a user out of a group. That the user was not in it is no error.
func (r *Registry) LeaveGroup(ctx context.Context, name, group string) error {
	return r.one(ctx, "leave group", ErrUnknownUser, `UPDATE waystage.app_user SET groups = array_remove(groups, $2) WHERE name = $1`, name, group)
}

const selectUsers = `
	SELECT u.name, u.groups, (SELECT coalesce(jsonb_object_agg(key, value), '{}') FROM jsonb_each_text(u.attributes)),
		u.password_hash <> '` + noPassword + `', u.blocked, u.created_at, (SELECT count(*) FROM waystage.device d WHERE d.user_name = u.name AND d.removed_at IS NULL)
	  FROM waystage.app_user u WHERE u.name <> '` + protocol.OperatorUser + `' AND `

// ListUsers lists all users by name, or the members of a group when one is named; not the one that operators submit as.
func (r *Registry) ListUsers(ctx context.Context, group string) ([]User, error) {
	rows, err := r.pool.Query(ctx, selectUsers+`($1 = '' OR $1 = ANY (u.groups)) ORDER BY u.name`, group)
	if err != nil {
		return nil, wrap("list users", err)
	}
	users, err := pgx.CollectRows(rows, scanUser)
	return users, wrap("list users", err)
}

// User tells of one user.
func (r *Registry) User(ctx context.Context, name string) (User, error) {
	rows, err := r.pool.Query(ctx, selectUsers+`u.name = $1`, name)
	if err != nil {
		return User{}, wrap("show user", err)
	}
	u, err := pgx.CollectExactlyOneRow(rows, scanUser)
	if errors.Is(err, pgx.ErrNoRows) {
		return User{}, ErrUnknownUser
	}
	return u, wrap("show user", err)
}

func scanUser(row pgx.CollectableRow) (u User, err error) {
	err = row.Scan(&u.Name, &u.Groups, &u.Attributes, &u.Password, &u.Blocked, &u.CreatedAt, &u.Devices)
	return u, err
}

// GroupSizes counts the members of each group that has one.
func (r *Registry) GroupSizes(ctx context.Context) (map[string]int, error) {
	rows, err := r.pool.Query(ctx, `SELECT g, count(*) FROM waystage.app_user, unnest(groups) g GROUP BY g`)
	if err != nil {
		return nil, wrap("list groups", err)
	}
	sizes := map[string]int{}
	var g string
	var n int
	_, err = pgx.ForEachRow(rows, []any{&g, &n}, func() error {
		sizes[g] = n
		return nil
	})
	return sizes, wrap("list groups", err)
}

// SignIn takes over what another identity provider says of a user whom it has let in: groups, unless nil, and attributes. With create a
// user who is not known becomes so, without a password. Whether the user is blocked is not asked.
func (r *Registry) SignIn(ctx context.Context, name, device string, c UserChange, create bool) error {
	if !create {
		var known bool
		if err := r.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM waystage.app_user WHERE name = $1)`, name).Scan(&known); err != nil {
			return wrap("find user", err)
		}
		if !known || name == protocol.OperatorUser {
			return ErrUnknownUser
		}
	}
	if _, _, err := r.PutUser(ctx, name, c); err != nil {
		return err
	}
	id, err := r.EnsureDevice(ctx, name, device)
	if err == nil {
		r.seen(ctx, id)
	}
	return err
}
