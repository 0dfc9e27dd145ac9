# shellcheck shell=bash
# Shared by tpu.sh, xpk.sh and slurm.sh: messages, quoting, --dry-run.
# Nothing here prints the environment, and no script that uses it turns on `set -x`.

dry=${dry:-}

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# The comment at the head of a script.
usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p;}' "$1"; }

# Words as a shell has to be given them.
quoted() {
    local word quote="'\\''" space=''
    for word; do
        case $word in
            '' | *[!A-Za-z0-9_./:=@%+,-]*) printf "%s'%s'" "$space" "${word//\'/$quote}" ;;
            *) printf '%s%s' "$space" "$word" ;;
        esac
        space=' '
    done
}

exec 3>&1 # where --dry-run prints, also from within $(…)
show() { printf '+ %s\n' "$(quoted "$@")" >&3; }

# Runs a command, or with --dry-run prints it.
do_it() {
    if [ -n "$dry" ]; then show "$@"; else "$@"; fi
}

need() { # command, where it comes from
    [ -n "$dry" ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# What is copied to the hosts.
# shellcheck disable=SC2034 # used by the scripts
copied=(metamorph_jax configs launch setup.py pyproject.toml README.md LICENSE)
