# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0-only
# The virtual environment that the scripts beside this file share: .venv in the checkout. It is made when it is missing,
# and brought up to date when pyproject.toml has changed since, or the checkout has moved. To be sourced by bash:
#
#     . "$root/scripts/venv.sh"
#     ensure_venv "$root" [EXTRA]
#
# leaves the path of its interpreter in $python. EXTRA is an optional dependency group of pyproject.toml (test).
# Nothing outside the checkout is written, apart from pip's own cache.

say() {
    printf '%s: %s\n' "scripts/${0##*/}" "$*" >&2
}

# Prints the first Python that is new enough.
find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "lgmp needs Python 3.11 or newer, and no python3 here is: sudo apt-get install python3 python3-venv (Debian 12 or later)"
    return 1
}

# What the environment is made from: the first two lines of its stamp. A line `extra NAME` follows for each extra in it.
wanted_stamp() {
    printf 'checkout %s\n' "$root"
    sha256sum <"$root/pyproject.toml"
}

venv_is_fresh() {
    [[ -f $stamp && "$(head -n 2 "$stamp")" == "$(wanted_stamp)" ]] || return 1
    [[ -z $extra ]] || grep -qxF "extra $extra" "$stamp" || return 1
    "$python" -P -c 'import lgmp' 2>/dev/null
}

# Whether the environment can be brought up to date: its Python is still there, it has pip, and it was made in this place.
venv_is_usable() {
    "$python" -P -c 'import pip' 2>/dev/null || return 1
    [[ ! -f $stamp ]] || grep -qxF "checkout $root" "$stamp"
}

# Runs a command quietly; shows what it printed if it fails.
quietly() {
    local output
    output=$("$@" </dev/null 2>&1) && return
    printf '%s\n' "$output" | sed 's/^/    /' >&2
    say "setting up $venv failed, as shown above"
    return 1
}

make_venv() {
    local base extras=() requirement=.
    base=$(find_python) || return 1
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        say "Python's venv module is not complete: sudo apt-get install ${base##*/}-venv"
        return 1
    fi
    if ! mkdir -p "$venv" 2>/dev/null || [[ ! -w $venv ]]; then
        say "$venv cannot be written: use a checkout of your own"
        return 1
    fi
    if venv_is_usable; then
        say "bringing $venv up to date"
    else
        say "making $venv, this once (it takes packages from PyPI)"
        quietly "$base" -m venv --clear "$venv" || return 1
    fi
    # Extras that are there stay.
    [[ ! -f $stamp ]] || mapfile -t extras < <(sed -n 's/^extra //p' "$stamp")
    [[ -z $extra || " ${extras[*]} " == *" $extra "* ]] || extras+=("$extra")
    [[ ${#extras[@]} -eq 0 ]] || requirement=".[$(IFS=,; printf '%s' "${extras[*]}")]"
    rm -f "$stamp"
    # From within the checkout, whose name may hold anything.
    cd "$root" || return 1
    quietly "$python" -m pip --disable-pip-version-check install --editable "$requirement" || return 1
    {
        wanted_stamp
        [[ ${#extras[@]} -eq 0 ]] || printf 'extra %s\n' "${extras[@]}"
    } >"$stamp"
}

ensure_venv() {
    local root=$1 extra=${2-} lock
    local venv=$root/.venv
    local stamp=$venv/lgmp-stamp
    python=$venv/bin/python
    # The lock is the checkout's directory itself, so that nothing is left lying about.
    exec {lock}<"$root"
    if ! flock --nonblock "$lock"; then
        say "waiting for another setup of $venv"
        flock "$lock"
    fi
    venv_is_fresh || (make_venv) || exit 1
    exec {lock}<&-
}
