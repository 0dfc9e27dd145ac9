"""The quick start over seeds: mean, worst and spread of every target, against the goals.

    python benchmarks/quickstart.py --seeds 3 [--precision float32|bfloat16] [--workdir DIR]
    python benchmarks/quickstart.py --seeds 3 --head flow     # a vision head that samples
    python benchmarks/quickstart.py --table            # of the files that are there, a second
    python benchmarks/quickstart.py --table --picture notebooks/quickstart.png

Every run is `metamorph quickstart` in a folder of its own; after an interruption, the same command
resumes it. A finished run leaves one small file in `--results`, named after its seed, head,
precision and CPU, and is not run again while that file is there. The files can be committed, and
those of several machines lie side by side: each CPU, precision and head has a table of its own, in
`table.md` and `table.json`. Remove the files of older code: all that are there are counted.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/quickstart"
MINUTES = {"float32": 25, "bfloat16": 18}  # on two idle cores; bfloat16 with matrix units


@dataclasses.dataclass(frozen=True)
class Target:
    """A number that each run measures, and what the mean and the worst of the seeds should reach.

    Attributes:
        mean: None for a number without a goal.
        worst: None where only the mean has a goal.
        share: whether it is shown in percent.
        at_most: less is better.
    """

    title: str
    mean: float | None = None
    worst: float | None = None
    share: bool = True
    at_most: bool = False


TARGETS = {
    "accuracy": Target("held-out questions", 0.95, 0.92),
    "tokens_right": Target("visual tokens of the requested colour and shape", 0.90, 0.85),
    "drawings_right": Target("drawings of the requested colour and shape", 0.93, 0.88),
    "held_out_right": Target("drawings of pairs that training never drew", 0.80),
    "overlap": Target("overlap with the best-fitting shape (median IoU)", 0.90),
    "one_shape": Target("drawings with exactly one shape", 0.95),
    "place_spread": Target("spread of the drawn shapes' places, pixels", share=False),
    "size_spread": Target("spread of their sizes, pixels", share=False),
    "minutes": Target("minutes, downloads excluded", 25, share=False, at_most=True),
}


def record(workdir: pathlib.Path, command: str) -> dict:
    """What a finished run measured: {seed, size, precision, cpu, …, targets, minutes}."""
    from metamorph_jax.platforms import cpu_name, has_matrix_units
    from metamorph_jax.quickstart.run import QuickStart
    from metamorph_jax.quickstart.steps import cores
    from metamorph_jax.train.workdir import versions

    settings = json.loads((workdir / "quickstart.json").read_text())
    start = QuickStart(workdir, **settings)
    steps = {name: start.done(name) for name in start.steps}
    found = json.loads((workdir / "evaluation/evaluation.json").read_text())
    minutes = {name: round(step["seconds"] / 60, 2) for name, step in steps.items()}
    made = versions()
    return {
        **settings,
        "head": start.head,
        "cpu": cpu_name(),
        "cores": cores(),
        "matrix_units": has_matrix_units(),
        "command": command,
        "commit": made["git_commit"],
        "jax": made["jax"],
        "interrupted": sum(step["interrupted"] for step in steps.values()),
        "targets": {name: found[name] for name in TARGETS if name in found}
        | {"minutes": round(sum(minutes.values()), 2)},
        "minutes": minutes,
    }


def file_name(seed: int, head: str, precision: str, cpu: str) -> str:
    """Of the result of a run."""
    words = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b", " ", cpu)
    short = "-".join(re.findall(r"[A-Za-z0-9.]+", words)).lower()
    return f"seed{seed}-{head}-{precision}-{short}.json"


def run(seed: int, head: str, precision: str, workdir: pathlib.Path, smoke: bool) -> None:
    """One quick start, in a process of its own."""
    command = [sys.executable, "-m", "metamorph_jax", "quickstart", f"--seed={seed}"]
    command += [f"--head={head}", f"--precision={precision}", f"--workdir={workdir}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # As `launch/quickstart.sh` does.
    tuned = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONPATH": os.pathsep.join(paths)}
    command += ["--smoke"] if smoke else []
    subprocess.run(command, check=True, env={**os.environ, **tuned})


def read(results: pathlib.Path) -> dict[tuple[str, str, str], list[dict]]:
    """(CPU, precision, head) -> results by seed."""
    found: dict[tuple[str, str, str], list[dict]] = {}
    for file in sorted(results.glob("seed*.json")):
        one = json.loads(file.read_text())
        found.setdefault((one["cpu"], one["precision"], one["head"]), []).append(one)
    return {key: sorted(ones, key=lambda one: one["seed"]) for key, ones in sorted(found.items())}


def summary(runs: list[dict]) -> dict[str, dict]:
    """Target -> {mean, worst, spread, seeds, goal, goal_worst, reached}; the spread is the largest
    minus the smallest, and `reached` is None where there is no goal."""
    found = {}
    for name, target in TARGETS.items():
        values = [one["targets"].get(name) for one in runs]
        if None in values:
            continue
        mean, worst = statistics.mean(values), (max if target.at_most else min)(values)
        goal = MINUTES[runs[0]["precision"]] if name == "minutes" else target.mean
        reached = None
        if goal is not None:
            met = mean <= goal if target.at_most else mean >= goal
            reached = met and (target.worst is None or worst >= target.worst)
        found[name] = {
            "mean": mean, "worst": worst, "spread": max(values) - min(values), "seeds": values,
            "goal": goal, "goal_worst": target.worst, "reached": reached,
        }  # fmt: skip
    return found


def median_run(runs: list[dict]) -> dict:
    """The run in the middle by right drawings, then by overlap; of two, the worse."""
    order = sorted(runs, key=lambda r: (r["targets"]["drawings_right"], r["targets"]["overlap"]))
    return order[(len(order) - 1) // 2]


def table(runs: list[dict]) -> str:
    """The runs of one CPU, precision and head as Markdown."""
    first, lines = runs[0], []
    units = "with" if first["matrix_units"] else "without"
    seeds = ", ".join(str(one["seed"]) for one in runs)
    lines += [
        f"{first['cpu']}, {first['cores']} cores, {units} matrix units; vision head "
        f"{first['head']}, products in {first['precision']}; seeds {seeds}, the median run is that "
        f"of seed {median_run(runs)['seed']}. `{first['command']}`",
        "",
        f"| | goal: mean | goal: worst | mean | worst | spread | seeds {seeds} | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in summary(runs).items():
        shown = lambda v, t=TARGETS[name]: (  # noqa: E731
            "" if v is None else f"{100 * v:.1f} %" if t.share else f"{v:.1f}"
        )
        numbers = [row["goal"], row["goal_worst"], row["mean"], row["worst"], row["spread"]]
        cells = [TARGETS[name].title, *map(shown, numbers), ", ".join(map(shown, row["seeds"]))]
        cells.append({True: "reached", False: "missed", None: ""}[row["reached"]])
        lines.append(f"| {' | '.join(cells)} |")
    commits = sorted({str(one["commit"])[:10] for one in runs})
    steps = ", ".join(
        f"{step} {statistics.mean(one['minutes'][step] for one in runs):.1f}"
        for step in first["minutes"]
    )
    lines += ["", f"Minutes of each step, mean: {steps}. Code: {', '.join(commits)}."]
    if any(one["interrupted"] for one in runs):
        lines.append("Some runs were interrupted and resumed.")
    return "\n".join(lines)


def write_tables(results: pathlib.Path) -> str:
    """Writes table.md and table.json, and returns the first."""
    groups = read(results)
    text = "\n\n".join(map(table, groups.values())) + "\n"
    tables = [
        {"cpu": cpu, "precision": precision, "head": head, "runs": len(runs),
         "command": runs[0]["command"], "median_seed": median_run(runs)["seed"],
         "targets": summary(runs)}
        for (cpu, precision, head), runs in groups.items()
    ]  # fmt: skip
    (results / "table.md").write_text(text)
    (results / "table.json").write_text(json.dumps(tables, indent=1) + "\n")
    return text


def picture(drawings, file: pathlib.Path) -> None:
    """All drawings of a run: a column per colour, a row per shape and seed of the decoder.

    Args:
        drawings: uint8[requests, 2, h, w, 3], requests in the order of `data.draw_requests`.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    from metamorph_jax.quickstart.data import COLORS, SHAPES

    side, gap, left, top = 128, 6, 110, 36
    step, seeds = side + gap, drawings.shape[1]
    size = (left + step * len(COLORS), top + step * len(SHAPES) * seeds)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for c, color in enumerate(COLORS):
        x = left + step * c
        pen.text((x + side / 2, top / 2), color, "black", font, anchor="mm")
        for s in range(len(SHAPES)):
            for k in range(seeds):
                y = top + step * (s * seeds + k)
                image = Image.fromarray(np.asarray(drawings[c * len(SHAPES) + s, k]))
                pen.rectangle((x - 1, y - 1, x + side, y + side), outline="lightgray")
                sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
    for s, shape in enumerate(SHAPES):
        y = top + step * (s + 0.5) * seeds
        pen.text((left - 14, y), shape, "black", font, anchor="rm")
    sheet.quantize(256).save(file, optimize=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs, with seeds 0, 1, … (3)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"),
        help="of matrix products (default: bfloat16 on CPUs with matrix units)",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=("mlp", "flow"), default="mlp", help="vision head, see the quick start"
    )
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        default="quickstart-seeds",
        help="a folder per run goes here",
    )
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        help=f"folder of the small files ({RESULTS.relative_to(ROOT)})",
    )
    parser.add_argument("--table", action="store_true", help="only the table, nothing is run")
    parser.add_argument("--picture", metavar="FILE", help="draws the median run's drawings")
    parser.add_argument("--smoke", action="store_true", help="toy size; results in the workdir")
    args = parser.parse_args()
    args.workdir = args.workdir.expanduser().resolve()
    args.results = args.results or (args.workdir / "results" if args.smoke else RESULTS)
    return args


