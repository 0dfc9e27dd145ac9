"""`metamorph data generate`: a language model writes instruction data about images.

    export OPENAI_BASE_URL=http://localhost:8000/v1
    metamorph data generate --kind conversation --captions captions_train2017.json \\
        --image-prefix train2017 --model Qwen3-32B --out instruct
    metamorph data generate --kind detail --images photos --model gpt-4o --out instruct
    metamorph data generate --kind reasoning --contexts mine.jsonl --workdir RUN --out instruct

What is known of an image (`contexts.py`) goes to an OpenAI-compatible endpoint, or to a model of
ours, with a system message and examples; the replies become samples in LLaVA's format. Of images
without captions, a first step has the model write some. In `--out` there will be:

    KIND_replies.jsonl        every reply, as soon as it is there
    captions_replies.jsonl    those of the first step
    KIND.json                 the samples; captions.jsonl for `--kind captions`

The same command started again asks only for what is missing. See docs/data.md.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

from metamorph_jax import endpoint
from metamorph_jax.errors import BadSample, DataError, UserError
from metamorph_jax.files import shown
from metamorph_jax.instruct import contexts as read
from metamorph_jax.instruct import kinds
from metamorph_jax.instruct.contexts import Context
from metamorph_jax.instruct.kinds import CAPTIONS, KINDS, Kind
from metamorph_jax.instruct.samples import Task
from metamorph_jax.instruct.steps import Step, Tally, Writer
from metamorph_jax.instruct.writers import Clock, Settings, ask_endpoint, ask_model
from metamorph_jax.sampling import generate

MOST_TEMPERATURE = 100.0
# Stands for captions that --dry-run does not ask for.
_LATER = ("(a sentence that the model will have written about this image)",) * 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "A language model writes instruction data about images."
    parser.add_argument("--kind", required=True, choices=list(KINDS), help="what is written")
    parser.add_argument("--out", required=True, metavar="DIR", help="where it goes")
    group = parser.add_argument_group("images", "one of --captions, --contexts and --images")
    group.add_argument("--captions", metavar="FILE", help="COCO's captions_*.json")
    group.add_argument("--instances", metavar="FILE", help="COCO's instances_*.json: boxes")
    group.add_argument(
        "--image-prefix",
        default="",
        metavar="PATH",
        help="put before COCO's file names, e.g. train2017",
    )
    group.add_argument(
        "--contexts", metavar="FILE.jsonl", help="lines of id, image, captions and instances"
    )
    group.add_argument(
        "--images",
        metavar="DIR",
        help="folder of images; alone, all images in it, which a model captions "
        "first; with the others, images that are not in it are left out",
    )
    group.add_argument("--limit", type=int, default=0, metavar="N", help="the first N images")
    group = parser.add_argument_group("writing")
    group.add_argument("--model", metavar="NAME", help="of the endpoint")
    group.add_argument(
        "--shots",
        metavar="DIR",
        help="your own system_message.txt and pairs *_caps.txt, *_conv.txt",
    )
    group.add_argument(
        "--temperature",
        type=_temperature,
        default=0.7,
        help="default: 0.7; none leaves it to the endpoint",
    )
    group.add_argument("--max-tokens", type=int, default=1024, help="of a reply")
    group.add_argument("--seed", type=int, default=0, help="of all that is drawn by chance")
    group.add_argument(
        "--send-seed", action="store_true", help="send the seed to the endpoint; some refuse it"
    )
    group.add_argument(
        "--redo", action="store_true", help="ask again where the reply could not be used"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print prompts and what they would cost; nothing is asked",
    )
    endpoint.add_arguments(parser)
    group = parser.add_argument_group("a model of ours", "in place of --model")
    group.add_argument("--workdir", help="of a finished training stage")
    group.add_argument("--checkpoint", metavar="SPEC", help="published weights")
    group.add_argument("--config", metavar="FILE[:SIZE]", help="the config of --checkpoint")
    group.add_argument("--recipe", metavar="MODULE", help="your own recipe of --workdir")
    group.add_argument("--mesh", metavar="AXIS=SIZE,…", help="see metamorph generate")
    group.add_argument("--batch-size", type=int, default=8, help="replies at a time")  # fmt: skip


def _temperature(text: str) -> float | None:
    value = None if text == "none" else float(text)
    if value is not None and not 0 <= value <= MOST_TEMPERATURE:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to {MOST_TEMPERATURE:g}, or none")
    return value


def run(args) -> int:
    _check(args)
    skipped = Tally()
    try:
        _run(args, KINDS[args.kind], skipped)
    finally:
        skipped.print("left out")
    return 0


def _run(args, kind: Kind, skipped: Tally) -> None:
    steps = {one: _step(args, one, skipped) for one in (CAPTIONS, kind)}
    found = _contexts(args, skipped)
    bare = [context for context in found if not context.captions]
    if args.dry_run:
        if bare:
            steps[CAPTIONS].dry_run(bare)
            found = [dataclasses.replace(c, captions=c.captions or _LATER) for c in found]
        if kind is not CAPTIONS:
            steps[kind].dry_run(found)
    else:
        _make_folder(args.out)
        _write(steps, kind, found, bare, _writer(args))


def _write(steps, kind: Kind, found: list[Context], bare: list[Context], writer) -> None:
    if bare:
        captions = steps[CAPTIONS].captions(bare, writer)
        found = [dataclasses.replace(c, captions=c.captions or captions.get(c.id, ()))
                 for c in found]  # fmt: skip
        found = [context for context in found if context.captions]
    if kind is CAPTIONS:
        steps[kind].write_contexts(found)
    elif found:
        steps[kind].samples(found, writer)
    else:
        raise DataError("no image got a caption, so there is nothing to write about")


def _step(args, kind: Kind, skipped: Tally) -> Step:
    opening = kinds.opening(kind, args.shots)
    task = Task(kind, opening, _settings(args), args.seed, args.images or "")
    return Step(task, pathlib.Path(args.out), skipped, endpoint.price_of(args), args.redo)


def _check(args) -> None:
    sources = [args.captions, args.contexts, args.images]
    if args.captions and args.contexts or not any(sources):
        raise UserError("give one of --captions, --contexts and --images")
    if (args.instances or args.image_prefix) and not args.captions:
        raise UserError("--instances and --image-prefix go with --captions")
    if sum(map(bool, (args.model, args.workdir, args.checkpoint))) != 1:
        raise UserError("give one of --model (of an endpoint), --workdir and --checkpoint")
    if bool(args.checkpoint) != bool(args.config):
        raise UserError("--checkpoint needs --config FILE[:SIZE], and --config goes with it")
    if args.limit < 0 or args.max_tokens < 1:
        raise UserError("--limit must be at least 0, and --max-tokens at least 1")
    if not args.model and args.temperature is None:
        raise UserError("--temperature none is for endpoints; give a number")
    endpoint.limits_of(args), endpoint.price_of(args)


def _contexts(args, skipped: Tally) -> list[Context]:
    """The images that are asked about.

    Raises:
        FileError: a file can't be read.
        DataError: there is not one image.
    """
    if args.captions:
        found = read.read_coco(args.captions, args.instances, args.image_prefix, skipped.add)
    elif args.contexts:
        found = read.read_lines(args.contexts, skipped.add)
    else:
        found = read.read_folder(args.images, skipped.add)
    found = found[: args.limit or None]
    usable = []
    for context in found:
        if args.images and not os.path.isfile(os.path.join(args.images, context.image)):
            skipped.add(BadSample("missing", context.image), context.id)
        elif not context.captions and not args.images:
            skipped.add(BadSample("no_captions", "--images DIR lets a model caption it"),
                        context.id)  # fmt: skip
        else:
            usable.append(context)
    if not usable:
        raise DataError("there is no image to write about")
    return usable


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {shown(path)} can't be written: {error.strerror}") from error


# ---- who writes


def _settings(args) -> dict:
    """All that replies depend on beside the prompts."""
    names = ["temperature", "max_tokens"]
    if args.model:
        names += ["model", *(["seed"] if args.send_seed else [])]
    else:
        names += ["seed", "workdir", "checkpoint", "config", "overrides"]
    return {name: getattr(args, name) for name in names}


def _writer(args) -> Writer:
    """The writer that the command line names; a model is loaded when it is first asked."""
    return _EndpointWriter(args) if args.model else _ModelWriter(args)


class _EndpointWriter:
    def __init__(self, args):
        self._clock = Clock()
        self._endpoint = endpoint.open_endpoint(args, self._clock)
        seed = args.seed if args.send_seed else None
        self._settings = Settings(args.model, args.temperature, args.max_tokens, seed)

    def ask(self, jobs, taken, failed) -> None:
        made = self._endpoint
        try:
            ask_endpoint(made, jobs, self._settings, taken, failed, made.limits.concurrency,
                         self._clock.over)  # fmt: skip
        finally:
            used = made.usage
            line = f"{made.url}: {used.calls} answers so far, {used.retries} tries repeated"
            if used.uncounted:
                line += f"; the tokens of {used.uncounted} were not counted by it"
            print(line, file=sys.stderr)


class _ModelWriter:
    def __init__(self, args):
        self._args, self._generator = args, None

    def ask(self, jobs, taken, failed) -> None:
        from metamorph_jax.sampling.options import Options

        args = self._args
        try:
            options = Options(args.max_tokens, args.temperature, seed=args.seed,
                              batch_size=args.batch_size)  # fmt: skip
        except ValueError as error:
            raise UserError(error) from error
        self._generator = self._generator or self._load()
        ask_model(self._generator, jobs, options, taken, failed)

    def _load(self):
        import jax

        from metamorph_jax import recipe
        from metamorph_jax.sampling.trained import load_generator

        args = self._args
        if jax.process_count() > 1:
            raise UserError("data generate runs on one host")
        if args.recipe:
            recipe.find(args.recipe)
        return load_generator(
            args.workdir, weights_of=args.checkpoint, config=args.config, overrides=args.overrides,
            mesh=generate.parse_mesh(args.mesh),
        )  # fmt: skip
