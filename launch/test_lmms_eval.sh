#!/usr/bin/env bash
# Runs lmms-eval itself on a tiny random model of ours, offline, with tasks from local files: one
# that asks about images, one whose replies have images, one that thinks in images.
#
#   bash launch/test_lmms_eval.sh [--python PYTHON] [--venv DIR]
#
# Makes an environment of its own (.venv-lmms), since lmms-eval pins what it needs; a few GB and some
# minutes on the first run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

python=python3
venv=.venv-lmms
while [ $# -gt 0 ]; do
    case $1 in
        --python) python=${2:?--python needs a path}; shift 2 ;;
        --venv) venv=${2:?--venv needs a folder}; shift 2 ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "error: unknown argument $1" >&2; exit 2 ;;
    esac
done

if [ ! -x "$venv/bin/python" ]; then
    say "making $venv from $python"
    "$python" -m venv "$venv"
fi
wanted=$(cat setup.py launch/test_lmms_eval.sh | sha256sum)
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
    say "installing metamorph_jax[lmms] into $venv"
    "$venv/bin/python" -m pip install --quiet --editable ".[lmms]" pytest
    echo "$wanted" > "$venv/.installed"
fi
say "lmms-eval $("$venv/bin/python" -c '
from importlib.metadata import version
print(version("lmms-eval"))')"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=disabled JAX_PLATFORMS=cpu
exec "$venv/bin/python" -m pytest -v -rA tests/sampling/test_lmms_eval.py
