#!/usr/bin/env bash
# A run on a GKE cluster, through XPK (https://github.com/AI-Hypercomputer/xpk), the only way to get
# tpu7x. Runs on your machine; needs xpk, kubectl and docker.
#
#   bash launch/xpk.sh run --name=NAME --cluster=C --type=tpu7x-64 [options] -- PROGRAM…
#   bash launch/xpk.sh status|logs|delete --name=NAME --cluster=C
#
#   --zone=Z --project=P  of the cluster
#   --type=T            v5p-64, v6e-64, tpu7x-64, …
#   --slices=1          how many of them
#   --image=python:3.12 base image that the code is added to
#   --extras=tpu        what to install
#   --restarts=100      how many times a run that died is started again
#   --flag=F            one more flag for xpk, e.g. --flag=--storage=my-bucket (mounts a bucket)
#   --dry-run           print every command, run none
#
# A cluster with spot slices is made once by
#   xpk cluster create --cluster=C --tpu-type=v6e-64 --num-slices=1 --spot
# Secrets belong in a Kubernetes secret: everyone on the cluster can read the arguments of xpk.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/words.sh"

take_action 'run status logs delete' "$@"; shift
name='' cluster='' type='' slices=1 image=python:3.12 extras=tpu restarts=100
where=() flags=() program=()
while [ $# -gt 0 ]; do
    with_value "$1"
    case $1 in # what a command would pass over is refused
        --type=* | --slices=* | --image=* | --extras=* | --restarts=* | --flag=*)
            goes_with "$1" run ;;
    esac
    case $1 in
        --name=*) name=${1#*=} ;;
        --cluster=*) cluster=${1#*=} ;;
        --zone=* | --project=*) where+=("$1") ;;
        --type=*) type=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --extras=*) extras=${1#*=} ;;
        --restarts=*) restarts=${1#*=} ;;
        --flag=*) flags+=("${1#*=}") ;;
        --) shift; program=("$@"); break ;;
        *) other_option "$1" ;;
    esac
    shift
done
cloud_name "$name"
[ -n "$cluster" ] || fail "--cluster=C is needed"
[[ $slices$restarts =~ ^[0-9]+$ ]] || fail "--slices and --restarts must be whole numbers"
[ "$action" = run ] || [ ${#program[@]} -eq 0 ] || fail "$action takes no program"
need xpk "pip install xpk"

workload() { # verb, rest…
    local verb=$1
    shift
    do_it xpk workload "$verb" --cluster="$cluster" ${where[@]+"${where[@]}"} "$@"
}

case $action in
    run)
        [ ${#program[@]} -gt 0 ] || fail "there is no program to run: give it after --"
        [ -n "$type" ] || fail "--type=T is needed, e.g. v6e-64"
        type=${type/#v5e-/v5litepod-}
        command="pip install --quiet -e '.[$extras]' && $(quoted "${program[@]}")"
        [[ $command != *$'\n'* ]] || fail "xpk can't take a program with a line break in it"
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        code "$root" | tar -C "$folder" -xf -
        # By default, xpk (1.16) restarts after signals only. 1: a crash; 75: a host was
        # lost. Not 2, a wrong option, nor 3, a loss that is not finite: no restart helps.
        workload create --workload="$name" --device-type="$type" --num-slices="$slices" \
            --base-docker-image="$image" --script-dir="$folder" --max-restarts="$restarts" \
            --restart-on-exit-codes=1,75 --command="$command" ${flags[@]+"${flags[@]}"} ;;
    status) workload list ;;
    delete) workload delete --workload="$name" ;;
    logs) # of the first host
        do_it kubectl logs --follow --tail=100 \
            --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" ;;
esac
