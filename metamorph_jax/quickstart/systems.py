"""`metamorph quickstart --systems`: four ways to read and to draw, side by side.

    data               easy-vqa as LLaVA files; features of its training images
    SYSTEM-S           trains a system with seed S, all of its stages
    judged-SYSTEM-S    its answers to held-out questions and its drawings, judged
    report             report.html

All systems start from the same language model and the same tower, and see the same questions and
requests. Drawings are read by one classifier. Four of the 24 pairs of colour and shape are never
drawn in training (`data.HELD_OUT`).

To train all of them takes many hours. With `--results DIR`, what a system's two steps found is
copied to DIR/SYSTEM-SEED.json, and its drawings to DIR/SYSTEM-SEED.png; what lies there counts as
done if its configs were the same. So the report can be collected from several machines.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from metamorph_jax.errors import UserError
from metamorph_jax.eval import figures
from metamorph_jax.files import write_whole
from metamorph_jax.quickstart import data as qdata
from metamorph_jax.quickstart.run import QuickStart
from metamorph_jax.quickstart.steps import Steps, located_config

SEEDS = (0, 1)  # of the drawings of a request
SIDE = 64  # of the images that are judged


@dataclasses.dataclass(frozen=True)
class System:
    """One of the systems.

    Attributes:
        title: its name in words.
        stages: files in `configs/`, "RECIPE/STAGE", in the order in which they are trained; each
            starts from the one before. () for MetaMorph, whose steps are those of the quick start.
        draws: whether it can.
    """

    title: str
    stages: tuple[str, ...] = ()
    draws: bool = True


SYSTEMS = {
    "metamorph": System("MetaMorph"),
    "llava": System("LLaVA", ("llava/stage1", "llava/stage2"), draws=False),
    "minigpt5": System("MiniGPT-5", ("minigpt5/stage1", "minigpt5/stage2")),
    "mm_interleaved": System("MM-Interleaved", ("mm_interleaved/pretrain", "mm_interleaved/sft")),
}


def run(args, size: str) -> int:
    """The command; `args` as of `quickstart.run.add_arguments`."""
    names = tuple(args.only.split(",")) if args.only else tuple(SYSTEMS)
    if wrong := [name for name in names if name not in SYSTEMS]:
        raise UserError(f"--only {wrong[0]}: the systems are {', '.join(SYSTEMS)}")
    count = 3 if args.seeds is None else args.seeds
    if count < 1:
        raise UserError(f"--seeds must be at least 1, not {count}")
    figures.import_matplotlib()
    workdir = pathlib.Path(args.workdir or ("systems-smoke" if args.smoke else "systems"))
    start = SystemsRun(workdir, size, args.seed, args.precision)
    start.results = pathlib.Path(args.results) if args.results else None
    start.names, start.seeds = names, range(args.seed, args.seed + count)
    start.run()
    print(f"\nreport: {start.workdir / 'report.html'}")
    return 0


class SystemsRun(Steps):
    """The steps, see the module docstring.

    Attributes:
        names: of the systems; seeds: of each.
        results: folder of results that are kept apart from the workdir; see the module docstring.
    """

    minutes = {"data": 1, "metamorph": 20, "llava": 9, "minigpt5": 13, "mm_interleaved": 13,
               "judged": 2}  # fmt: skip
    file = "systems.json"
    names: tuple[str, ...] = tuple(SYSTEMS)
    seeds: range = range(3)
    results: pathlib.Path | None = None

    @property
    def steps(self) -> dict[str, Callable[[], dict | None]]:
        steps = {}
        for seed in self.seeds:
            for name in self.names:
                steps[f"{name}-{seed}"] = functools.partial(self.train, name, seed)
                steps[f"judged-{name}-{seed}"] = functools.partial(self.judge, name, seed)
        collected = all(self.done(name) for name in steps) and not self.done("data")
        return ({} if collected else {"data": self.data}) | steps | {"report": self.report}

    def done(self, name: str) -> dict | None:
        """As of `Steps`; or the record in `results`. A report is always written anew."""
        if name == "report":
            return None
        system, _, seed = name.removeprefix("judged-").rpartition("-")
        record = super().done(name)
        if record or system not in SYSTEMS:
            return record
        found = self.collected(system, int(seed))
        return found["steps"][name] if found else None

    def once(self, name: str, step: Callable[[], dict | None]) -> None:
        super().once(name, step)
        if name.startswith("judged-"):
            system, _, seed = name.removeprefix("judged-").rpartition("-")
            self.collect(system, int(seed))

    # ---- results that are kept

    def collected(self, name: str, seed: int) -> dict | None:
        """The results of a system in `results`: {settings, machine, precision, steps}; None if
        there are none with the same settings."""
        file = self.results / f"{name}-{seed}.json" if self.results else None
        if file is None or not file.is_file():
            return None
        found = json.loads(file.read_text())
        same = found["settings"] == self.settings(name, seed)
        return found if same and self.precision in ("", found["precision"]) else None

    def collect(self, name: str, seed: int) -> None:
        """Copies the results of a system to `results`, unless they are there."""
        if not self.results or self.collected(name, seed):
            return
        steps = {step: self.done(step) for step in (f"{name}-{seed}", f"judged-{name}-{seed}")}
        found = {"settings": self.settings(name, seed), **self.where(name, seed), "steps": steps}
        self.results.mkdir(parents=True, exist_ok=True)
        if SYSTEMS[name].draws:
            # 256 colours are enough for the eye, and a tenth of the bytes.
            sheet = Image.fromarray(_sheet(self.drawn(name, seed))).quantize(256)
            sheet.save(self.results / f"{name}-{seed}.png", optimize=True)
        write_whole(self.results / f"{name}-{seed}.json", json.dumps(found, indent=1) + "\n")

    def settings(self, name: str, seed: int) -> dict:
        """What results of the same system must share: size, seed, data and the stages' configs but
        for what changes time and rounding only."""
        if (name, seed) not in self._settings:
            self._settings[name, seed] = self._read_settings(name, seed)
        return self._settings[name, seed]

    @functools.cached_property
    def _settings(self) -> dict:
        return {}

    def _read_settings(self, name: str, seed: int) -> dict:
        tables = {stage: table.to_dict() for stage, table in self.tables(name, seed).items()}
        for table in tables.values():
            table.pop("matmul_precision")
            table["model"].pop("remat", None)
        text = json.dumps(tables, sort_keys=True, default=str).replace(str(self.workdir), "")
        configs = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {"size": self.size, "seed": self.seed, "data": qdata.FORMAT, "configs": configs}

    def where(self, name: str, seed: int) -> dict[str, str]:
        """{machine, precision} that the results of a system come from."""
        found = None if super().done(f"{name}-{seed}") else self.collected(name, seed)
        mine = {"machine": self.machine, "precision": self.matmul_precision or "float32"}
        return {key: found[key] for key in mine} if found else mine

    def drawn(self, name: str, seed: int) -> np.ndarray:
        """uint8[requests, seeds, SIDE, SIDE, 3], from the workdir or from `results`."""
        file = self.workdir / f"drawn-{name}-{seed}.npz"
        if file.is_file():
            return np.load(file)["drawings"]
        with Image.open(self.results / f"{name}-{seed}.png") as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        rows = pixels.reshape(len(SEEDS), SIDE, -1, SIDE, 3)
        return rows.transpose(2, 0, 1, 3, 4)

    # ---- the steps

    def data(self) -> dict:
        """Files and cache of the quick start, which all systems share."""
        return self.quickstart(self.seed).data()

    def quickstart(self, seed: int) -> "SharedQuickStart":
        """MetaMorph's steps, on the data of this workdir."""
        folder = self.workdir / f"metamorph-{seed}"
        found = SharedQuickStart(folder, self.size, seed, self.precision)
        found.shared = self.workdir
        return found

    def folder(self, name: str, seed: int) -> pathlib.Path:
        """The workdir of the last stage of a system that answers and draws."""
        stages = SYSTEMS[name].stages
        last = pathlib.Path(stages[-1]).name if stages else "vpit"
        return self.workdir / f"{name}-{seed}" / last

    def train(self, name: str, seed: int) -> dict:
        """All stages of a system; what a stage has done is not done again."""
        from metamorph_jax.train.loop import train

        folder, tables = self.folder(name, seed).parent, self.tables(name, seed)
        if SYSTEMS[name].stages:
            for stage, table in tables.items():
                train(table, folder / stage)
        else:
            start = self.quickstart(seed)
            for step in ("connector", "vpit", "predict", "decoder"):
                start.once(step, start.steps[step])
        return {"stages": {n: facts(table, folder / n) for n, table in tables.items()}}

    def tables(self, name: str, seed: int) -> dict:
        """Stage -> its config, in order."""
        stages = SYSTEMS[name].stages
        if not stages:
            start = self.quickstart(seed)
            return {stage: start.config(stage) for stage in ("connector", "vpit", "decoder")}
        tables, before = {}, None
        for file in stages:
            table = located_config(
                file, self.size, seed, self.workdir / "data", self.workdir / "features",
                self.matmul_precision,
            )  # fmt: skip
            if before:
                table.model.weights = f"workdir:{before}"
            before = self.folder(name, seed).with_name(pathlib.Path(file).name)
            tables[before.name] = table
        return tables

    def judge(self, name: str, seed: int) -> dict:
        """Answers and draws; the drawings go to drawn-SYSTEM-SEED.npz."""
        from metamorph_jax.quickstart import evaluate
        from metamorph_jax.sampling.image_decoder import load_image_decoder
        from metamorph_jax.sampling.trained import load_generator

        smoke = {"questions": 16, "batch": 8} if self.size == "smoke" else {}
        settings = evaluate.Settings(seed=seed, **smoke)
        files = self.quickstart(self.seed).files
        generator = load_generator(str(self.folder(name, seed)))
        rows = evaluate.answer_questions(generator, files, settings, print)
        found = {"accuracy": evaluate.accuracy(rows)}
        if not SYSTEMS[name].draws:
            return found
        if not SYSTEMS[name].stages:
            decoder = self.folder(name, seed).with_name("decoder")
            generator.image_decoder = load_image_decoder(str(decoder))
        images, whole, seconds = drawings(generator, files)
        np.savez_compressed(self.workdir / f"drawn-{name}-{seed}.npz", drawings=images, whole=whole)
        verdicts = self.verdicts(files, images, whole)
        for part, value in verdicts["scores"].items():
            print(f"{part}: {100 * value:.1f} %")
        return found | verdicts | {"seconds_per_drawing": seconds}

    def verdicts(self, files, images: np.ndarray, whole: np.ndarray) -> dict:
        """What the classifier says about drawings uint8[requests, seeds, SIDE, SIDE, 3]; where
        `whole` is false, none was made, which counts as wrong."""
        requests = qdata.read_jsonl(files.draw_test)
        wanted = [
            np.array([qdata.COLORS.index(r["color"]) for r in requests]),
            np.array([qdata.SHAPES.index(r["shape"]) for r in requests]),
        ]
        seen = self.classifier.predict(images.reshape(-1, *images.shape[2:]))
        seen = [x.reshape(whole.shape) for x in seen]
        right = whole & np.all([s == w[:, None] for s, w in zip(seen, wanted, strict=True)], 0)
        new = np.array([r["held_out"] for r in requests])
        scores = {"seen pairs": right[~new].mean(), "held-out pairs": right[new].mean(),
                  "drawn at all": whole.mean()}  # fmt: skip
        return {"scores": {k: float(v) for k, v in scores.items()}, "right": right.tolist()}

    @functools.cached_property
    def classifier(self):
        """Reads colour and shape off an image; trained on real images, the same for all systems."""
        from metamorph_jax.eval import probe

        _, pixels, *labels = qdata.labelled_images(self.quickstart(self.seed).files, "train")
        config = probe.ClassifierConfig()
        if self.size == "smoke":
            config = dataclasses.replace(config, steps=20)
        return probe.train_classifier(pixels, labels, self.seed, config)

    def report(self) -> dict:
        from metamorph_jax.quickstart import systems_page

        return {"path": str(systems_page.write(self))}


