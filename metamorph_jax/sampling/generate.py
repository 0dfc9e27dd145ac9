"""`metamorph generate`: a trained model answers, draws, edits and thinks visually.

    metamorph generate --workdir RUN --prompt "What is this?" --image cat.jpg
    metamorph generate --workdir RUN --decoder RUN2 --prompt "Draw a red circle." --out drawings
    metamorph generate --workdir RUN --prompts questions.jsonl --out answers

Pictures stand where the prompt says `<image>`, else in front of it on a line of their own. A line
of a JSONL file is {"id": …, "prompt": …, "images": […] or "image": …, "video": …}, paths relative
to the file. What comes out, in `--out`:

    results.jsonl        one line per prompt as soon as it is done; started again, these are skipped
    segments.json        all of them as one list, at the end
    ID_picture0.npy      the visual tokens of a picture, float32[P, C]
    ID_picture0_scale7.5.png   drawn from them, for each guidance scale
"""

import collections
import dataclasses
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from metamorph_jax.errors import BadSample, UserError
from metamorph_jax.sampling import WEIGHTS
from metamorph_jax.sampling.requests import Request, read_requests


def add_arguments(parser) -> None:
    parser.description = "Answers prompts with text and pictures."
    group = parser.add_argument_group("model")
    group.add_argument("--workdir", help="of a finished training stage")
    group.add_argument(
        "--checkpoint", metavar="SPEC", help="published weights (hf:OWNER/NAME or a folder)"
    )
    group.add_argument("--config", metavar="FILE[:SIZE]", help="the config of --checkpoint")
    group.add_argument(
        "--decoder", metavar="WORKDIR", help="of a decoder stage: draws the pictures"
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", help="one prompt")
    group.add_argument("--prompts", metavar="FILE.jsonl", help="one prompt a line")
    group.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable")
    group.add_argument("--video", metavar="FILE", help="one frame a second of it")
    group.add_argument(
        "--think", action="store_true", help="ask the model to picture the detail first"
    )
    group = parser.add_argument_group("decoding")
    group.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    group.add_argument("--top-k", type=int, default=0, help="0 is all tokens")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument(
        "--max-new-tokens",
        type=int,
        help="visual tokens count (default: 512, or half of the context if that is less)",
    )
    group.add_argument(
        "--weights", choices=WEIGHTS, default="auto",
        help="how the language model's are kept (auto: as it computes); with int8 a TPU or GPU has "
        "half as much to read for each token, a CPU is slower",
    )  # fmt: skip
    group.add_argument("--force-end", action="store_true", help="end pictures after P tokens")
    group.add_argument("--parity", action="store_true", help="faults of the reference included")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--batch-size", type=int, default=8, help="for --prompts")
    group.add_argument("--context", type=int, default=0, help="most positions; 0 as in training")
    group = parser.add_argument_group("drawing")
    group.add_argument(
        "--guidance", type=float, nargs="+", metavar="SCALE",
        help="draw once with each (default: config.model.sampling of --decoder)",
    )  # fmt: skip
    group.add_argument("--steps", type=int, help="of the diffusion sampler (default: likewise)")
    parser.add_argument("--out", metavar="DIR", help="where results go")


def run(args) -> int:
    if bool(args.workdir) == bool(args.checkpoint):
        raise UserError("give either --workdir or --checkpoint")
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("give either --prompt or --prompts")
    numbers = (args.max_new_tokens, args.batch_size, args.steps)
    if any(n is not None and n < 1 for n in numbers):
        raise UserError("--max-new-tokens, --batch-size and --steps must be at least 1")
    if args.decoder and not args.out:
        raise UserError("--decoder draws into files: give --out")
    if args.checkpoint and not args.config:
        raise UserError("--checkpoint needs --config FILE[:SIZE], which says what the model is")
    if args.prompts and (args.image or args.video):
        raise UserError("with --prompts, pictures are named in the file, not by --image or --video")
    bad = 0
    if args.prompts:
        requests, bad = read_requests(args.prompts, args.think)
    else:
        requests = [Request("0", args.prompt, tuple(args.image), args.video or "", args.think)]
    from metamorph_jax.sampling.results import Output
    from metamorph_jax.sampling.text import Sampler

    try:
        sampler = Sampler(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise UserError(error) from error
    out = Output(args.out, settings(args)) if args.out else None
    todo = [r for r in requests if out is None or not out.has(r)]
    if len(todo) < len(requests):
        print(f"{len(requests) - len(todo)} of {len(requests)} were done before", file=sys.stderr)
    if todo:
        from metamorph_jax.sampling.image_decoder import load_image_decoder
        from metamorph_jax.sampling.speaker import load_speaker

        speaker = load_speaker(
            args.workdir, args.checkpoint, args.config, args.overrides, args.weights
        )
        speaker.options = dataclasses.replace(
            speaker.options, sampler=sampler, force_end=args.force_end, parity=args.parity
        )
        speaker.context = args.context or speaker.context
        if args.max_new_tokens is None:
            args.max_new_tokens = min(512, speaker.context // 2)
        image_decoder = load_image_decoder(args.decoder, args.steps) if args.decoder else None
        bad += answer(speaker, image_decoder, todo, args, out, alone=args.prompts is None)
    if out is not None:
        out.finish(requests)
    return 1 if bad else 0


def settings(args) -> dict:
    """What decides the results, apart from the prompts."""
    names = (
        "workdir checkpoint config decoder temperature top_k top_p max_new_tokens force_end parity"
        " seed context guidance steps weights"
    )
    return {name: getattr(args, name) for name in names.split()}


def answer(speaker, image_decoder, requests, args, out, alone: bool) -> int:
    """Decodes all requests, writing each as it is done; returns how many were bad."""
    from metamorph_jax.sampling.results import Voice, describe

    bad = 0

    def prompts() -> Iterator[tuple[Request, np.ndarray]]:
        nonlocal bad
        for request in requests:
            try:
                yield request, speaker.prompt(request, args.max_new_tokens)
            except (BadSample, ValueError, OSError, ImportError) as error:
                if alone:
                    raise UserError(error) from error
                print(f"{request.id}: {error}; skipped", file=sys.stderr, flush=True)
                bad += 1

    size = 1 if alone else args.batch_size
    for batch in batches(prompts(), size):
        # A short batch is filled up, so that it needs no compilation of its own.
        rows = [prompt for _, prompt in batch]
        fill = size - len(rows)
        budgets = [args.max_new_tokens] * len(rows) + [1] * fill
        rows += rows[:1] * fill
        voice = Voice(speaker) if alone else None
        results = speaker.decoder(
            rows, budgets, speaker.options, seeds=[args.seed] * size,
            stream=voice and (lambda new, say=voice: say(new[0])),
        )  # fmt: skip
        if voice:
            voice.end()
        for (request, _), result in zip(batch, results, strict=False):
            record, drawings = describe(speaker, image_decoder, request, result, args)
            if out is not None:
                out.write(request, record, drawings)
            if not alone:
                print(f"{request.id}: {record['text']}", flush=True)
    return bad


def batches(prompts: Iterable, size: int) -> Iterator[list]:
    """Groups (request, prompt) pairs whose prompts fall into the same bucket."""
    from metamorph_jax.sampling.interleaved import bucket

    waiting = collections.defaultdict(list)
    for pair in prompts:
        group = waiting[bucket(len(pair[1]))]
        group.append(pair)
        if len(group) == size:
            yield list(group)
            group.clear()
    for group in waiting.values():
        if group:
            yield group
