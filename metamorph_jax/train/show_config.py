"""`metamorph config`: every option of a config, with its value, type and meaning."""

import shlex
import textwrap

from metamorph_jax import config as configs
from metamorph_jax import options
from metamorph_jax.train.config import resolve, typed


def add_arguments(parser) -> None:
    parser.description = (
        "Lists every option of a config: its value, type and meaning. A line that starts with # is "
        "an option of a table that this config does not have; setting it makes the table. The "
        "config is checked first, with the changes --config.a.b=value."
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:SIZE]", help="e.g. configs/metamorph/vpit.py:8b"
    )
    parser.add_argument(
        "match", nargs="?", default="", metavar="TEXT",
        help="list only options whose path or description has this text in it",
    )  # fmt: skip


def run(args) -> int:
    config = configs.load_config(args.config, args.overrides)
    resolve(config)
    cls = typed(config.recipe)
    values = options.complete(cls, config)
    for option in list(options.listed(cls, values))[1:]:
        if args.match in option.path or args.match in option.doc:
            print(show(option))
    return 0


def show(option: options.Option) -> str:
    """The option as an argument of the command line, its type and what its docstring says."""
    value = option.value
    if option.is_table and value:
        head = f"\n{option.path}.*"
    else:
        required = value is None and not options.nullable(option.hint)
        text = "" if required else value if isinstance(value, str) else repr(value)
        text = shlex.quote(text) if text else ""
        note = options.type_name(option.hint) + (", required" if required else "")
        head = f"{'' if option.used else '# '}--{option.path}={text}   ({note})"
    wrap = textwrap.TextWrapper(100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([head, *wrap.wrap(option.doc)])
