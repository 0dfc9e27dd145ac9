"""`metamorph generate`: a trained model answers, draws, edits and thinks visually.

    metamorph generate --workdir RUN --prompt "What is this?" --image cat.jpg
    metamorph generate --workdir RUN --decoder RUN2 --prompt "Draw a red circle." --out drawings
    metamorph generate --workdir RUN --prompts questions.jsonl --out answers
    metamorph generate --checkpoint hf:llava-hf/llava-1.5-7b-hf --prompt "What is this?" --image …

Images stand where the prompt has `<image>`, else before it on a line of their own. A line of a
JSONL file is {"id": …, "prompt": …, "images": […] or "image": …, "video": …, "confirm": […]}, paths
relative to the file. In `--out` there will be:

    results.jsonl              one line per prompt as soon as it is done; the same command started
                               again skips these
    segments.json              all of them as one list, at the end
    ID_image0.npy              the visual tokens of an image, float32[P, C]
    ID_image0_scale7.5.png     drawn from them, for each guidance scale

An ID that is not a short file name in lower case gets a hash, so that no two share files; further
replies of `--samples` are ID+s1, ID+s2, … Prompts and files are checked before the model is loaded.
"""

import argparse
import contextlib
import dataclasses
import sys
import typing

from metamorph_jax.errors import UserError
from metamorph_jax.files import shown
from metamorph_jax.lock import Lock
from metamorph_jax.sampling import WEIGHTS
from metamorph_jax.sampling.requests import (
    MODES,
    MOST_ROUNDS,
    Request,
    check_files,
    checked,
    read_requests,
)
from metamorph_jax.sampling.results import Candidates, Output, Reply, Stream, printable

if typing.TYPE_CHECKING:
    from metamorph_jax.sampling.options import Options

MOST_SAMPLES = 10_000
EARLY = {"yes": True, "no": False, "never": "never"}


def add_arguments(parser) -> None:
    parser.description = "Answers prompts with text and images."
    add_model_arguments(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", help="one prompt")
    group.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help="one prompt a line; or .json, see docs/mm_interleaved.md",
    )
    group.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable")
    group.add_argument("--video", metavar="FILE", help="one frame a second of it")
    group.add_argument(
        "--think", action="store_true", help="ask the model to draw the relevant detail first"
    )
    group.add_argument(
        "--literal", action="store_true",
        help="prompts are all that the model reads: no chat template is put around them",
    )  # fmt: skip
    group.add_argument(
        "--mode", choices=MODES,
        help="what to answer with, of a model that draws on its own: text, an image, or both "
        "(default: the model decides; a line of --prompts may say its own)",
    )  # fmt: skip
    group.add_argument(
        "--rounds", type=int, default=0, metavar="N",
        help="with --mode both: so many texts and images in turn",
    )  # fmt: skip
    group.add_argument(
        "--samples", type=int, default=1, metavar="N", help="replies to each prompt (default: 1)"
    )
    group.add_argument("--batch-size", type=int, default=8, help="replies at a time")
    add_decoding_arguments(parser)
    add_best_arguments(parser)
    add_beam_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="where results go")


def add_model_arguments(parser) -> None:
    """Which model answers, and on what devices."""
    group = parser.add_argument_group("model")
    group.add_argument("--workdir", help="of a finished training stage")
    group.add_argument(
        "--checkpoint", metavar="SPEC", help="published weights (hf:OWNER/NAME or a folder)"
    )
    group.add_argument(
        "--config", metavar="FILE[:SIZE]",
        help="what --checkpoint is (default: what its config.json says; one that says something "
        "else is refused, with the differences)",
    )  # fmt: skip
    group.add_argument(
        "--recipe", metavar="MODULE",
        help="your own recipe, where --workdir was trained with one; its code is imported",
    )  # fmt: skip
    group.add_argument(
        "--decoder",
        metavar="DIR",
        help="draws the images: workdir of a decoder stage, or a folder with the files of "
        "MetaMorph's public decoder (unet_checkpoint, adapter_checkpoint, model_config.json)",
    )


