#!/usr/bin/env bash
# A TPU slice of Google Cloud, from creation to deletion. Runs on your machine; needs gcloud.
#
#   bash launch/tpu.sh COMMAND --name=NAME [options] [-- PROGRAM…]
#
#   create   requests the slice (a queued resource) and waits until it is there
#   setup    copies this code to all hosts and installs it; repeat it after changing the code
#   run      starts PROGRAM on all hosts, detached; their logs stay there
#   watch    create, setup and run as needed, until PROGRAM has succeeded on all hosts: a
#            preempted slice is requested again, a program that died is started again. Started with
#            other code, extras, bucket or variables, it stops PROGRAM and sets up anew; while
#            another program runs, it is refused
#   status   prints the state of the slice, and of PROGRAM on every host
#   logs     follows the log of one host (--host=N)
#   stop     ends PROGRAM on all hosts with SIGTERM, so that it saves a checkpoint, and a `watch`
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
#                                                                (all three: create, watch)
#   --bucket=B          a bucket, or a folder of one (B/FOLDER), that all hosts see at ~/bucket
#                                                                (setup, watch)
#   --env=NAME          a variable of yours that PROGRAM gets, e.g. HF_TOKEN; its value travels in
#                       a file that only you can read, never in a command line or a log
#                                                                (setup, watch)
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

bucket_name() { # B, B/FOLDER or gs://B/FOLDER
    bucket=${1#gs://}
    bucket=${bucket%"${bucket##*[!/]}"} # slashes at the end
    [[ $bucket =~ ^[A-Za-z0-9._-]+(/[A-Za-z0-9._=+-]+)*$ && ! /$bucket/ =~ /\.+/ ]] ||
        fail "--bucket='$1' is not the name of a bucket or of a folder in one;" \
            "e.g. my-bucket or gs://my-bucket/runs"
}

take_action 'create setup run watch status logs stop delete' "$@"; shift
name='' type='' runtime='' bucket='' tier='' slices=1 extras=tpu host=0 restarts=100 every=60
wait_for='' delete_after='' where=() ssh_flags=() create_flags=() variables=() program=()
while [ $# -gt 0 ]; do
    with_value "$1"
    case $1 in # what a command would pass over is refused
        --type=* | --spot | --reserved | --slices=* | --runtime=* | --create-flag=* | --wait=* | \
            --every=*) goes_with "$1" "create watch" ;;
        --bucket=* | --env=* | --extras=*) goes_with "$1" "setup watch" ;;
        --restarts=* | --delete) goes_with "$1" watch ;;
        --host=*) goes_with "$1" logs ;;
    esac
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
        --bucket=*) bucket_name "${1#*=}" ;;
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
if [ "$action" = watch ] && [ -z "$bucket" ] && needs_bucket "${program[@]}"; then
    fail "the program names ../bucket, but there is no --bucket=B"
fi
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

exports() { # the variables, as a file for a shell
    local variable
    for variable in ${variables[@]+"${variables[@]}"}; do
        printf 'export %s=%q\n' "$variable" "${!variable}"
    done
}

pack() { # makes code.tgz, and code_id and setup_id, which say what a set-up consists of
    folder=$(mktemp -d)
    code "$root" | gzip > "$folder/code.tgz"
    code_id=$({
        tar -tzf "$folder/code.tgz"
        tar -xzOf "$folder/code.tgz" metamorph_jax configs launch setup.py pyproject.toml
        printf '%s\0' "$extras" "$bucket" ${variables[@]+"${variables[@]}"}
    } | fingerprint)
    setup_id=$code_id-$(exports | fingerprint) # as the hosts write it, which get the values as a file
}

unpack() { # text for the shell of a host: replaces the code; what the user has put beside it stays
    echo 'if bash metamorph_jax/launch/on_host.sh status 2>/dev/null | grep -q "^metamorph-run: running"
    then echo "error: a program runs here; stop it first: bash launch/tpu.sh stop" >&2; exit 2; fi
    mkdir -p metamorph_jax metamorph_run && rm -f metamorph_run/env &&
    echo '"$code_id"'-unfinished > metamorph_run/ready &&
    rm -rf metamorph_jax/metamorph_jax metamorph_jax/configs metamorph_jax/launch &&
    tar -C metamorph_jax -xzf metamorph_jax.tgz'
}

