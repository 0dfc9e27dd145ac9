"""`metamorph eval`: scores a model on benchmarks.

    metamorph eval --workdir RUN --tasks pope,mme --bench-root BENCHES
    metamorph eval --checkpoint hf:OWNER/NAME --tasks seed:form=choose --out RESULTS
    metamorph eval --endpoint MODEL --tasks pope --out RESULTS          # at $OPENAI_BASE_URL
    metamorph eval --list

The files of a task are in BENCHES/TASK, as `docs/evaluation.md` says. Answers are kept in `--out`
as they come, and the same command started again continues; see `eval/bench.py` for what is there.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import sys

from metamorph_jax import distributed, endpoint, files
from metamorph_jax.errors import UserError
from metamorph_jax.lock import Lock
from metamorph_jax.sampling import generate

MOST_RESAMPLES = 100_000


def add_arguments(parser) -> None:
    parser.description = "Scores a model on benchmarks, from their official files."
    generate.add_model_arguments(parser)
    parser.add_argument(
        "--endpoint", metavar="MODEL",
        help="in place of --workdir or --checkpoint: a model of an OpenAI-compatible endpoint",
    )  # fmt: skip
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks", metavar="NAME,…", default="",
        help="names, with options after a colon: pope, seed:form=choose; separated by commas, or "
        "by spaces where options hold commas",
    )  # fmt: skip
    group.add_argument("--list", action="store_true", help="list the tasks and their files")
    group.add_argument(
        "--bench-root", metavar="DIR", default="bench",
        help="folder with a folder for each task (default: bench)",
    )  # fmt: skip
    group.add_argument(
        "--limit", type=int, default=0, metavar="N",
        help="at most so many questions of a task, drawn by chance (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--resamples", type=int, metavar="N",
        help="of the bootstrap for confidence intervals; 0 leaves them out",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=8, help="answers at a time")
    group = parser.add_argument_group("judge", "for tasks whose answers are judged")
    group.add_argument(
        "--judge", default="", metavar="SPEC",
        help="endpoint:MODEL, the workdir of a run, or published weights",
    )  # fmt: skip
    group.add_argument(
        "--judge-config",
        default="",
        metavar="FILE[:SIZE]",
        help="what published weights are (default: what their config.json says)",
    )
    group.add_argument("--judge-workdir", help=argparse.SUPPRESS)  # of earlier versions
    group.add_argument("--judge-temperature", type=float, default=0.0, help="default: 0")
    endpoint.add_arguments(parser)
    generate.add_decoding_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="where results go (default: WORKDIR/eval)")
    distributed.add_arguments(parser)


def run(args) -> int:
    from metamorph_jax.eval import bench, tasks

    if args.list:
        print(listing())
        return 0
    chosen = [tasks.make(spec, args.bench_root) for spec in names(args.tasks)]
    if not chosen:
        raise UserError("give --tasks NAME,…; --list shows them")
    if len({tasks.file_name(task.name) for task in chosen}) < len(chosen):
        raise UserError("--tasks has a task twice")
    check_model(args)
    out = pathlib.Path(args.out or (pathlib.Path(args.workdir) / "eval" if args.workdir else ""))
    if not args.out and not args.workdir:
        raise UserError("give --out DIR, where results go")
    if args.limit < 0 or not 0 <= (args.resamples or 0) <= MOST_RESAMPLES:
        raise UserError(f"--limit must not be negative, --resamples from 0 to {MOST_RESAMPLES:,}")
    drawing = [task.name for task in chosen if task.form == "draw"]
    if drawing and args.endpoint:
        raise UserError(f"{', '.join(drawing)}: drawing needs a model of ours, not an endpoint")
    for task in chosen:  # before the model is loaded, which takes longer
        if next(bench.questions_of(task), None) is None:
            raise UserError(f"task {task.name}: its files hold no questions")
    place = distributed.join_asked(args)
    try:
        with contextlib.closing(locked(out)):
            return evaluate(args, chosen, out)
    except UserError as error:
        if place is None:
            raise
        # The others may be waiting for this host, or it for them.
        print(f"metamorph eval: process {place.process}: {error}", file=sys.stderr)
        distributed.leave(error.code)


def locked(out: pathlib.Path):
    """A lock on the folder with results, of the first process; others write nothing there."""
    import jax

    if jax.process_index():
        return contextlib.ExitStack()  # nothing to close
    lock = Lock(out, "evaluates", "--out")
    if lock.message:
        print(lock.message, file=sys.stderr)
    return lock


def check_model(args) -> None:
    """Raises UserError where options of the model or the judge contradict each other."""
    if args.endpoint and (args.workdir or args.checkpoint):
        raise UserError("--endpoint answers in place of --workdir or --checkpoint: give one")
    from metamorph_jax.eval import judges

    if args.judge_workdir:
        where = files.shown(args.judge_workdir)
        raise UserError(f"--judge-workdir is --judge now: give --judge {where}")
    if args.judge_config and not args.judge:
        raise UserError("--judge-config goes with --judge")
    if not args.judge.startswith(judges.ENDPOINT):  # that has options of its own
        judges.check_judge(args.judge)
    if not args.endpoint:
        generate.check_model(args)


def names(text: str) -> list[str]:
    """The tasks that --tasks names.

    Commas and spaces separate tasks; a comma that is followed by OPTION=VALUE, without a colon,
    separates options, and after OPTION=VALUE a space separates words of the value unless a task
    follows.
    """
    from metamorph_jax.eval import tasks

    found: list[str] = []
    for between, part in re.findall(r"([ ,]*)([^ ,]+)", text):
        task = part.partition(":")[0] in tasks.TASKS or re.match(r"[\w.]+\.\w+:\w", part)
        if found and "=" in part and ":" not in part:
            found[-1] += f",{part}"
        elif found and "=" in found[-1] and "," not in between and not task:
            found[-1] += f" {part}"
        else:
            found.append(part)
    return found


def evaluate(args, chosen, out: pathlib.Path) -> int:
    """Loads the model, runs the tasks one by one, and shows what has been found so far."""
    import jax

    from metamorph_jax.eval import bench, judges, results_page

    options = generate.decoding_options(args, args.batch_size)
    model = named(args)
    asks = args.endpoint or args.judge.startswith(judges.ENDPOINT)
    client = endpoint.open_endpoint(args) if asks else None
    judge = open_judge(args, client, options)
    answering = open_model(args, client)
    if drawing := [task.name for task in chosen if task.form == "draw"]:
        if answering.image_decoder is None:
            raise UserError(f"{', '.join(drawing)}: drawing needs --decoder: this model has no "
                            "image decoder of its own")  # fmt: skip
        model["drawing"] = dataclasses.asdict(answering.image_decoder.sampling)
    settings = bench.Settings(options, args.limit, args.resamples, model)
    results, wrong = [], 0
    for task in chosen:
        try:
            results.append(bench.run_task(task, answering, out, settings, judge))
        except UserError as error:  # the other tasks don't suffer
            if jax.process_count() > 1:
                raise  # it may be this host's alone
            print(files.escape(f"{task.name} failed: {error}"), file=sys.stderr)
            wrong += 1
    if results and jax.process_index() == 0:
        bench.save(results, out)
        print(results_page.table(results))
        title = str(args.workdir or args.checkpoint or args.endpoint)
        print(f"report: {results_page.write(out / 'report.html', results, title).resolve()}")
    if client is not None:
        print(f"{client.url}: {spent(client)}", file=sys.stderr)
    if wrong:
        raise UserError(f"{wrong} of {len(chosen)} tasks could not be run, for the reasons above")
    if failed := sum(len(result.failures) for result in results):
        raise UserError(f"{failed} questions could not be asked, for the reasons above")
    return 0


def open_model(args, client):
    """Who answers."""
    import jax

    from metamorph_jax.eval.judges import EndpointModel

    if not args.endpoint:
        return generate.load(args)
    if jax.process_count() > 1:
        raise UserError("an endpoint is asked by one process")
    return EndpointModel(client, args.endpoint, client.limits.concurrency)


def open_judge(args, client, options):
    """The `judge` of `bench.run_task`: what the command line names, or None."""
    from metamorph_jax.eval.judges import ENDPOINT, EndpointModel, Judge

    if not args.judge:
        return None
    options = dataclasses.replace(
        options, max_new_tokens=1024, temperature=args.judge_temperature, guidance=()
    )
    if args.judge.startswith(ENDPOINT):
        name = args.judge.removeprefix(ENDPOINT)
        model = EndpointModel(client, name, client.limits.concurrency)
        return Judge(model, f"{name} at {client.url}", options).of
    from metamorph_jax import api

    mesh, config = generate.parse_mesh(args.mesh), args.judge_config or None
    model = api.load(args.judge, config=config, mesh=mesh).generator
    options, place = dataclasses.replace(options, max_new_tokens=None), pathlib.Path(args.judge)
    name = f"{args.judge} {fingerprint(place)}" if place.is_dir() else args.judge
    return Judge(model, name, options).of


def spent(client) -> str:
    """What an endpoint was asked, in a line."""
    use = client.usage
    text = (f"{use.calls:,} calls, {use.prompt_tokens:,} tokens read, {use.completion_tokens:,} "
            f"written, {use.retries:,} retries")  # fmt: skip
    return text if client.cost is None else f"{text}, cost {client.cost:.2f}"


def named(args) -> dict:
    """What the answers depend on, apart from task and decoding: the model's name and weights."""
    if args.endpoint:
        return {"endpoint": args.endpoint}
    keys = "workdir checkpoint config recipe decoder weights context steps force_end parity"
    keys += " flow" if args.flow else ""
    found = {key: getattr(args, key) for key in keys.split()}
    found["overrides"] = dict(sorted(args.overrides.items()))
    for key in "workdir checkpoint decoder".split():
        place = pathlib.Path(getattr(args, key) or "")
        if getattr(args, key) and place.is_dir():
            found[f"{key}_files"] = fingerprint(place)
    return found


def fingerprint(folder: pathlib.Path) -> str:
    """A hash of names, sizes and times of the weights in a folder, to notice that they changed."""
    folder = pathlib.Path(folder)
    final = folder / "final"
    weights = sorted(p for p in (final if final.is_dir() else folder).rglob("*") if p.is_file())
    stats = [(str(p.relative_to(folder)), p.stat().st_size, int(p.stat().st_mtime))
             for p in weights if not str(p.relative_to(folder)).startswith("eval/")]  # fmt: skip
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def listing() -> str:
    """The tasks with their options, and the files that each reads."""
    from metamorph_jax.eval import tasks

    lines = []
    for name in sorted(tasks.TASKS):
        cls = tasks.find(tasks.TASKS[name])
        own = [f for f in dataclasses.fields(cls) if f.name not in ("root", "name")]
        given = ", ".join(f"{f.name}={f.default}" for f in own)
        lines.append(f"{name}: {cls.title}" + (f" ({given})" if given else ""))
        lines += [f"  {name}/{file.path}: {file.what}, from {file.source}" for file in cls.files]
    return "\n".join(lines)
