"""`metamorph report`: the page of a run, from the files in its workdir; `train` ends with it, too.

Curves and counts of skipped data come from metrics.jsonl, options from config.json, samples from
samples/, which evaluations of kind "samples" write.
"""

import json
import pathlib

import numpy as np

from metamorph_jax.errors import UserError
from metamorph_jax.eval import page, report
from metamorph_jax.train.metrics_file import read_metrics

FEW = 20  # steps: a run of fewer checks that everything works, and teaches nothing
SHORT = (
    "Steps of this run: {steps}. It shows that data, model and files work together, and not what "
    "the model can learn: so short a run leaves it as it was, and its answers and drawings (grey "
    "squares, for example) mean nothing."
)
SKIPPED = "data/"  # data/SOURCE/REASON: samples that were skipped or cut
SPEED = {
    "seconds_per_step": "Seconds per step",
    "positions_per_second_per_chip": "Tokens per second and chip",
    "mfu": "MFU",
    "data_wait": "Share of the time spent waiting for data",
}


def add_arguments(parser) -> None:
    parser.description = (
        "Writes WORKDIR/report.html: curves, options, what was left out of the data, samples. "
        "`metamorph train` writes it when it ends; this command does so at any time."
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="of a run, finished or not")


def run(args) -> int:
    print(f"report: {write(pathlib.Path(args.workdir)).resolve()}")
    return 0


def after_training(args) -> None:
    """Writes the report of the run that `metamorph train` has just ended, on one process."""
    import jax

    if jax.process_index() == 0:
        run(args)


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Writes workdir/report.html and returns its path.

    Raises:
        UserError: the folder holds no run, or one of its files is damaged.
    """
    config = _table(workdir / "config.json")
    if config is None:
        raise UserError(f"{workdir} holds no run: there is no config.json")
    return page.write(workdir / "report.html", as_page(workdir, config))


def as_page(workdir: pathlib.Path, config: dict) -> page.Page:
    """The page of the run in `workdir`, whose options are `config`."""
    file = workdir / "metrics.jsonl"
    metrics = read_metrics(file) if file.is_file() else {}
    done = max((int(steps[-1]) for steps, _ in metrics.values() if steps), default=0)
    versions = _table(workdir / "versions.json") or {}
    sections = [
        page.Section("Result", [page.Cards(cards(metrics))] if metrics else []),
        page.Section("Training", report.curves(losses(metrics))),
        page.Section("Samples", samples(workdir)),
        page.Section("Data skipped or cut", skipped(metrics)),
        page.Section("Speed", report.curves(speed(metrics))),
        page.Section("Options", [options(config)]),
        page.Section("Run", report.facts({"workdir": workdir.resolve(), **versions})),
    ]
    title = f"{config.get('recipe', 'run')}, stage {config.get('stage', '?')}"
    return page.Page(title, lead(config, done), sections)


def lead(config: dict, done: int) -> str:
    """What this run was, in a sentence or two; says so where it was too short to teach anything."""
    wanted = config.get("steps", 0)
    sources = config.get("data", {}).get("sources") or ()
    names = ", ".join(str(pathlib.PurePath(str(one.get("path", "")))) for one in sources)
    read = f" Data: {names}." if names else ""
    if done <= FEW:
        return SHORT.format(steps=done) + read
    of = "" if done >= wanted else f" of {wanted}"
    return f"{done}{of} steps with {config.get('batch_size')} rows each.{read}"


def cards(metrics: dict) -> list[page.Card]:
    """The last value of every loss, also of the evaluations, and the first one beside it."""
    names = [n for n in metrics if _is_loss(n) and "/" not in n]
    return [
        page.Card(name, f"{values[-1]:.4g}", note=f"step {steps[-1]}; first: {values[0]:.4g}")
        for name, (steps, values) in ((n, metrics[n]) for n in names)
    ]


def _is_loss(name: str) -> bool:
    last = name.rpartition(".")[2].partition("/")[0]
    return last == "loss" or last.endswith("_loss")


def losses(metrics: dict) -> list[report.Curve]:
    """A chart for every metric, with its values for each source; those of speed are elsewhere."""
    apart = ("positions_per_second", "images_per_second", "goodput", "hbm", "checkpoint", "tflops")
    groups: dict[str, dict[str, tuple]] = {}
    for name, line in metrics.items():
        if name not in (*SPEED, "seconds_left") and not name.startswith((*apart, SKIPPED)):
            groups.setdefault(name.partition("/")[0], {})[name] = line
    ordered = sorted(groups.items(), key=lambda pair: not _is_loss(pair[0]))
    return [report.Curve(title, _apart(title, lines)) for title, lines in ordered if _long(lines)]


def _apart(name: str, lines: dict[str, tuple]) -> dict[str, tuple]:
    """The lines without a second one of the same values: that of the only source."""
    return {n: line for n, line in lines.items() if n == name or line != lines.get(name)}


def _long(lines: dict[str, tuple]) -> bool:
    return any(len(steps) > 1 for steps, _ in lines.values())


def speed(metrics: dict) -> list[report.Curve]:
    return [
        report.Curve(title, {name: metrics[name]})
        for name, title in SPEED.items()
        if name in metrics and len(metrics[name][0]) > 1
    ]


def skipped(metrics: dict) -> list:
    """Samples that were skipped or cut, by source and reason: the counts at the end of the run."""
    if not metrics:
        return []
    rows = [
        [*name.removeprefix(SKIPPED).rpartition("/")[::2], f"{values[-1]:g}"]
        for name, (_, values) in sorted(metrics.items())
        if name.startswith(SKIPPED) and values[-1]
    ]
    if not rows:
        return [page.Text("No sample was skipped or cut.")]
    return [page.Table(["source", "reason", page.Number("samples")], rows)]


def samples(workdir: pathlib.Path) -> list:
    """The samples that each evaluation showed last."""
    newest: dict[str, dict] = {}
    for file in sorted((workdir / "samples").glob("*.json")):
        table = _table(file) or {}
        newest[table.get("evaluation", file.stem)] = table
    blocks = []
    for name, table in newest.items():
        blocks.append(page.Text(f"Evaluation “{name}”, after step {table.get('step')}:"))
        cells = [_cell(workdir / "samples", one) for one in table.get("samples", ())]
        blocks.append(page.ImageGrid(cells, height=112, beside=True))
    return blocks


def _cell(folder: pathlib.Path, sample: dict) -> page.Cell:
    import PIL.Image

    images = []
    for label, name in sample["images"].items():
        file = folder / pathlib.PurePath(name).name
        if file.is_file():
            with PIL.Image.open(file) as image:
                images.append(page.Image(np.asarray(image.convert("RGB")), label))
    lines = [page.Line(", ".join(sample["images"]), "strong")] if images else []
    for label, text in sample["text"].items():
        lines.append(page.Line(f"{label}: {text.strip() or '(empty)'}"))
    return page.Cell(images, lines, str(sample["name"]))


def options(config: dict) -> page.Table:
    """Every option of the run, by its dotted name."""
    rows = [[name, "" if value is None else str(value)] for name, value in _flat(config)]
    return page.Table((), rows, code=True)


def _flat(value, name: str = ""):
    """(dotted name, value) of every option; entries with a name of their own are called by it."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        value = {str(one.get("name", k)): one for k, one in enumerate(value)}
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _table(file: pathlib.Path) -> dict | None:
    """A JSON object; None if there is no such file."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object")
    return found
