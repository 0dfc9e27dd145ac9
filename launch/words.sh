# shellcheck shell=bash
# Shared by tpu.sh, xpk.sh and slurm.sh: messages, command line, quoting, --dry-run.
# Nothing here prints the environment, and no script that uses it turns on `set -x`.

dry=${dry:-}

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# The comment at the head of a script.
usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p;}' "$1"; }

# The first word of a command line: `take_action "submit status" "$@"; shift` sets action.
take_action() {
    case ${2:-} in
        -h | --help) usage "$0"; exit 0 ;;
        '') usage "$0" >&2; exit 2 ;;
    esac
    local known
    # shellcheck disable=SC2034 # used by the scripts
    for known in $1; do
        if [ "$known" = "$2" ]; then action=$2; return; fi
    done
    fail "no command '$2'; see --help"
}

# Options that all scripts have.
other_option() {
    case $1 in
        --dry-run) dry=yes ;;
        -h | --help) usage "$0"; exit 0 ;;
        *) fail "unknown option '$1'; see --help. The program to run comes after --" ;;
    esac
}

# Refuses an option without its value, as --bucket=$UNSET gives it.
with_value() {
    if [[ $1 =~ ^--[a-z-]+=$ ]]; then fail "$1 has no value (is a variable empty?)"; fi
}

goes_with() { # option, the commands that it is for
    [[ " $2 " == *" $action "* ]] || fail "$action takes no ${1%%=*}; it goes with: ${2// /, }"
}

cloud_name() { # as Google Cloud and Kubernetes take it
    [[ $1 =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
        fail "--name=NAME is needed: lower-case letters, digits and dashes, a letter first"
}

# Words, quoted for a shell.
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

fingerprint() { # of standard input
    if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -c 1-16
}

needs_bucket() { # Does a program name files in ~/bucket?
    local word
    for word; do
        [[ ! $word =~ (\.\.|~|/home/[^/]+|/root)/bucket([^A-Za-z0-9._-]|$) ]] || return 0
    done
    return 1
}

# What is copied to the hosts, as a tar on stdout, always in the same order.
code() { # folder of the code
    (cd "$1" && find metamorph_jax configs launch setup.py pyproject.toml README.md LICENSE \
        \( -name __pycache__ -o -name '*.egg-info' \) -prune -o ! -type d -print |
        LC_ALL=C sort | tar -cf - -T -)
}
