"""`metamorph demo`: a page in the browser on which to talk with a model, or with two.

    metamorph demo --workdir RUN --decoder RUN2
    metamorph demo --workdir RUN --beside OTHER_RUN          # both answer, side by side

It is the engine of `metamorph chat`: images, drawings, a conversation that the model sees all of.
The page is served on this machine only (127.0.0.1), unless --host says otherwise; there is no
password, so think before you open it to others. Needs the extra `demo`.
"""

import copy
import pathlib

from metamorph_jax.errors import UserError
from metamorph_jax.files import shown
from metamorph_jax.sampling import generate


def add_arguments(parser) -> None:
    parser.description = "A page in the browser on which to talk with a model, or with two."
    generate.add_model_arguments(parser)
    group = parser.add_argument_group("a second model, that answers beside the first")
    group.add_argument("--beside", metavar="RUN", help="workdir of its finished training stage")
    group.add_argument("--beside-decoder", metavar="DIR", help="draws its images")
    generate.add_decoding_arguments(parser)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host", default="127.0.0.1",
        help="address to serve on (default: 127.0.0.1, this machine only; 0.0.0.0: anyone who can "
        "reach it)",
    )  # fmt: skip
    group.add_argument("--port", type=int, help="default: the first free one from 7860")
    group.add_argument(
        "--visitors", type=int, default=4, metavar="N",
        help="whose conversations are kept; each takes a cache on the device (default: 4)",
    )  # fmt: skip
    group.add_argument(
        "--most-megabytes", type=int, default=20, metavar="N", help="of an uploaded file"
    )
    group.add_argument(
        "--most-megapixels", type=float, default=25.0, metavar="N", help="of an uploaded image"
    )


def run(args) -> int:
    from metamorph_jax.sampling.demo import page

    check(args)
    options = generate.decoding_options(args, 1)
    page.gradio()  # a missing package should be noticed now, not after loading
    from metamorph_jax.sampling.demo.engine import Engine, Limits

    limits = Limits(args.most_megabytes, int(args.most_megapixels * 1e6))
    engine = Engine(load(args), options, limits, args.visitors)
    page.serve(page.build(engine, start(args, engine)), args.host, args.port, limits.megabytes)
    return 0


def check(args) -> None:
    """Raises UserError where options make no sense."""
    generate.check_model(args)
    if args.beside_decoder and not args.beside:
        raise UserError("--beside-decoder draws for --beside, which is not given")
    if args.port is not None and not 0 < args.port < 2**16:
        raise UserError(f"--port must be 1 to 65535, not {args.port}")
    if len(args.guidance or ()) > 1:
        raise UserError("--guidance takes one scale here; the page has a field for others")
    for option, value in (("visitors", args.visitors), ("most-megabytes", args.most_megabytes)):
        if value < 1:
            raise UserError(f"--{option} must be at least 1, not {value}")
    if not 0 < args.most_megapixels <= 64:
        raise UserError(f"--most-megapixels must be above 0 and at most 64, not "
                        f"{args.most_megapixels:g}")  # fmt: skip


def load(args) -> dict:
    """Name on the page -> generator, of the models that the command line names."""
    first = name_of(args.workdir or args.checkpoint)
    models = {first: generate.load(args)}
    if args.beside:
        other = copy.copy(args)
        other.workdir, other.checkpoint, other.config, other.overrides = args.beside, None, None, {}
        other.decoder = args.beside_decoder
        name = name_of(args.beside)
        models[name if name != first else f"{name} (2)"] = generate.load(other)
    return models


def name_of(where: str) -> str:
    """What the page calls a model: the last part of its path."""
    return shown(pathlib.PurePath(where.removeprefix("hf:")).name or where, 60)


def start(args, engine):
    """The settings that the page begins with."""
    from metamorph_jax.sampling.demo.engine import Settings

    guidance = args.guidance[0] if args.guidance else engine.guidance()
    tokens = args.max_new_tokens or min(256, engine.longest)
    return Settings(args.temperature, guidance, args.seed, tokens)
