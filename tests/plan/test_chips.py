import subprocess
import sys

import pytest

from metamorph_jax.errors import TopologyError
from metamorph_jax.plan import chips


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5e:8x8", "v5e:8x8", 64),
        ("V5E-64", "v5e:8x8", 64),
        ("v5p-64", "v5p:2x4x4", 32),  # counts cores, two on a chip
        ("tpu7x:2x2x2", "tpu7x:2x2x2", 16),  # two devices on a chip
        ("h100:8", "h100:8", 8),
        ("v6e-1", "v6e:1x1", 1),
    ],
)
def test_names(text, name, devices):
    found = chips.parse(text)
    assert (str(found), found.devices) == (name, devices)


def test_slices():
    found = chips.parse("v5e:8x8", 4)
    assert (str(found), found.devices) == ("4x v5e:8x8", 256)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:8", "chips are v4, v5e"),
        ("v5e-63", "known names are v5e-1, v5e-4"),
        ("v5p:8x8", "written as in v5p:2x4x4"),
        ("h100:8x8", "written as in h100:8"),
        ("", "chips are"),
    ],
)
def test_wrong_names(text, message):
    with pytest.raises(TopologyError, match=message):
        chips.parse(text)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(chips, "_installed", lambda package: False)
    with pytest.raises(TopologyError, match=r"pip install 'metamorph-jax\[plan\]'"):
        chips.devices(chips.parse("v5e:2x2"))
    with pytest.raises(TopologyError, match=r"pip install 'metamorph-jax\[cuda12\]'"):
        chips.devices(chips.parse("h100:8"))


@pytest.mark.skipif(not chips._installed("libtpu"), reason="pip install 'metamorph-jax[plan]'")
def test_one_chip_and_a_shape_that_is_no_topology():
    code = (
        "import jax; from metamorph_jax.plan import chips; chips.prepare_environment(); "
        "assert jax.config.jax_platforms == 'cpu'; "
        "print(len(chips.devices(chips.parse('v5e-1')))); chips.devices(chips.parse('v5e:3x5'))"
    )
    # In a process of its own: the compiler's library catches signals.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1"
    assert "no topology v5e:3x5" in done.stderr
    assert "Shapes that exist: 1x1, 2x2, 2x4" in done.stderr