setup() { # every line has its own return: `set -e` is off to the left of ||
    say "copying the code to all hosts of $name"
    copy "$folder/code.tgz" metamorph_jax.tgz || return 1
    remote all all "$(unpack)" || return 1
    if [ ${#variables[@]} -gt 0 ]; then
        say "variables for the program: ${variables[*]}"
        [ -n "$dry" ] || (umask 077 && exports > "$folder/env")
        copy "$folder/env" metamorph_run/env || return 1
        rm -f "$folder/env"
        remote all all "chmod 600 metamorph_run/env" || return 1
    fi
    say "installing on all hosts (some minutes)"
    on_hosts all all setup "$code_id" "$extras" ${bucket:+"$bucket"}
}

run() { # start or restart
    say "starting on all hosts: $(quoted "${program[@]}")"
    on_hosts all all "$1" "${program[@]}"
}

# Lines "running PID …", "ended CODE …", "nothing …", "missing …" of all hosts (see on_host.sh);
# fails if one is not reached.
host_states() {
    remote all all 'if [ -f metamorph_jax/launch/on_host.sh ]
        then bash metamorph_jax/launch/on_host.sh status
        else echo metamorph-run: missing; fi' | sed -n 's/^.*metamorph-run: //p'
}

refuse_other() { # lines of host_states
    local line
    while read -r line; do
        if [[ $line == running* && $line != *" program=$program_id "* ]]; then
            fail "another program runs on $name: ${line#*command=}. It ends with" \
                "'bash launch/tpu.sh stop --name=$name${where[*]:+ ${where[*]}}'"
        fi
    done <<< "$1"
}

status() {
    local state
    state=$(slice_state)
    say "$name: $state"
    if [ "$state" = ACTIVE ]; then
        host_states | sed 's/ setup=.*//; s/running .*/running/' | sort | uniq -c
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
    local state before='' hosts kinds mine='' started=0 since=0
    pack
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
                    request; setup; run start; host_states
                    if [ -n "$delete_after" ]; then remove; fi
                    return
                fi
                look_after_hosts ;;
        esac
        before=$state
        sleep "$every"
    done
}

# What the lines of host_states mean to this watch: "missing", "outdated" (set up with other code,
# extras, bucket or variables), "running", "ended CODE", "nothing"; "stopped" as well if there was a
# `stop`.
kinds_of() {
    local line
    while read -r line; do
        case $line in
            missing* | *" setup=$code_id-unfinished "*) echo missing; continue ;;
            *" setup=$setup_id "*) ;;
            *) echo outdated ;;
        esac
        case $line in
            running*) echo running; continue ;;
            *" program=$program_id "*) echo "${line%% setup=*}" ;;
            *) echo nothing ;;
        esac
        if [[ ${line%% command=*} == *" stopped=yes" ]]; then echo stopped; fi
    done
}

# One check of an active slice. Uses the variables of watch; `mine` is set once the hosts are set up
# as this watch wants it: what differs later is somebody else's doing.
look_after_hosts() {
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
    refuse_other "$hosts"
    kinds=$(kinds_of <<< "$hosts")
    if [[ $kinds == *missing* || $kinds == *outdated* ]]; then
        set_up_hosts
    elif [[ $kinds == *running* ]]; then
        well setup
        mine=yes
        end_unequal
    else
        well setup
        well unequal
        start_again
    fi
}

set_up_hosts() {
    if [[ $kinds == *outdated* ]]; then
        [ -z "$mine" ] || fail "$name was set up by somebody else with other code, extras, bucket" \
            "or variables; this watch ends, and the program is left as it is"
        say "$name has other code, extras, bucket or variables; setting it up anew"
    fi
    if enough setup 4; then
        say "the set-up failed three times"
        on_end 1
    fi
    if [[ $kinds == *running* ]]; then
        say "stopping the program first; it saves a checkpoint"
        on_hosts all all stop || return 0 # not `end`: another watch would start it again
    fi
    if setup; then
        mine=yes
        look_after_hosts # at once: idle chips cost as much
    fi
}

end_unequal() { # when one host has ended, the others should notice soon
    if [[ $kinds != *ended* && $kinds != *nothing* ]]; then
        well unequal
    elif enough unequal 5; then
        say "some hosts have ended and others have not; stopping those"
        on_hosts all all end 60 "$setup_id" || true
    fi
}

start_again() { # nothing runs: the program has succeeded, must not be started again, or is started
    local codes code verb=start
    codes=$(sed -n 's/^ended //p' <<< "$kinds" | sort -n)
    code=${codes##*$'\n'}
    if [ "$code" = 0 ] && [[ $kinds != *nothing* ]]; then
        say "$(date '+%F %T') the program has succeeded on all hosts"
        on_end 0
    fi
    if [ -n "$mine" ] && [[ $kinds == *stopped* ]]; then
        say "the program was stopped with 'tpu.sh stop'; the same watch starts it again"
        on_end 143
    fi
    if [ -n "$code" ] && [ "$code" != 0 ] && [ "$started" -gt 0 ]; then
        say "the program ended with code $code"
        # A wrong option; a loss that is not finite: no restart helps, whatever the others died of.
        if [[ $'\n'$codes$'\n' =~ $'\n'([23])$'\n' ]]; then on_end "${BASH_REMATCH[1]}"; fi
        if [ $((SECONDS - since)) -ge 300 ]; then
            well start
        elif enough start 3; then
            say "it ended within five minutes three times"
            on_end 1
        fi
        if [ "$started" -gt "$restarts" ]; then on_end 1; fi
    fi
    if [ -n "$mine" ]; then verb=restart; fi
    mine=yes
    if run "$verb"; then
        started=$((started + 1)) since=$SECONDS
        say "start number $started"
    fi
}

program_id=$(printf '%s\0' ${program[@]+"${program[@]}"} | fingerprint)
case $action in
    create) create ;;
    setup) pack; setup ;;
    run)
        states=$(host_states) || fail "not all hosts of $name answer"
        refuse_other "$states"
        run start || fail "the program does not run on all hosts of $name" ;;
    watch) watch ;;
    status) status ;;
    logs) on_hosts 0 "$host" log 100 follow ;;
    stop) on_hosts all all stop ;;
    delete) remove ;;
esac; exit # on one line: a file that is changed while watch runs is not read on
