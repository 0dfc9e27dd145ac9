"""The Python API, and what importing the package starts."""

import subprocess
import sys

import pytest

import metamorph_jax


def test_importing_the_package_starts_nothing():
    code = (
        "import sys, metamorph_jax; "
        "found = {'jax', 'torch', 'flax', 'numpy', 'transformers'} & set(sys.modules); "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "load" in metamorph_jax.__all__
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        metamorph_jax.unload  # noqa: B018
