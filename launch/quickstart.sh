#!/usr/bin/env bash
# Teaches a pretrained language model to see and to draw, on this machine, and writes a report.
#
#   bash launch/quickstart.sh [--python PYTHON] [--smoke] [--workdir DIR] [more options of
#                             `metamorph quickstart`, see `--help`]
#
# Makes .venv, installs what is needed, then runs `metamorph quickstart`. After an interruption,
# the same command resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

python=python3
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --python) python=${2:?--python needs a path}; shift 2 ;;
        *) arguments+=("$1"); shift ;;
    esac
done

setup_venv "$python" quickstart
# Memory in huge pages, where the system leaves that to the program: a training step on a CPU takes a
# tenth less time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$VENV/bin/python" -m metamorph_jax quickstart ${arguments[@]+"${arguments[@]}"}
