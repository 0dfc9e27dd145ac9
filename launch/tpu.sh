#!/usr/bin/env bash
# A TPU slice of Google Cloud, from creation to deletion. Runs on your machine; needs gcloud.
#
#   bash launch/tpu.sh COMMAND --name=NAME [options] [-- PROGRAM…]
#
#   create   requests the slice (a queued resource) and waits until it is there
#   setup    copies this code to all hosts and installs it; repeat it after changing the code
#   run      starts PROGRAM on all hosts, detached; their logs stay there
#   watch    create, setup and run as needed, until PROGRAM has succeeded on all hosts: a
#            preempted slice is requested again, a program that died is started again
#   status   prints the state of the slice, and of PROGRAM on every host
#   logs     follows the log of one host (--host=N)
#   stop     ends PROGRAM on all hosts with SIGTERM, so that it saves a checkpoint
#   delete   gives the slice back, which ends the costs
#
#   --name=NAME         of the queued resource and its nodes
#   --zone=Z --project=P  default: those of `gcloud config`
#   --type=T            v5e-64, v5p-64, v6e-64, v4-64, …         (create, watch)
#   --spot | --reserved   default: on demand                     (create, watch)
#   --slices=N          several slices, joined by the network    (create, watch)
#   --runtime=R         software version of the hosts; default: the one for --type
#   --create-flag=F     one more flag for gcloud, e.g. --create-flag=--network=my-net
#   --wait=6h           how long a request may wait (s, m, h, d); default: no limit
#   --bucket=B          a bucket that all hosts see at ~/bucket  (setup, watch)
#   --env=NAME          a variable of yours that PROGRAM gets, e.g. HF_TOKEN; its value travels in
#                       a file that only you can read, never in a command line or a log
#   --extras=tpu        what to install                          (setup, watch)
#   --restarts=N        a program that dies is started again at most N times (default 100; watch)
#   --every=60          seconds between two checks               (create, watch)
#   --delete            delete the slice when all is done        (watch)
#   --host=N            (logs, default 0)
#   --iap               reach the hosts through Google's proxy (no public addresses)
#   --dry-run           print every command, run none
#
# PROGRAM runs in the code's folder with its environment active, on every host at once:
#   bash launch/tpu.sh watch --name=vpit --type=v5e-64 --spot --bucket=my-bucket -- \
#       metamorph train --distributed --config=configs/metamorph/vpit.py:8b --workdir=../bucket/vpit
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/words.sh"

# ---- options

take_action 'create setup run watch status logs stop delete' "$@"; shift
name='' type='' runtime='' bucket='' tier='' slices=1 extras=tpu host=0 restarts=100 every=60
wait_for='' delete_after='' where=() ssh_flags=() create_flags=() variables=() program=()
while [ $# -gt 0 ]; do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=* | --project=*) where+=("$1") ;;
        --type=*) type=${1#*=} ;;
        --runtime=*) runtime=${1#*=} ;;
        --spot | --reserved)
            [ -z "$tier" ] || fail "either --spot or --reserved"
            tier=$1 ;;
        --slices=*) slices=${1#*=} ;;
        --create-flag=*) create_flags+=("${1#*=}") ;;
        --wait=*) wait_for=${1#*=} ;;
        --bucket=*) bucket=${1#*=}; bucket=${bucket#gs://} ;;
        --env=*) variables+=("${1#*=}") ;;
        --extras=*) extras=${1#*=} ;;
        --restarts=*) restarts=${1#*=} ;;
        --every=*) every=${1#*=} ;;
        --delete) delete_after=yes ;;
        --host=*) host=${1#*=} ;;
        --iap) ssh_flags+=(--tunnel-through-iap) ;;
        --) shift; program=("$@"); break ;;
        *) other_option "$1" ;;
    esac
    shift
done
cloud_name "$name"
[[ $slices$restarts$host =~ ^[0-9]+$ && $every =~ ^[0-9.]+$ ]] ||
    fail "--slices, --restarts and --host must be whole numbers, --every a number of seconds"