def add_decoding_arguments(parser) -> None:
    """How text is chosen and images are drawn."""
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
        help="how the language model's are kept (auto: as it computes); in 8 bits (int8) a TPU or "
        "GPU has half as much to read for each token, in 4 (nf4) memory is a quarter; a CPU is "
        "slower with both",
    )  # fmt: skip
    group.add_argument("--min-new-tokens", type=int, default=0)
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X",
        help="divides the scores of tokens that appeared before; 1 (default) changes nothing",
    )  # fmt: skip
    group.add_argument("--force-end", action="store_true", help="end images after P tokens")
    group.add_argument(
        "--flow", metavar="NAME=X,…", type=parse_flow, default={},
        help="how a head that samples visual tokens does so, e.g. steps=8,temperature=0.7,"
        "guidance=2 (default: config.model.flow)",
    )  # fmt: skip
    group.add_argument(
        "--parity", action="store_true",
        help="reproduce the reference decoder, including its known bugs",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=int, default=0, help="each prompt and sample draws its own from it"
    )
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
        help="draw once with each (default: config.model.sampling of what draws)",
    )  # fmt: skip
    group.add_argument("--steps", type=int, help="of the diffusion sampler (default: likewise)")


def add_best_arguments(parser) -> None:
    """How the best of several samples of an image is found."""
    group = parser.add_argument_group("best of several (of models that sample visual tokens)")
    group.add_argument(
        "--best-of", type=int, default=1, metavar="N",
        help="samples of each reply with images, each read back by the model before it is drawn; "
        "the one that it confirms most is kept, and only that is drawn (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--confirm", action="append", default=[], metavar="QUESTION",
        help='what the model is then asked about each: "yes" has to mean that the image is right, '
        'as in "Is there a red circle?"; repeatable, and a line of --prompts may have its own '
        "(default: whether it matches the prompt)",
    )  # fmt: skip


def add_beam_arguments(parser) -> None:
    """How beams are searched."""
    group = parser.add_argument_group("beam search (of models that write text only)")
    group.add_argument(
        "--beams", type=int, default=1, metavar="N",
        help="replies written side by side, of which the likeliest is taken (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X",
        help="log probabilities are divided by length to the power X (default: 1): 0 favours short "
        "replies, 2 long ones",
    )  # fmt: skip
    group.add_argument(
        "--early-stopping", choices=[*EARLY], default="no",
        help="end when N replies are finished (yes), when a better one is unlikely (no, the "
        "default) or impossible (never); as in Hugging Face's generate",
    )  # fmt: skip


def run(args) -> int:
    check_model(args)
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("give either --prompt or --prompts")
    if args.decoder and not args.out:
        raise UserError("--decoder draws into files: give --out")
    if args.prompts is not None and (args.image or args.video):
        raise UserError("with --prompts, images are named in the file, not by --image or --video")
    if args.rounds and (args.mode != "both" or not 1 <= args.rounds <= MOST_ROUNDS):
        raise UserError(f"--rounds must be 1 to {MOST_ROUNDS}, and goes with --mode both")
    if args.confirm and args.best_of == 1:
        raise UserError("--confirm goes with --best-of N: it decides which of N samples is kept")
    many = args.prompts is not None or args.samples > 1
    options = decoding_options(
        args, args.batch_size if many else 1, beams=args.beams, length_penalty=args.length_penalty,
        early_stopping=EARLY[args.early_stopping], best_of=args.best_of,
    )  # fmt: skip
    if args.samples > 1 and args.temperature == 0 and not args.decoder:
        raise UserError(f"--samples {args.samples} without --temperature gives equal replies")
    outcome = Outcome(alone=not many)
    requests = read(args, outcome)
    if requests:
        with Lock(args.out, "writes", "--out") if args.out else contextlib.nullcontext():
            answer_all(args, requests, options, outcome)
    if outcome.bad:
        raise UserError(f"{outcome.bad} prompts were skipped, for the reasons above")
    return 0


