#!/usr/bin/env bash
# Runs the tests.
#
#   bash launch/test.sh [--python PYTHON] [--short] [pytest arguments]
#
# Makes .venv (or .venv-X.Y where .venv belongs to another Python), installs what the tests need and
# runs ruff and pytest. --short runs the golden tests only: the reference's numbers on that Python.
# The torch oracles are installed where torch==2.13.0 has a small build for that Python (3.11);
# elsewhere the tests that need them are skipped and say so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

python=python3
short=()
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --python) python=${2:?--python needs a path}; shift 2 ;;
        --short) short=(-m golden); shift ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) arguments+=("$1"); shift ;;
    esac
done

extras=dev,quickstart,video,notebook,eval
if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    extras=$extras,oracle,plan,tfds
fi
setup_venv "$python" "$extras"

say "ruff"
"$VENV/bin/ruff" check .
say "pytest, $("$VENV/bin/python" --version), $("$VENV/bin/python" -c '
from importlib.metadata import version
print(", ".join(f"{p} {version(p)}" for p in ("jax", "flax", "optax", "orbax-checkpoint")))')"
# Two processes: most of the time goes into compiling, which uses one core. tests/conftest.py has the
# order of the files; without --no-loadscope-reorder those with the most tests would come first.
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
    ${short[@]+"${short[@]}"} ${arguments[@]+"${arguments[@]}"}
