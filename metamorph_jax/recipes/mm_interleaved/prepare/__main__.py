"""The command, see `prepare/__init__.py`."""

import argparse
import pathlib
import sys
import textwrap

from metamorph_jax import files
from metamorph_jax.data.sets.questions import CHOICES
from metamorph_jax.errors import UserError
from metamorph_jax.recipes.mm_interleaved import prepare
from metamorph_jax.recipes.mm_interleaved.prepare import drawings, regions, texts
from metamorph_jax.recipes.mm_interleaved.prepare.rows import Options, Set, write

SETS: dict[str, Set] = {**texts.SETS, **regions.SETS, **drawings.SETS}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m metamorph_jax.recipes.mm_interleaved.prepare",
        description=prepare.__doc__, epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = found.add_argument
    add("set", choices=sorted(SETS), metavar="SET", help=", ".join(sorted(SETS)))
    add("--from", dest="folder", type=pathlib.Path, required=True, metavar="FOLDER",
        help="with the official files (llava: the file itself)")  # fmt: skip
    add("--to", type=pathlib.Path, required=True, metavar="FILE.jsonl")
    add("--split", default="train", help="default: train")
    add("--as", dest="use", default="", metavar="USE", help="what is made of the set: "
        + "; ".join(f"{name}: {', '.join(one.uses)}" for name, one in sorted(SETS.items())
                    if len(one.uses) > 1) + "; the first is the default")  # fmt: skip
    add("--images", type=pathlib.Path, metavar="FOLDER", help="of the images, if not --from")
    add("--root", type=pathlib.Path, metavar="FOLDER",
        help="that paths in rows are relative to, the source's root in a config (default: "
        "--images, or else --from)")  # fmt: skip
    add("--answer", default="majority", choices=CHOICES, help="to questions with several answers")
    add("--by", default="", metavar="NAME", help="whose referring expressions: unc, umd, google")
    add("--no-augment", action="store_true", help="rows are the same in every epoch")
    return found


def listing() -> str:
    """The sets, and which files each reads."""
    lines = ["sets and their files, for the split train:"]
    for name, one in sorted(SETS.items()):
        about = " ".join(one.rows.__doc__.split())
        lines += textwrap.wrap(
            f"{name}: {about}", 96, initial_indent="  ", subsequent_indent="    "
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    made = SETS[args.set]
    try:
        if args.use and args.use not in made.uses:
            raise UserError(f"--as {args.use}: {args.set} can be made {', '.join(made.uses)}")
        options = Options(args.folder, args.use or made.uses[0], args.split, args.images,
                          args.answer, not args.no_augment, args.by)  # fmt: skip
        folder = args.folder if args.folder.is_dir() else args.folder.parent
        found = write(made.rows(options), args.to, args.root or args.images or folder)
    except UserError as error:
        print(f"prepare {args.set}: {files.escape(str(error))}", file=sys.stderr)
        return error.code
    print(f"{found.rows:,} rows in {args.to}")
    if found.left_out:
        print(f"{found.left_out:,} rows are left out, as images are missing, such as "
              f"{files.shown(found.example)}", file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
