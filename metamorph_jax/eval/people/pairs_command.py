"""`metamorph eval pairs`: a page on which people compare what two models made.

    metamorph eval pairs runs/a/eval/vist runs/b/eval/vist --out study

Both folders are OUT/TASK of `metamorph eval`, of the same task. The people get study/page.html,
open it in a browser, and send back the file that it lets them download; `metamorph eval votes`
scores these files with study/key.json.
"""

import pathlib
import sys

from metamorph_jax.errors import UserError
from metamorph_jax.eval.people import documents, study

_LARGE = 50_000_000  # bytes of a page that some browsers and mail servers don't take


def add_arguments(parser) -> None:
    parser.description = "Writes a page on which people compare what two models made."
    add = parser.add_argument
    add("first", metavar="FIRST", help="OUT/TASK of `metamorph eval`, of one model")
    add("second", metavar="SECOND", help="the same of the other model, or of a baseline")
    add("--out", required=True, metavar="DIR", help="where page.html and key.json go")
    add("--names", nargs=2, metavar=("A", "B"), help="of the two, for the key and the scores "
        "(default: their folders)")  # fmt: skip
    add("--items", type=int, default=50, metavar="N",
        help="pairs on the page, drawn by chance; 0: all (default: 50)")  # fmt: skip
    add("--whole", action="store_true",
        help="what is scored together (all frames of a story) is one pair")  # fmt: skip
    add("--seed", type=int, default=0, help="of pairs, order and sides")
    add("--side", type=int, default=384, metavar="PIXELS",
        help="longer side of images on the page, at most (default: 384)")  # fmt: skip
    add("--title", default=study.Settings.title, help="of the page")


def run(args) -> int:
    if args.items < 0 or not 16 <= args.side <= 4096:
        raise UserError("--items must not be negative, --side from 16 to 4096")
    names = tuple(args.names or (args.first, args.second))
    if names[0] == names[1]:
        raise UserError("both systems have the same name: give two folders, or --names A B")
    if pathlib.Path(args.out, "key.json").exists():
        raise UserError(f"{args.out} holds a study, whose answers need its key: choose another "
                        "--out or remove it")  # fmt: skip
    first, second = (documents.read(folder, args.whole) for folder in (args.first, args.second))
    settings = study.Settings(args.items, args.seed, args.side, args.title)
    chosen = study.items(first, second, settings)
    page, key = study.write(args.out, chosen, names, settings)
    alone = len(first.keys() ^ second.keys())
    if alone:
        print(f"{alone} questions have an answer of one system only, and are left out",
              file=sys.stderr)  # fmt: skip
    size = page.stat().st_size
    if size > _LARGE:
        print(f"the page has {size / 1e6:.0f} MB: fewer --items or a smaller --side make it easier "
              "to send", file=sys.stderr)  # fmt: skip
    print(f"page: {page.resolve()} ({len(chosen)} pairs, {size / 1e6:.1f} MB)")
    print(f"key: {key.resolve()}")
    return 0