case $action in
    run | watch) [ ${#program[@]} -gt 0 ] || fail "there is no program to run: give it after --" ;;
    *) [ ${#program[@]} -eq 0 ] || fail "$action takes no program" ;;
esac
case $action in
    create | watch)
        [ -n "$type" ] || fail "--type=T is needed, e.g. v5e-64"
        type=${type/#v5e-/v5litepod-}
        case $type in
            v5litepod-*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
            v5p-*) runtime=${runtime:-v2-alpha-tpuv5} ;;
            v6e-*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
            v4-* | v3-* | v2-*) runtime=${runtime:-tpu-ubuntu2204-base} ;;
            tpu7x*) fail "tpu7x is available through GKE only: launch/xpk.sh" ;;
            *) [ -n "$runtime" ] || fail "$type has no default software: give --runtime=R" ;;
        esac ;;
esac
for variable in ${variables[@]+"${variables[@]}"}; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
        fail "--env takes the name of a variable, not '$variable'"
    [ -n "${!variable:-}" ] || fail "--env=$variable: this variable is not set here"
done
need gcloud https://cloud.google.com/sdk/docs/install

# ---- gcloud

tpus() { # noun, verb, rest…: gcloud asks nothing and takes zone and project from the options
    local noun=$1 verb=$2
    shift 2
    do_it gcloud compute tpus "$noun" "$verb" "$@" ${where[@]+"${where[@]}"} --quiet
}

remote() { # node, worker, text for the shell over there
    tpus queued-resources ssh "$name" --node="$1" --worker="$2" \
        ${ssh_flags[@]+"${ssh_flags[@]}"} --command="$3"
}

on_hosts() { # node, worker, words for on_host.sh: quoted once more for the shell over there
    local node=$1 worker=$2
    shift 2
    remote "$node" "$worker" "$(quoted bash metamorph_jax/launch/on_host.sh "$@")"
}

copy() { # file, name over there
    tpus queued-resources scp "$1" "$name:$2" --node=all --worker=all \
        ${ssh_flags[@]+"${ssh_flags[@]}"}
}

slice_state() { # ACTIVE, SUSPENDED, …; NONE if there is no such request
    local said
    if said=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>&1); then
        if [ -n "$dry" ]; then echo ACTIVE; else printf '%s\n' "${said##*$'\n'}"; fi
    elif [[ $said == *NOT_FOUND* || $said == *"not found"* || $said == *"was not found"* ]]; then
        echo NONE
    else
        printf '%s\n' "$said" >&2
        echo UNKNOWN # no network, for example; check again later
    fi
}

# ---- the commands

request() {
    local nodes=(--node-id="$name")
    if [ "$slices" -gt 1 ]; then nodes=(--node-count="$slices" --node-prefix="$name"); fi
    say "requesting ${slices} x ${type} ${tier}"
    tpus queued-resources create "$name" "${nodes[@]}" --accelerator-type="$type" \
        --runtime-version="$runtime" ${tier:+"$tier"} \
        ${wait_for:+--valid-until-duration="$wait_for"} ${create_flags[@]+"${create_flags[@]}"}
}

remove() {
    say "deleting $name"
    tpus queued-resources delete "$name" --force
}

create() {
    local state before=''
    if [ -n "$dry" ] || [ "$(slice_state)" = NONE ]; then request; fi
    while :; do
        state=$(slice_state)
        if [ "$state" != "$before" ]; then say "$name: $state"; fi
        before=$state
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDED | SUSPENDING | DELETING | NONE)
                say "why: gcloud compute tpus queued-resources describe $name"
                return 1 ;;
        esac
        sleep "$every"
    done
}

folder=''
trap '[ -z "$folder" ] || rm -rf "$folder"' EXIT

