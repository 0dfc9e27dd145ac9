"""What the notebook is before anything runs: its first cell in Colab, and its saved outputs."""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[2] / "notebooks/quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
FIRST = "".join(next(c for c in CELLS if c["cell_type"] == "code")["source"])
ADDRESS = re.compile(r"github\.com/\w+/")


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """A machine without the package, with a JAX for its accelerator; collects what is run."""
    found = {"jax": "0.11.4", "jaxlib": "0.11.4", "jax-cuda12-plugin": "0.11.4", "torch": "2.9"}
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        importlib.metadata, "distributions",
        lambda: [SimpleNamespace(metadata={"Name": n}, version=v) for n, v in found.items()],
    )  # fmt: skip
    monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append(words))
    return found, ran


def test_first_cell_keeps_the_jax_that_is_there(colab, tmp_path):
    _, ran = colab
    exec(ADDRESS.sub("github.com/someone/", FIRST), {})
    assert ran[0][-1] == "https://github.com/someone/metamorph_jax"
    kept = (tmp_path / "keep.txt").read_text().split()
    assert kept == ["jax==0.11.4", "jaxlib==0.11.4", "jax-cuda12-plugin==0.11.4"]
    installs = [words for words in ran if "pip" in words]
    assert len(installs) == 2 and ["--constraint", "keep.txt"] == installs[0][5:7]
    assert "--no-deps" in installs[1]
    assert not any("jax" in word.split("[")[0].split("==") for words in installs for word in words)


def test_first_cell_says_what_is_to_be_changed(colab):
    found, ran = colab
    with pytest.raises(SystemExit, match="set REPOSITORY in this cell"):
        exec(ADDRESS.sub("github.com/OWNER/", FIRST), {})
    found["jax"] = "0.7.2"
    with pytest.raises(SystemExit, match="choose a newer one"):
        exec(ADDRESS.sub("github.com/someone/", FIRST), {})
    assert not ran


def test_first_cell_does_nothing_in_a_checkout(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("nothing is to be run"))
    exec(FIRST, {})


def test_the_head_says_which_runtime_and_what_to_expect():
    head = "".join(CELLS[0]["source"])
    for expected in ("colab-badge.svg", "Change runtime type", "grey squares", "smoke"):
        assert expected in head


def test_outputs_are_saved_with_images():
    outputs = [o for c in CELLS if c["cell_type"] == "code" for o in c["outputs"]]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    assert not any(o["output_type"] == "error" for o in outputs)
    said = "".join("".join(o.get("text", "")) for o in outputs)
    assert "smoke size teaches nothing" in said
    assert NOTEBOOK.stat().st_size < 1_000_000
