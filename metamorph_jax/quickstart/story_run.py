"""`metamorph quickstart --stories`: does the feature synchronizer help to draw the next image?

    data              stories made of cut-outs (`stories.py`)
    with-S, without-S MM-Interleaved of seed S with MMFS, and without       configs/…/story.py
    drawn-…           its drawings of held-out stories, judged
    report            report.html

Every model draws the second and the third image of the same held-out stories, each from the true
images before it. Both kinds are trained on the same rows in the same order.
"""

import json
import pathlib
from collections.abc import Callable
from functools import partial

import numpy as np

from metamorph_jax.errors import UserError
from metamorph_jax.eval import figures
from metamorph_jax.quickstart import stories
from metamorph_jax.quickstart.steps import Steps, configs_folder

KINDS = {"with": "pretrain", "without": "without_mmfs"}  # name -> stage
HELD_OUT = ("seen", "unseen")
COUNTS = {
    "quickstart": {"train": 4000, "seen": 48, "unseen": 48},
    "smoke": {"train": 24, "seen": 4, "unseen": 4},
}
BATCH = 16  # images drawn together


def run(args, size: str) -> int:
    """The command; `args` as of `quickstart.run.add_arguments`."""
    count = 3 if args.seeds is None else args.seeds
    if count < 1:
        raise UserError(f"--seeds must be at least 1, not {count}")
    figures.import_matplotlib()
    workdir = pathlib.Path(args.workdir or ("stories-smoke" if args.smoke else "stories"))
    start = StoryRun(workdir, size, args.seed, args.precision)
    start.seeds = range(args.seed, args.seed + count)
    start.stamps = pathlib.Path(args.stamps) if args.stamps else None
    start.run()
    print(f"\nreport: {start.workdir / 'report.html'}")
    return 0


class StoryRun(Steps):
    """The steps, see the module docstring.

    Attributes:
        seeds: of the models.
        stamps: folder of Tux Paint's stamps; None: where Debian puts them, or easy-vqa's shapes.
    """

    minutes = {"data": 1, "with": 20, "drawn": 2}
    file = "stories.json"
    seeds: range = range(3)
    stamps: pathlib.Path | None = None

    @property
    def steps(self) -> dict[str, Callable[[], dict | None]]:
        steps = {"data": self.data}
        for seed in self.seeds:
            for kind in KINDS:
                steps[f"{kind}-{seed}"] = partial(self.train, kind, seed)
                steps[f"drawn-{kind}-{seed}"] = partial(self.draw, kind, seed)
        return steps | {"report": self.report}

    # ---- the steps

    @property
    def folder(self) -> pathlib.Path:
        return self.workdir / "data"

    def characters(self) -> list[stories.Character]:
        """Tux Paint's stamps, or shapes."""
        folder = self.stamps or stories.STAMPS
        if self.stamps or folder.is_dir():
            return stories.stamps(folder)
        from metamorph_jax.quickstart import data

        print(f"{folder} is not there (Debian: tuxpaint-stamps-default): characters are shapes")
        return stories.shapes(data.prepare(self.workdir / "shapes", None, 400, 24, self.seed))

    def data(self) -> dict:
        """Writes the stories."""
        counts = COUNTS[self.size]
        stories.prepare(self.folder, self.characters, counts=counts, seed=self.seed)
        return json.loads((self.folder / "manifest.json").read_text())

    def config(self, kind: str, seed: int):
        """The config of a model."""
        from metamorph_jax import config

        file = configs_folder("mm_interleaved") / "story.py"
        table = config.load_config(f"{file}:{self.size}")
        table.seed, table.stage = seed, KINDS[kind]
        with table.unlocked():
            table.data.sources = config.load_config(f"{file}:quickstart").data.sources
            table.data.sources.main.path = str(self.folder / "train.jsonl")
        if self.matmul_precision:
            table.matmul_precision = self.matmul_precision
        return table

    def train(self, kind: str, seed: int) -> dict:
        from metamorph_jax.train.loop import train

        return {"last": train(self.config(kind, seed), self.workdir / f"{kind}-{seed}")}

    def draw(self, kind: str, seed: int) -> dict:
        """Draws and judges; the drawings go to drawn-KIND-SEED.npz."""
        from metamorph_jax.sampling.trained import load_generator

        generator = load_generator(str(self.workdir / f"{kind}-{seed}"))
        known, drawn, verdicts = self.characters(), {}, {}
        for split in HELD_OUT:
            told = stories.read(self.folder, split)
            images = drawings(generator, self.folder, split)
            drawn[split] = images
            verdicts[split] = [
                vars(stories.judge(images[n, k], story, k + 1, known))
                for n, story in enumerate(told)
                for k in range(images.shape[1])
            ]
        np.savez_compressed(self.workdir / f"drawn-{kind}-{seed}.npz", **drawn)
        found = {split: means(verdicts[split]) for split in HELD_OUT}
        for split, scores in found.items():
            print(f"{split}: " + ", ".join(f"{name} {v:.3g}" for name, v in scores.items()))
        return {"scores": found, "verdicts": verdicts}

    def report(self) -> dict:
        from metamorph_jax.quickstart import story_page

        return {"path": str(story_page.write(self))}


def drawings(generator, folder: pathlib.Path, split: str) -> np.ndarray:
    """uint8[stories, images - 1, SIDE, SIDE, 3]: all images but the first of held-out stories.

    Args:
        generator: draws images on request (`Request.mode` "image").
        folder: with the files of `stories.prepare`.
    """
    from metamorph_jax.quickstart.data import read_jsonl
    from metamorph_jax.sampling.options import Options
    from metamorph_jax.sampling.requests import Request

    rows, requests = read_jsonl(folder / f"{split}.jsonl"), []
    for n, row in enumerate(rows):
        said = [turn["value"] for turn in row["conversations"]]
        for k in range(1, len(row["image"])):
            words = "".join(said[: 2 * k - 1])  # all that stands before image k
            files = tuple(str(folder / name) for name in row["image"][:k])
            requests.append(Request(f"{n}-{k}", words, files, mode="image"))
    options = Options(64, batch_size=BATCH)
    replies = generator.generate(requests, options)
    images = [np.asarray(r.images[0].resize((stories.SIDE, stories.SIDE))) for r in replies]
    return np.stack(images).reshape(len(rows), -1, *images[0].shape)


def means(verdicts: list[dict]) -> dict[str, float]:
    """Means of the fields of `stories.Verdict`."""
    return {name: float(np.mean([v[name] for v in verdicts])) for name in verdicts[0]}
