"""Every notebook runs to its end, at smoke size, and shows pictures."""

import pathlib

import pytest

from metamorph_jax.convert import packages

nbclient = pytest.importorskip("nbclient", reason="pip install 'metamorph-jax[notebook]'")
pytest.importorskip("matplotlib", reason="pip install 'metamorph-jax[notebook]'")
nbformat = pytest.importorskip("nbformat", reason="pip install 'metamorph-jax[notebook]'")

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
MISSING = [name for name in packages.PACKAGES if not packages.installed(name)]


@pytest.mark.e2e
@pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}: see convert/packages.py")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_runs_and_shows_pictures(file, tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKSTART_WORKDIR", str(tmp_path / "run"))
    notebook = nbformat.read(file, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=900, resources=where)
    client.execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    assert (tmp_path / "run" / "report.html").is_file()
