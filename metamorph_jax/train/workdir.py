"""Run metadata, and the check whether a workdir may be resumed.

The same command with the same workdir resumes. With another model, other data or another batch
layout, the checkpoints there would mean something else, so that is refused.
"""

import importlib.metadata
import json
import pathlib
import subprocess
import sys
from typing import Any

from metamorph_jax.errors import ConfigError
from metamorph_jax.train import checkpoint

# With another value of these it is another run; a change of all others (log and checkpoint
# intervals, number of steps, learning rate) is reported.
BINDING = ("recipe", "stage", "seed", "batch_size", "accumulate", "model", "data")
# A change of these makes no difference to the results.
FREE = (
    *(f"data.reading.{name}" for name in ("workers", "threads", "ahead", "index_dir")),
    *(f"local_checkpoints.{name}" for name in ("folder", "every", "keep", "multi_tier")),
)

_PACKAGES = (
    "metamorph-jax",
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
)


def flatten(table: dict, prefix: str = "") -> dict[str, Any]:
    """Nested tables and lists as dotted keys."""
    flat = {}
    for key, value in table.items():
        where = f"{prefix}{key}"
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{where}.")
        else:
            flat[where] = value if value != {} else None
    return flat


def compare(before: dict, now: dict) -> tuple[list[str], list[str]]:
    """(changes that forbid resuming, changes that are only reported), one line each."""
    old, new = flatten(before), flatten(now)
    binding, others = [], []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key) or key in FREE:
            continue
        line = f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        (binding if key.split(".")[0] in BINDING else others).append(line)
    return binding, others


def prepare(workdir: pathlib.Path, config: dict, write: bool) -> list[str]:
    """Saves the resolved config and the versions, or checks against the saved one.

    Args:
        workdir: made if it isn't there.
        config: resolved, JSON-able.
        write: on the first process only.

    Returns:
        Changes to report.

    Raises:
        ConfigError: if the workdir belongs to another run.
        CheckpointError: if its checkpoints are of another version of this program.
    """
    file = workdir / "config.json"
    now = json.loads(json.dumps(config))
    changes = []
    if file.is_file():
        saved = workdir / "versions.json"
        about = json.loads(saved.read_text()) if saved.is_file() else {}
        checkpoint.check_format(about, workdir)
        forbidden, changes = compare(json.loads(file.read_text()), now)
        if forbidden:
            listed = "\n  ".join(forbidden)
            raise ConfigError(
                f"{workdir} holds a run with another config; choose another --workdir, or undo"
                " these changes:"
                f"\n  {listed}"
            )
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
        _write(workdir / "versions.json", versions())
        _write(file, now)
    return changes


def _write(file: pathlib.Path, value) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    new.replace(file)


def versions() -> dict[str, Any]:
    """Packages, Python, command, git commit and checkpoint format of this run."""
    found = {"python": sys.version.split()[0], "command": sys.argv, "format": checkpoint.FORMAT}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
        found["git_commit"] = done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        found["git_commit"] = None
    return found