def run_missing(args: argparse.Namespace, cpu: str) -> None:
    """Runs the seeds that have no result of this CPU and precision."""
    args.results.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/quickstart.py --seeds {args.seeds} --precision {args.precision}"
    command += f" --head {args.head}" if args.head != "mlp" else ""
    for seed in range(args.seeds):
        file = args.results / file_name(seed, args.head, args.precision, cpu)
        if file.is_file():
            print(f"seed {seed}: {file} is there", flush=True)
            continue
        run(seed, args.head, args.precision, folder(args, seed), args.smoke)
        file.write_text(json.dumps(record(folder(args, seed), command), indent=1) + "\n")


def folder(args: argparse.Namespace, seed: int) -> pathlib.Path:
    """The workdir of a run."""
    return args.workdir / f"seed{seed}-{args.head}-{args.precision}"


def draw_median(args: argparse.Namespace, runs: list[dict]) -> None:
    """Writes the picture of the median run."""
    import numpy as np

    median = folder(args, median_run(runs)["seed"])
    drawings = median / "evaluation/drawings.npz"
    if not drawings.is_file():
        sys.exit(f"{drawings} of the median run is not there: see --workdir")
    picture(np.load(drawings)["drawings"], pathlib.Path(args.picture))


def main() -> int:
    args = arguments()
    from metamorph_jax import platforms

    platforms.prepare()
    from metamorph_jax.quickstart.steps import bfloat16_is_faster

    args.precision = args.precision or ("bfloat16" if bfloat16_is_faster() else "float32")
    cpu = platforms.cpu_name()
    if not args.table:
        run_missing(args, cpu)
    groups = read(args.results)
    if not groups:
        sys.exit(f"{args.results} has no results yet: leave --table out")
    print(f"\n{write_tables(args.results)}")
    if args.picture:
        mine = cpu, args.precision, args.head
        if mine not in groups:
            sys.exit(f"no results of {', '.join(mine)}: see --precision and --head")
        draw_median(args, groups[mine])
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
