"""Where metrics and samples go besides metrics.jsonl: TensorBoard, and Weights & Biases on demand.

Samples are also kept as files in workdir/samples, which `report.html` shows.
"""

import io
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import Shown


class Board(Protocol):
    """A place that keeps numbers, texts and images of a run."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def samples(self, step: int, name: str, shown: Sequence[Shown]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Files in workdir/tensorboard; what an earlier process wrote after `first` is hidden."""

    def __init__(self, workdir: pathlib.Path, first: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            tag = name.replace(".", "/", 2) if name.startswith("evals.") else name
            self._writer.add_scalar(tag, value, step)

    def samples(self, step: int, name: str, shown: Sequence[Shown]) -> None:
        for k, one in enumerate(shown):
            for label, image in one.images.items():
                tag = f"{name}/{k}_{label.replace(' ', '_')}"
                self._writer.add_image(tag, image, step, dataformats="HWC")
            if one.text:
                self._writer.add_text(f"{name}/{k}", _markdown(one), step)

    def close(self) -> None:
        self._writer.close()


def _markdown(one: Shown) -> str:
    """The texts of a sample as code blocks, in which TensorBoard reads no HTML or Markdown."""
    lines = [f"sample: {one.name}"]
    for label, text in one.text.items():
        lines += [f"{label}:", *text.splitlines()]
    return "\n".join("    " + line for line in lines)


class WandB:
    """A run of Weights & Biases; a resumed run continues there, too.

    Args:
        project: its name.
        workdir: of the run; the run's id is kept in it.
        config: all options of the run.

    Raises:
        ConfigError: see `require_wandb`; or the service refuses the run.
    """

    def __init__(self, project: str, workdir: pathlib.Path, config: Mapping):
        self._wandb = require_wandb()
        file = workdir / "wandb_id"
        known = file.read_text().strip() if file.is_file() else None
        try:
            self._run = self._wandb.init(
                project=project, name=workdir.name, dir=str(workdir), config=dict(config),
                id=known, resume="allow",
            )  # fmt: skip
        except Exception as error:  # of a class of its own, or of the network below it
            raise ConfigError(f"config.wandb: no run in {project!r}: {error}") from error
        file.write_text(f"{self._run.id}\n")
        # A resumed run repeats steps, and W&B's own counter never goes back.
        self._run.define_metric("*", step_metric="step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def samples(self, step: int, name: str, shown: Sequence[Shown]) -> None:
        logged = {}
        for k, one in enumerate(shown):
            caption = "\n".join(f"{label}: {text}" for label, text in one.text.items())
            logged |= {
                f"{name}/{k} {label}": self._wandb.Image(image, caption=caption)
                for label, image in one.images.items()
            }
            if caption and not one.images:
                logged[f"{name}/{k}"] = caption
        self._run.log({"step": step, **logged})

    def close(self) -> None:
        self._run.finish()


def require_wandb():
    """The package wandb.

    Raises:
        ConfigError: it is not installed, or there is nobody logged in: it would ask on the
            terminal, where a run on another machine has nobody to answer.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "config.wandb needs the package wandb: pip install 'metamorph-jax[wandb]'"
        ) from error
    online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
    if online and not wandb.api.api_key:
        raise ConfigError(
            "config.wandb: not logged in: run `wandb login` once, or set WANDB_MODE=offline"
        )
    return wandb


# ---- samples in the workdir


def keep(workdir: pathlib.Path, step: int, name: str, shown: Sequence[Shown]) -> None:
    """Writes samples to workdir/samples/NAME-STEP.json, with their images beside it."""
    import PIL.Image

    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    records = []
    for k, one in enumerate(shown):
        files = {}
        for label, image in one.images.items():
            files[label] = f"{name}-{step:08d}-{k}-{re.sub(r'[^A-Za-z0-9]+', '_', label)}.png"
            out = io.BytesIO()
            PIL.Image.fromarray(image).save(out, "PNG")
            (folder / files[label]).write_bytes(out.getvalue())
        records.append({"name": one.name, "text": dict(one.text), "images": files})
    table = {"evaluation": name, "step": step, "samples": records}
    (folder / f"{name}-{step:08d}.json").write_text(json.dumps(table, indent=1) + "\n")