def answer_all(args, requests: list[Request], options: "Options", outcome: "Outcome") -> None:
    """Answers the requests that `--out` has no reply to."""
    out = Output(args.out, settings(args)) if args.out else None
    todo = [r for r in requests if out is None or not out.has(r)]
    if len(todo) < len(requests):
        print(f"{len(requests) - len(todo)} of {len(requests)} were done before", file=sys.stderr)
    todo = list(check_files(todo, outcome.failed))
    if out is not None:
        out.open()
    if todo:
        generator = load(args)
        try:
            generator.check(options)
        except ValueError as error:
            raise UserError(error) from error
        answer(generator, todo, options, out, outcome)
        outcome.report_images(generator)
    if out is not None:
        out.finish(requests)


def check_model(args) -> None:
    """Raises UserError where options of the model contradict each other."""
    if bool(args.workdir) == bool(args.checkpoint):
        raise UserError("give either --workdir or --checkpoint")
    if args.workdir and (args.config or args.overrides):
        raise UserError("--config goes with --checkpoint; a --workdir has its own")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps must be at least 1, not {args.steps}")
    if args.context and args.context < 2:
        raise UserError(f"--context must be at least 2, not {args.context}")
    if args.context and (args.max_new_tokens or 0) >= args.context:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} leave no room for a prompt in a --context of "
            f"{args.context}"
        )
    parse_mesh(args.mesh)