class SharedQuickStart(QuickStart):
    """A quick start whose data and features lie in another workdir."""

    shared: pathlib.Path

    @property
    def files(self):
        return qdata.QuickstartData(self.shared / "data")

    @property
    def features(self) -> pathlib.Path:
        return self.shared / "features"


def drawings(generator, files) -> tuple[np.ndarray, np.ndarray, float]:
    """(uint8[requests, seeds, SIDE, SIDE, 3], bool[requests, seeds] whether an image was made,
    seconds per image) of the requests of the test, none picked."""
    from metamorph_jax.sampling.options import Options
    from metamorph_jax.sampling.requests import Request

    rows = qdata.read_jsonl(files.draw_test)
    images = np.full((len(rows), len(SEEDS), SIDE, SIDE, 3), 225, np.uint8)  # grey: not drawn
    whole, seconds = np.zeros(images.shape[:2], bool), []
    for k, seed in enumerate(SEEDS):
        requests = [Request(row["id"], row["prompt"]) for row in rows]
        clock = time.perf_counter()
        replies = generator.generate(requests, Options(64, seed=seed, batch_size=len(rows)))
        seconds.append(time.perf_counter() - clock)
        for n, reply in enumerate(replies):
            for image in reply.images[:1]:
                images[n, k], whole[n, k] = np.asarray(image.resize((SIDE, SIDE))), True
    # The first seed's time holds the compilation.
    return images, whole, seconds[-1] / max(int(whole[:, -1].sum()), 1)


def _sheet(images: np.ndarray) -> np.ndarray:
    """uint8[seeds * SIDE, requests * SIDE, 3] of uint8[requests, seeds, SIDE, SIDE, 3]."""
    n, seeds = images.shape[:2]
    return images.transpose(1, 2, 0, 3, 4).reshape(seeds * SIDE, n * SIDE, 3)


def facts(table, workdir: pathlib.Path) -> dict:
    """Of a finished stage: its trained parameters, steps, and median of seconds per step."""
    from flax import nnx

    from metamorph_jax.models import build
    from metamorph_jax.train.config import resolve
    from metamorph_jax.train.metrics_file import read_metrics
    from metamorph_jax.train.state import trained_filter

    run = resolve(table)
    outline = nnx.eval_shape(lambda: run.recipe.create(run.model, build.rngs(0)))
    _, chosen, _ = nnx.split(outline, trained_filter(run.pattern), ...)
    count = sum(int(np.prod(variable.shape)) for _, variable in nnx.to_flat_state(chosen))
    steps, seconds = read_metrics(workdir / "metrics.jsonl")["seconds_per_step"]
    return {
        "trained": count, "steps": int(steps[-1]), "seconds_per_step": float(np.median(seconds))
    }  # fmt: skip
