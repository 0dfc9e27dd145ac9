"""`metamorph quickstart --systems`: four ways to read and to draw, side by side.

    data               easy-vqa as LLaVA files; features of its training images
    SYSTEM-S           trains a system with seed S, all of its stages
    judged-SYSTEM-S    its answers to held-out questions and its drawings, judged
    report             report.html

All systems start from the same language model and the same tower, and see the same questions and
requests. Drawings are read by one classifier. Four of the 24 pairs of colour and shape are never
drawn in training (`data.HELD_OUT`).
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable

import numpy as np

from metamorph_jax.errors import UserError
from metamorph_jax.eval import figures
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
    start = SystemsRun(workdir, size, args.seed)
    start.names, start.seeds = names, range(args.seed, args.seed + count)
    start.run()
    print(f"\nreport: {start.workdir / 'report.html'}")
    return 0


class SystemsRun(Steps):
    """The steps, see the module docstring.

    Attributes:
        names: of the systems; seeds: of each.
    """

    minutes = {"data": 2, "metamorph": 45, "llava": 20, "minigpt5": 30, "mm_interleaved": 30,
               "judged": 5}  # fmt: skip
    file = "systems.json"
    names: tuple[str, ...] = tuple(SYSTEMS)
    seeds: range = range(3)

    @property
    def steps(self) -> dict[str, Callable[[], dict | None]]:
        steps = {"data": self.data}
        for seed in self.seeds:
            for name in self.names:
                steps[f"{name}-{seed}"] = functools.partial(self.train, name, seed)
                steps[f"judged-{name}-{seed}"] = functools.partial(self.judge, name, seed)
        return steps | {"report": self.report}

    # ---- the steps

    def data(self) -> dict:
        """Files and cache of the quick start, which all systems share."""
        return self.quickstart(self.seed).data()

    def quickstart(self, seed: int) -> "SharedQuickStart":
        """MetaMorph's steps, on the data of this workdir."""
        found = SharedQuickStart(self.workdir / f"metamorph-{seed}", self.size, seed)
        found.shared = self.workdir
        return found

    def folder(self, name: str, seed: int) -> pathlib.Path:
        """The workdir of the last stage of a system that answers and draws."""
        stages = SYSTEMS[name].stages
        last = pathlib.Path(stages[-1]).name if stages else "vpit"
        return self.workdir / f"{name}-{seed}" / last

    def train(self, name: str, seed: int) -> dict:
        """All stages of a system; what a stage has done is not done again."""
        stages = SYSTEMS[name].stages
        if not stages:
            start = self.quickstart(seed)
            for step in ("connector", "vpit", "predict", "decoder"):
                start.once(step, start.steps[step])
            tables = {stage: start.config(stage) for stage in ("connector", "vpit", "decoder")}
        else:
            tables = self.train_stages(name, seed)
        folder = self.folder(name, seed).parent
        return {"stages": {n: facts(table, folder / n) for n, table in tables.items()}}

    def train_stages(self, name: str, seed: int) -> dict:
        """Stage -> its config."""
        from metamorph_jax.train.loop import train

        tables, before = {}, None
        for file in SYSTEMS[name].stages:
            table = located_config(
                file, self.size, seed, self.workdir / "data", self.workdir / "features"
            )
            if before:
                table.model.weights = f"workdir:{before}"
            before = self.folder(name, seed).with_name(pathlib.Path(file).name)
            train(table, before)
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
        from metamorph_jax.quickstart import data

        requests = data.read_jsonl(files.draw_test)
        wanted = [
            np.array([data.COLORS.index(r["color"]) for r in requests]),
            np.array([data.SHAPES.index(r["shape"]) for r in requests]),
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
        from metamorph_jax.quickstart import data

        _, pixels, *labels = data.labelled_images(self.quickstart(self.seed).files, "train")
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
        from metamorph_jax.quickstart import data

        return data.QuickstartData(self.shared / "data")

    @property
    def features(self) -> pathlib.Path:
        return self.shared / "features"


def drawings(generator, files) -> tuple[np.ndarray, np.ndarray, float]:
    """(uint8[requests, seeds, SIDE, SIDE, 3], bool[requests, seeds] whether an image was made,
    seconds per image) of the requests of the test, none picked."""
    from metamorph_jax.quickstart import data
    from metamorph_jax.sampling.generator import Options
    from metamorph_jax.sampling.requests import Request

    rows = data.read_jsonl(files.draw_test)
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