def decoding_options(args, batch_size: int, **more) -> "Options":
    """The `Options` of the command line, and `more`; UserError for values that make no sense."""
    from metamorph_jax.sampling.options import Options

    try:
        return Options(
            args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_new_tokens,
            args.repetition_penalty, args.seed, tuple(args.guidance or ()), batch_size, **more,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(error) from error


def read(args, outcome: "Outcome") -> list[Request]:
    """The requests of the command line or of --prompts, each as often as --samples says."""
    if not 1 <= args.samples <= MOST_SAMPLES:
        raise UserError(f"--samples must be 1 to {MOST_SAMPLES}, not {args.samples}")
    if args.prompts is not None:
        requests, outcome.bad = read_requests(args.prompts, args.think)
        if not requests and not outcome.bad:
            raise UserError(f"{shown(args.prompts)} holds no prompts")
    else:
        request = Request("0", args.prompt, tuple(args.image), args.video or "", args.think)
        try:
            requests = [checked(request)]
        except ValueError as error:
            raise UserError(error) from error
    if args.confirm:
        asked = {"confirm": tuple(args.confirm)}
        requests = [r if r.confirm else dataclasses.replace(r, **asked) for r in requests]
    if args.literal:
        requests = [dataclasses.replace(r, literal=True) for r in requests]
    if args.mode is not None:
        asked = {"mode": args.mode, "rounds": args.rounds}
        requests = [r if r.mode else dataclasses.replace(r, **asked) for r in requests]
    samples = range(args.samples)
    return [dataclasses.replace(r, sample=k) for r in requests for k in samples]


def load(args):
    """The generator that the command line names."""
    from metamorph_jax import recipe
    from metamorph_jax.sampling.image_decoder import load_image_decoder
    from metamorph_jax.sampling.trained import load_generator

    if args.recipe:
        recipe.find(args.recipe)
    drawing = None
    if args.decoder:  # first, as it is the smaller one and its options can be wrong
        drawing = load_image_decoder(args.decoder, args.steps)
    asked = {"force_end": args.force_end, "parity": args.parity, "flow": args.flow}
    generator = load_generator(
        args.workdir, weights_of=args.checkpoint, config=args.config, overrides=args.overrides,
        weights=args.weights, mesh=parse_mesh(args.mesh), **{k: v for k, v in asked.items() if v},
    )  # fmt: skip
    if args.context:
        generator.prompts = dataclasses.replace(generator.prompts, length=args.context)
    if drawing is not None:
        generator.image_decoder = drawing
    elif args.steps is not None:
        generator.set_steps(args.steps)
    return generator


def parse_flow(text: str) -> dict[str, float]:
    """{"steps": 8, "temperature": 0.7} of "steps=8,temperature=0.7"."""
    kinds, found = {"steps": int, "temperature": float, "guidance": float}, {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = kinds[name.strip()](value)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{shown(part)}: expected NAME=NUMBER, of {', '.join(kinds)}"
            ) from None
    return found


def parse_mesh(text: str | None) -> dict[str, int] | None:
    """{"tensor": 2, "data": -1} of "tensor=2,data=-1"."""
    if not text:
        return None
    bad = UserError(f"--mesh {shown(text)}: expected AXIS=SIZE, e.g. tensor=4")
    try:
        pairs = [part.split("=") for part in text.split(",")]
        axes = {axis.strip(): int(size) for axis, size in pairs}
    except ValueError:
        raise bad from None
    from metamorph_jax import sharding

    wrong_size = any(size < 1 and size != -1 for size in axes.values())
    if len(axes) < len(pairs) or wrong_size or axes.keys() - {*sharding.AXES}:
        raise bad
    return axes


def settings(args) -> dict:
    """The options that results depend on, apart from the prompts."""
    names = (
        "workdir checkpoint config decoder temperature top_k top_p max_new_tokens force_end parity"
        " seed context guidance steps weights min_new_tokens repetition_penalty"
    )
    if args.beams > 1:
        names += " beams length_penalty early_stopping"
    names += " flow" if args.flow else ""
    names += " best_of" if args.best_of > 1 else ""
    return {name: getattr(args, name) for name in names.split()}


@dataclasses.dataclass
class Outcome:
    """What became of the requests.

    Attributes:
        alone: a single prompt, whose fault ends the command and whose text is printed as it comes.
        bad: prompts that can't be answered.
        images, cut, drawn: images in the replies; those that the number of new tokens cut off, and
            files that were drawn.
    """

    alone: bool = False
    bad: int = 0
    images: int = 0
    cut: int = 0
    drawn: int = 0

    def failed(self, request: Request, error: Exception) -> None:
        """Counts and reports a request that can't be answered."""
        if self.alone:
            raise UserError(shown(error, 1000)) from error
        print(f"{request.name}: {shown(error, 1000)}; skipped", file=sys.stderr, flush=True)
        self.bad += 1

    def count(self, reply: Reply) -> None:
        self.images += len(reply.image_parts)
        self.cut += sum(not part.complete for part in reply.image_parts)
        self.drawn += sum(len(part.drawn) for part in reply.image_parts)

    def report_images(self, generator) -> None:
        """Says why fewer images were drawn than one may expect."""
        if self.cut:
            print(f"{self.cut} images are cut off by --max-new-tokens and were not drawn",
                  file=sys.stderr)  # fmt: skip
        if generator.image_decoder is None and self.images:
            print(f"{self.images} images in the replies: nothing was drawn, since no --decoder is "
                  "given", file=sys.stderr)  # fmt: skip
        elif generator.image_decoder is not None and not self.images:
            print("nothing was drawn: the model answered with text alone", file=sys.stderr)


def answer(generator, requests, options: "Options", out: Output | None, outcome: Outcome) -> None:
    """Answers all requests; each reply is written and printed as soon as it is there."""
    import jax

    speaks = jax.process_index() == 0  # all hosts decode, one of them prints and writes
    stream = Stream(generator) if outcome.alone and speaks else None
    for request, reply in generator.replies(requests, options, outcome.failed, stream):
        outcome.count(reply)
        if stream is not None:
            stream.end()
        if out is not None and speaks:
            out.write(request, reply)
        if reply.candidates is not None and speaks:
            print(f"{request.name}: {kept(reply.candidates)}", file=sys.stderr, flush=True)
        if not outcome.alone and speaks:
            print(f"{request.name}: {printable(reply.text)}", flush=True)


def kept(candidates: Candidates) -> str:
    """Which of the samples was kept, and how they scored, in words."""
    said = ["no image" if score is None else f"{score:.2f}" for score in candidates.scores]
    return (f"sample {candidates.kept} of {len(said)} is kept; log-likelihoods of yes: "
            f"{', '.join(said)}")  # fmt: skip
