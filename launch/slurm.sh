#!/usr/bin/env bash
# A run on GPUs of a SLURM cluster. Start it on the login node, in a checkout that all nodes see.
#
#   bash launch/slurm.sh submit --name=NAME [options] -- PROGRAM…
#   bash launch/slurm.sh status|logs|stop --name=NAME
#
#   --nodes=1 --gpus=8  nodes, and GPUs of each (one process per GPU)
#   --cpus=8            cores per process
#   --time=24:00:00     limit; five minutes before it the program gets SIGTERM and saves, and the job
#                       is put into the queue again
#   --restarts=100      how many times a job that was stopped or died is queued again
#   --flag=F            one more flag for sbatch, e.g. --flag=--partition=a100 --flag=--account=me
#   --dry-run           print every command, run none
#
# The environment is .venv in the code's folder: python3.12 -m venv .venv &&
# .venv/bin/pip install -e '.[cuda12]'. The log is slurm-NAME-JOB.log. Example:
#   bash launch/slurm.sh submit --name=vpit --nodes=8 --flag=--partition=h100 -- \
#       metamorph train --distributed --config=configs/metamorph/vpit.py:8b --workdir=/data/vpit
set -euo pipefail

# ---- on the first node of the job: sbatch starts its own copy of this file

if [ "${1:-}" = job ]; then
    restarts=$2
    shift 2
    export PATH="$PWD/.venv/bin:$PATH"
    code=0
    srun --kill-on-bad-exit=1 "$@" || code=$?
    echo "== ended with code $code, restart ${SLURM_RESTART_COUNT:-0} of $restarts"
    case $code in
        0 | 2 | 3) ;; # 2: a wrong option; 3: a loss that is not finite: no restart helps
        *)
            if [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts" ]; then
                scontrol requeue "$SLURM_JOB_ID"
            fi ;;
    esac
    exit "$code"
fi

# ---- on the login node

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/words.sh"
take_action 'submit status logs stop' "$@"; shift
name='' nodes=1 gpus=8 cpus=8 time=24:00:00 restarts=100 flags=() program=()
while [ $# -gt 0 ]; do
    with_value "$1"
    case $1 in # what a command would pass over is refused
        --nodes=* | --gpus=* | --cpus=* | --time=* | --restarts=* | --flag=*)
            goes_with "$1" submit ;;
    esac
    case $1 in
        --name=*) name=${1#*=} ;;
        --nodes=*) nodes=${1#*=} ;;
        --gpus=*) gpus=${1#*=} ;;
        --cpus=*) cpus=${1#*=} ;;
        --time=*) time=${1#*=} ;;
        --restarts=*) restarts=${1#*=} ;;
        --flag=*) flags+=("${1#*=}") ;;
        --) shift; program=("$@"); break ;;
        *) other_option "$1" ;;
    esac
    shift
done
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || fail "--name=NAME is needed: letters, digits, dots and dashes"
[[ $nodes$gpus$cpus$restarts =~ ^[0-9]+$ ]] ||
    fail "--nodes, --gpus, --cpus and --restarts must be whole numbers"
[ "$action" = submit ] || [ ${#program[@]} -eq 0 ] || fail "$action takes no program"
cd "$root"
case $action in
    submit)
        [ ${#program[@]} -gt 0 ] || fail "there is no program to run: give it after --"
        [ -n "$dry" ] || [ -x .venv/bin/python ] || fail "$root/.venv is not there; see --help"
        need sbatch https://slurm.schedmd.com
        do_it sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" \
            --gpus-per-node="$gpus" --cpus-per-task="$cpus" --time="$time" --signal=TERM@300 \
            --requeue --open-mode=append --output=slurm-%x-%j.log --chdir="$root" \
            ${flags[@]+"${flags[@]}"} launch/slurm.sh job "$restarts" "${program[@]}" ;;
    status) do_it squeue --me --name="$name" ;;
    stop) do_it scancel --me --name="$name" ;;
    logs)
        # The newest one.
        log=$(find . -maxdepth 1 -name "slurm-$name-*.log" -exec ls -t {} + 2>/dev/null | head -n 1)
        [ -n "$log" ] || fail "no slurm-$name-*.log in $root yet"
        do_it tail -n 100 -F "$log" ;;
esac
