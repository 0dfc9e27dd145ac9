"""The whole road at smoke size, killed on its way and started again."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from metamorph_jax.convert import packages
from metamorph_jax.quickstart import run as quickstart

MISSING = [name for name in packages.PACKAGES if not packages.installed(name)]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        bool(MISSING), reason=f"needs {MISSING}: see convert/packages.py for the pip commands"
    ),
]


def start(workdir):
    command = [sys.executable, "-m", "metamorph_jax", "quickstart", "--smoke"]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def numbers(workdir):
    """Everything measured, and the decoder's drawings."""
    result = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    arrays = np.load(workdir / "evaluation" / "drawings.npz")
    return result, {k: arrays[k] for k in arrays.files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    process = start(workdir)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return workdir, said


def test_every_step_runs_and_the_report_shows_it(whole):
    workdir, said = whole
    for name in ("data", "connector", "vpit", "decoder", "evaluate", "report"):
        assert f"== {name}" in said
        assert json.loads((workdir / "steps" / f"{name}.json").read_text())["seconds"] >= 0
    page = (workdir / "report.html").read_text()
    for expected in ("Drawings of the right colour", "VPiT: visual loss", "is it this color?"):
        assert expected in page
    result, arrays = numbers(workdir)
    assert len(result["questions"]) == 16
    assert arrays["drawings"].shape[:2] == (24, 2)


def test_killed_twice_it_gives_the_same_numbers(whole, tmp_path):
    for sign in ("== vpit", "== decoder"):
        process = start(tmp_path)
        for line in process.stdout:
            if line.startswith(sign):
                # Somewhere inside the step: after its first checkpoint, or before.
                for line in process.stdout:
                    if line.startswith("step 3"):
                        break
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        process.wait(timeout=60)
    process = start(tmp_path)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    ours, theirs = numbers(tmp_path), numbers(whole[0])
    assert ours[0] == theirs[0]
    for name, array in theirs[1].items():
        np.testing.assert_array_equal(ours[1][name], array)


def test_another_seed_in_the_same_workdir_is_refused(whole):
    from metamorph_jax.cli import UserError

    with pytest.raises(UserError, match="choose another --workdir"):
        quickstart.Road(whole[0], "smoke", seed=1)
