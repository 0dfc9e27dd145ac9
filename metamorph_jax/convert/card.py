"""README.md of a written folder: where the weights come from, and their licence."""

import pathlib
import re

from metamorph_jax import files
from metamorph_jax.convert import export, hf, packages


def write_card(folder, title: str, spec: str, lines, licence: str, numbers=None) -> None:
    """README.md of a written folder."""
    name = f"`{pathlib.PurePath(spec).name}`" if spec else "a training run"
    (folder / "README.md").write_text(export.card(title, name, lines, licence, numbers))


def licence_of_spec(spec: str) -> str:
    """The licence of the weights that a run started from; "" if unknown."""
    if packages.is_package(spec):
        return packages.licence(spec)
    if spec.startswith(hf.PREFIX) or (spec and pathlib.Path(spec).is_dir()):
        return licence_of(hf.find(spec))
    return ""


def licence_of(folder: pathlib.Path) -> str:
    """The licence in the front matter of a folder's README.md; "" without one."""
    file = pathlib.Path(folder) / "README.md"
    if not file.is_file():
        return ""
    with files.opened(file) as card:
        start = card.read(2**16).decode(errors="replace")
    head = re.match(r"---\n(.*?)\n---", start, re.S)
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", head[1], re.M) if head else None
    return found[1] if found else ""
