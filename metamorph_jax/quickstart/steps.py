"""Steps that are run once: a step that is finished has a record, and is not run again."""

import dataclasses
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import ClassVar

from metamorph_jax.lock import Lock
from metamorph_jax.platforms import cpu_name, has_matrix_units
from metamorph_jax.quickstart.estimate import estimate


@dataclasses.dataclass
class Steps:
    """The steps of a quick start, and the folder that holds their results.

    Attributes:
        workdir: what a step made is recorded in its `steps/NAME.json`.
        size: "quickstart" or "smoke".
        seed: of weights, order of the data and evaluation.
        precision: of matrix products, "float32" or "bfloat16"; "": bfloat16 on CPUs with matrix
            units, what the platform does by itself elsewhere.
        minutes: name of a step, or how it begins -> what it takes on two cores with matrix units;
            see `estimate` for other machines.
        file: holds `identity`, which may not change.
    """

    workdir: pathlib.Path
    size: str
    seed: int
    precision: str = ""

    minutes: ClassVar[dict[str, float]] = {}
    file: ClassVar[str] = "quickstart.json"

    def __post_init__(self):
        from metamorph_jax.errors import UserError

        self.workdir = self.workdir.expanduser().resolve()
        (self.workdir / "steps").mkdir(parents=True, exist_ok=True)
        file, mine = self.workdir / self.file, self.identity
        if file.is_file() and json.loads(file.read_text()) != mine:
            raise UserError(
                f"{self.workdir} holds a quick start with {json.loads(file.read_text())}, not "
                f"{mine}: choose another --workdir"
            )
        file.write_text(json.dumps(mine) + "\n")

    @property
    def identity(self) -> dict:
        """Size, seed and what else was asked for."""
        given = {"precision": self.precision} if self.precision else {}
        return {"size": self.size, "seed": self.seed} | given

    @property
    def steps(self) -> dict[str, Callable[[], dict | None]]:
        """Name -> what it does, in order."""
        raise NotImplementedError

    def run(self) -> None:
        """Says the plan, then runs the steps that are not finished."""
        with Lock(self.workdir, "works"):
            self.say_plan()
            for name, step in self.steps.items():
                self.once(name, step)

    def done(self, name: str) -> dict | None:
        """The record of a finished step, with its `seconds`; None if it is not finished."""
        file = self.workdir / "steps" / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def say_plan(self) -> None:
        """Prints the steps, with what each took or may take here (`estimate`)."""
        print(f"workdir: {self.workdir}\nmachine: {self.machine}")
        records = {name: self.done(name) for name in self.steps}
        left = [name for name, record in records.items() if not record]
        found = estimate(self.matmul_precision) if left and self.size == "quickstart" else None
        factor, where = (found.factor, "") if found else (1, " on two cores with matrix units")
        for name, record in records.items():
            state = "seconds"
            if record:
                state = f"done, {record['seconds']:.0f} s"
            elif self.size == "quickstart":
                state = f"about {factor * self._minutes(name):.0f} min{where}"
            print(f"  {name:<10} {state}")
        if found:
            total = factor * sum(map(self._minutes, left))
            print(f"about {total:.0f} min in all: {found}", flush=True)

    def _minutes(self, name: str) -> float:
        return next((m for start, m in self.minutes.items() if name.startswith(start)), 0)

    def once(self, name: str, step: Callable[[], dict | None]) -> None:
        import jax

        if self.done(name):
            return
        print(f"\n== {name}", flush=True)
        clock = time.perf_counter()
        # Interrupted attempts count, too.
        spent_file = self.workdir / "steps" / f"{name}.spent"
        tries = [float(x) for x in spent_file.read_text().split()] if spent_file.is_file() else []
        try:
            with jax.default_matmul_precision(self.matmul_precision):
                result = step() or {}
        except BaseException:
            with spent_file.open("a") as f:
                f.write(f"{time.perf_counter() - clock}\n")
            raise
        seconds = time.perf_counter() - clock + sum(tries)
        record = result | {"seconds": seconds, "interrupted": len(tries)}
        partial = self.workdir / "steps" / f"{name}.partial"
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(self.workdir / "steps" / f"{name}.json")
        print(f"{name} done in {seconds:.0f} s", flush=True)

    @property
    def machine(self) -> str:
        """What it runs on, in words."""
        units = "with" if has_matrix_units() else "without"
        return f"{cpu_name()}, {cores()} cores, {units} matrix units, {platform.system()}"

    @property
    def matmul_precision(self) -> str | None:
        """As `jax.default_matmul_precision` takes it; None leaves it to the platform."""
        return self.precision or ("bfloat16" if bfloat16_is_faster() else None)


def bfloat16_is_faster() -> bool:
    """True on a CPU with matrix units; other platforms choose by themselves."""
    import jax

    return jax.default_backend() == "cpu" and has_matrix_units()


def cores() -> int:
    """Of the CPU, as many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def configs_folder(recipe: str = "metamorph") -> pathlib.Path:
    """`configs/RECIPE` of the checkout that this package is installed from."""
    from metamorph_jax.errors import UserError

    folder = pathlib.Path(__file__).resolve().parents[2] / "configs" / recipe
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing: the quick start needs the repository (pip install -e .), not "
            "only the installed package"
        )
    return folder


def located_config(
    file: str, size: str, seed: int, data: pathlib.Path, features: pathlib.Path,
    precision: str | None = None,
):  # fmt: skip
    """The config of a stage, `configs/FILE.py`, with the paths of a workdir.

    Sources and evaluations are those of its size quickstart, at smoke size, too.

    Args:
        file: "RECIPE/STAGE".
        size: "quickstart" or "smoke".
        data, features: folders with the files of the sources, and with the cache of features.
        precision: `Steps.matmul_precision`.
    """
    from metamorph_jax import config

    path = f"{configs_folder(file.split('/')[0]).parent / file}.py"
    table, full = (config.load_config(f"{path}:{name}") for name in (size, "quickstart"))
    table.seed = seed
    with table.unlocked():
        table.data.sources, table.evals = full.data.sources, full.evals
        if full.data.cache.features:
            table.data.cache.features = str(features)
    held = [table.data, *(one.data for one in table.evals.values())]
    for source in (source for one in held for source in one.get("sources", {}).values()):
        source.path = str(data / pathlib.Path(source.path).name)
    if size == "smoke":
        for one in table.evals.values():
            one.update(every=3, batches=2)
    if precision:
        table.matmul_precision = precision
    if precision == "bfloat16" and bfloat16_is_faster() and "remat" in table.model:
        table.model.remat = "full"  # then a forward pass is cheap, memory is not
    return table
