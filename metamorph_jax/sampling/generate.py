"""`metamorph generate`: a trained model answers, draws, edits and thinks visually.

    metamorph generate --workdir RUN --prompt "What is this?" --image cat.jpg
    metamorph generate --workdir RUN --decoder RUN2 --prompt "Draw a red circle." --out drawings
    metamorph generate --workdir RUN --prompts questions.jsonl --out answers

Images stand where the prompt has `<image>`, else before it on a line of their own. A line of a
JSONL file is {"id": …, "prompt": …, "images": […] or "image": …, "video": …}, paths relative to the
file. In `--out` there will be:

    results.jsonl              one line per prompt as soon as it is done; the same command started
                               again skips these
    segments.json              all of them as one list, at the end
    ID_image0.npy              the visual tokens of an image, float32[P, C]
    ID_image0_scale7.5.png     drawn from them, for each guidance scale
"""

import sys

from metamorph_jax.errors import UserError
from metamorph_jax.sampling import WEIGHTS
from metamorph_jax.sampling.requests import Request, read_requests


def add_arguments(parser) -> None:
    parser.description = "Answers prompts with text and images."
    group = parser.add_argument_group("model")
    group.add_argument("--workdir", help="of a finished training stage")
    group.add_argument(
        "--checkpoint", metavar="SPEC", help="published weights (hf:OWNER/NAME or a folder)"
    )
    group.add_argument("--config", metavar="FILE[:SIZE]", help="the config of --checkpoint")
    group.add_argument(
        "--recipe", metavar="MODULE",
        help="your own recipe, where --workdir was trained with one; its code is imported",
    )  # fmt: skip
    group.add_argument(
        "--decoder", metavar="DIR",
        help="draws the images: workdir of a decoder stage, or a folder with the files of "
        "MetaMorph's public decoder (unet_checkpoint, adapter_checkpoint, model_config.json)",
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", help="one prompt")
    group.add_argument("--prompts", metavar="FILE.jsonl", help="one prompt a line")
    group.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable")
    group.add_argument("--video", metavar="FILE", help="one frame a second of it")
    group.add_argument(
        "--think", action="store_true", help="ask the model to draw the relevant detail first"
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
    group.add_argument("--min-new-tokens", type=int, default=0)
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X",
        help="divides the scores of tokens that appeared before; 1 (default) changes nothing",
    )  # fmt: skip
    group.add_argument("--force-end", action="store_true", help="end images after P tokens")
    group.add_argument(
        "--parity", action="store_true",
        help="reproduce the reference decoder, including its known bugs",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--batch-size", type=int, default=8, help="for --prompts")
    group.add_argument(
        "--context", type=int, default=0,
        help="maximum sequence length (default: as in training)",
    )  # fmt: skip
    group.add_argument(
        "--mesh", metavar="AXIS=SIZE,…",
        help="devices, e.g. tensor=4 or tensor=2,data=-1 (default: tensor as in config.mesh, all "
        "others share the prompts)",
    )  # fmt: skip
    group = parser.add_argument_group("images")
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
        raise UserError("with --prompts, images are named in the file, not by --image or --video")
    bad = 0
    if args.prompts:
        requests, bad = read_requests(args.prompts, args.think)
    else:
        requests = [Request("0", args.prompt, tuple(args.image), args.video or "", args.think)]
    from metamorph_jax.sampling.generator import Options
    from metamorph_jax.sampling.results import Output

    try:
        options = Options(
            args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_new_tokens,
            args.repetition_penalty, args.seed, tuple(args.guidance or ()),
            args.batch_size if args.prompts else 1,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(error) from error
    out = Output(args.out, settings(args)) if args.out else None
    todo = [r for r in requests if out is None or not out.has(r)]
    if len(todo) < len(requests):
        print(f"{len(requests) - len(todo)} of {len(requests)} were done before", file=sys.stderr)
    if todo:
        bad += answer(load(args), todo, options, out, alone=args.prompts is None)
    if out is not None:
        out.finish(requests)
    return 1 if bad else 0


def load(args):
    """The generator that the command line names."""
    import dataclasses

    from metamorph_jax import recipe
    from metamorph_jax.sampling.image_decoder import load_image_decoder
    from metamorph_jax.sampling.trained import load_generator

    if args.recipe:
        recipe.find(args.recipe)
    asked = {"force_end": args.force_end, "parity": args.parity}
    generator = load_generator(
        args.workdir, weights_of=args.checkpoint, config=args.config, overrides=args.overrides,
        weights=args.weights, mesh=parse_mesh(args.mesh), **{k: v for k, v in asked.items() if v},
    )  # fmt: skip
    if args.context:
        generator.prompts = dataclasses.replace(generator.prompts, length=args.context)
    if args.decoder:
        generator.image_decoder = load_image_decoder(args.decoder, args.steps)
    return generator


def parse_mesh(text: str | None) -> dict[str, int] | None:
    """{"tensor": 2, "data": -1} of "tensor=2,data=-1"."""
    if not text:
        return None
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {axis.strip(): int(size) for axis, size in pairs}
    except ValueError:
        raise UserError(f"--mesh {text!r}: expected AXIS=SIZE, e.g. tensor=4") from None


def settings(args) -> dict:
    """The options that results depend on, apart from the prompts."""
    names = (
        "workdir checkpoint config decoder temperature top_k top_p max_new_tokens force_end parity"
        " seed context guidance steps weights min_new_tokens repetition_penalty"
    )
    return {name: getattr(args, name) for name in names.split()}


def answer(generator, requests, options, out, alone: bool) -> int:
    """Answers all requests, writing each reply as it comes; returns how many were bad.

    `alone`: a single prompt, whose text is printed token by token.
    """
    import jax

    from metamorph_jax.sampling.results import Stream

    bad = 0
    speaks = jax.process_index() == 0  # all hosts decode, one of them prints and writes

    def failed(request, error) -> None:
        nonlocal bad
        if alone:
            raise UserError(error) from error
        print(f"{request.id}: {error}; skipped", file=sys.stderr, flush=True)
        bad += 1

    stream = Stream(generator) if alone and speaks else None
    for request, reply in generator.replies(requests, options, failed, stream):
        if stream is not None:
            stream.end()
        if out is not None and speaks:
            out.write(request, reply)
        if not alone and speaks:
            print(f"{request.id}: {reply.text}", flush=True)
    return bad