setup() { # every line has its own return: `set -e` is off to the left of ||
    local variable
    folder=${folder:-$(mktemp -d)} # a set-up that failed has left its own
    say "copying the code to all hosts of $name"
    code "$root" | gzip > "$folder/code.tgz" || return 1
    copy "$folder/code.tgz" metamorph_jax.tgz || return 1
    remote all all 'mkdir -p metamorph_jax metamorph_run &&
        tar -C metamorph_jax -xzf metamorph_jax.tgz' || return 1
    if [ ${#variables[@]} -gt 0 ]; then
        say "variables for the program: ${variables[*]}"
        [ -n "$dry" ] || (umask 077 && for variable in "${variables[@]}"; do
            printf 'export %s=%q\n' "$variable" "${!variable}"
        done > "$folder/env")
        copy "$folder/env" metamorph_run/env || return 1
        remote all all "chmod 600 metamorph_run/env" || return 1
    fi
    say "installing on all hosts (some minutes)"
    on_hosts all all setup "$extras" ${bucket:+"$bucket"} ||
        return 1
    rm -rf "$folder"
    folder=''
}

run() {
    say "starting on all hosts: $(quoted "${program[@]}")"
    on_hosts all all start "${program[@]}"
}

# Lines "running PID", "ended CODE", "nothing", "missing" of all hosts; fails if one is not reached.
host_states() {
    remote all all 'if [ -f metamorph_jax/launch/on_host.sh ]
        then bash metamorph_jax/launch/on_host.sh status
        else echo metamorph-run: missing; fi' | sed -n 's/.*metamorph-run: //p'
}

status() {
    local state
    state=$(slice_state)
    say "$name: $state"
    if [ "$state" = ACTIVE ]; then
        host_states | sed 's/running .*/running/' | sort | uniq -c
    fi
}

on_end() { # what watch does last
    if [ "$1" != 0 ]; then
        say "the end of the log of host 0:"
        on_hosts 0 0 log 20 || true
    fi
    if [ -n "$delete_after" ]; then remove; fi
    exit "$1"
}

# Counts failures in a row: `enough KIND 5` counts one more and succeeds at the fifth, `well KIND`
# resets the count.
enough() {
    local counter=failures_of_$1
    printf -v "$counter" %d $((${!counter:-0} + 1))
    [ "${!counter}" -ge "$2" ]
}
well() { printf -v "failures_of_$1" 0; }

watch() {
    local state before='' hosts started=0 since=0 code
    while :; do
        state=$(slice_state)
        if [ "$state" != "$before" ]; then say "$(date '+%F %T') $name: $state"; fi
        case $state in
            UNKNOWN) [ -n "$before" ] || fail "gcloud can't read the state of $name" ;;
            NONE)
                if request; then
                    well request
                elif enough request 5; then
                    fail "the request failed five times"
                fi ;;
            FAILED | SUSPENDED) # a preempted slice, or a request that waited too long
                say "the slice is gone; requesting another one"
                remove || true ;;
            ACTIVE)
                if [ -n "$dry" ]; then
                    request; setup; run; host_states
                    if [ -n "$delete_after" ]; then remove; fi
                    return
                fi
                look_after_hosts ;;
        esac
        before=$state
        sleep "$every"
    done
}

look_after_hosts() { # one check of an active slice; uses the variables of watch
    if ! hosts=$(host_states) || [ -z "$hosts" ]; then
        say "not all hosts answer"
        if enough contact 5; then
            say "the slice is broken; requesting another one"
            remove || true
            well contact
        fi
        return
    fi
    well contact
    if [[ $hosts == *missing* ]]; then
        if enough setup 4; then
            say "the set-up failed three times"
            on_end 1
        fi
        if setup; then look_after_hosts; fi # at once: idle chips cost as much
        return
    fi
    well setup
    if [[ $hosts == *running* ]]; then
        # When one host has ended, the others should notice soon.
        if [[ $hosts != *ended* && $hosts != *nothing* ]]; then
            well unequal
        elif enough unequal 5; then
            say "some hosts have ended and others have not; stopping those"
            on_hosts all all stop 60 || true
        fi
    else
        well unequal
        code=$(sed -n 's/^ended //p' <<< "$hosts" | sort -n | tail -n 1)
        if [ "$code" = 0 ] && [[ $hosts != *nothing* ]]; then
            say "$(date '+%F %T') the program has succeeded on all hosts"
            on_end 0
        fi
        if [ -n "$code" ] && [ "$code" != 0 ] && [ "$started" -gt 0 ]; then
            say "the program ended with code $code"
            # A wrong option; a loss that is not finite: no restart helps.
            if [ "$code" -le 3 ] && [ "$code" -ge 2 ]; then on_end "$code"; fi
            if [ $((SECONDS - since)) -ge 300 ]; then
                well start
            elif enough start 3; then
                say "it ended within five minutes three times"
                on_end 1
            fi
            if [ "$started" -gt "$restarts" ]; then on_end 1; fi
        fi
        if run; then
            started=$((started + 1)) since=$SECONDS
            say "start number $started"
        fi
    fi
}

case $action in
    create) create ;;
    setup) setup ;;
    run) run ;;
    watch) watch ;;
    status) status ;;
    logs) on_hosts 0 "$host" log 100 follow ;;
    stop) on_hosts all all stop ;;
    delete) remove ;;
esac; exit # on one line: a file that is changed while watch runs is not read on
