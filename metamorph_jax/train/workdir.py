"""Run metadata, and the check whether a workdir may be resumed.

The same command with the same workdir resumes. With another model, other data or another batch
layout, the checkpoints there would mean something else, so that is refused.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from metamorph_jax import files
from metamorph_jax.errors import CheckpointError, ConfigError
from metamorph_jax.train import checkpoint, metrics_file

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


def check(workdir: pathlib.Path, config: dict, trained: bool) -> list[str]:
    """Compares a resolved config with the one saved in the workdir; writes nothing.

    Args:
        workdir: of the run.
        config: JSON-able.
        trained: the run has a checkpoint. Without one, nothing depends on the saved config, so
            a start that failed can be corrected.

    Returns:
        Changes to report.

    Raises:
        ConfigError: if the workdir belongs to another run.
        CheckpointError: if its checkpoints are of another version of this program, or were lost.
        FileError: a file of the run is damaged.
    """
    file, saved = workdir / "config.json", workdir / "versions.json"
    if not os.path.lexists(file):
        return []
    about = files.read_json(saved) if os.path.lexists(saved) else {}
    if trained:
        checkpoint.check_format(about, workdir)
    before = files.read_json(file, what="the config of the run in this workdir")
    if not trained:
        _check_nothing_lost(workdir, before)
    forbidden, changes = compare(before, json.loads(json.dumps(config)))
    if forbidden and (trained or (workdir / "final").is_dir()):
        listed = "\n  ".join(forbidden)
        raise ConfigError(
            f"{workdir} holds a run with another config; choose another --workdir, or undo"
            " these changes:"
            f"\n  {listed}"
        )
    return changes + forbidden


def _check_nothing_lost(workdir: pathlib.Path, config: dict) -> None:
    """Raises CheckpointError if a run without a checkpoint must have had one."""
    every, last = config.get("checkpoint_every"), _last_step(workdir / "metrics.jsonl")
    signs = [name for name in ("damaged", "final") if (workdir / name).is_dir()]
    # The second checkpoint is begun when the first one is complete.
    if isinstance(every, int) and last >= 2 * every:
        signs.append(f"metrics up to step {last}")
    if signs:
        raise CheckpointError(
            f"{workdir} has {' and '.join(signs)}, but no checkpoint: the run would start again at "
            "step 1. Put its checkpoints back (those in damaged/ belong in checkpoints/), or "
            "choose another --workdir"
        )


def _last_step(file: pathlib.Path) -> int:
    """The largest step in a metrics.jsonl; 0 if there is none."""
    there = metrics_file.lines(file) if os.path.lexists(file) else ()
    return max((step for step, _, _ in there), default=0)


def record(workdir: pathlib.Path, config: dict) -> None:
    """Saves the resolved config and the versions."""
    _write(workdir / "versions.json", versions())
    _write(workdir / "config.json", config)


def digest(config: dict) -> str:
    """Identifies a resolved config."""
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
