"""What readers of sets share: options, a row, and the file of rows."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from metamorph_jax import files
from metamorph_jax.errors import FileError, MissingFile, UserError
from metamorph_jax.files import shown

# What readers raise that meet a value of another type or form than official files have.
_ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
ROLES = {"user": "human", "assistant": "gpt"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is made of a set.

    Attributes:
        folder: with its files.
        use: one of the set's `uses`.
        split: as the set names it.
        images: folder of the images, if not `folder`.
        answer: to questions with several, see `questions.Asked.answer`.
        augment: whether rows may be changed by chance in training.
        by: whose referring expressions; "" for those in use.
    """

    folder: pathlib.Path
    use: str
    split: str = "train"
    images: pathlib.Path | None = None
    answer: str = "majority"
    augment: bool = True
    by: str = ""

    @property
    def pictures(self) -> pathlib.Path:
        return self.images or self.folder

    def file(self, *names: str) -> str:
        """The first of these files of the set that is there.

        Raises:
            MissingFile: none of them is.
        """
        for name in names:
            if (self.folder / name).exists():
                return str(self.folder / name)
        raise MissingFile(f"no {' or '.join(names)} in {shown(self.folder)}")


@dataclasses.dataclass(frozen=True)
class Set:
    """A set.

    Attributes:
        rows: options -> rows, with paths of images as they can be opened.
        uses: what it can be made of, the usual one first.
    """

    rows: Callable[[Options], Iterator[dict]]
    uses: tuple[str, ...]


def row(id, images: Sequence[str | os.PathLike], turns: Iterable[tuple[str, str]], **more) -> dict:
    """A record as sources read it."""
    said = [{"from": ROLES[role], "value": text} for role, text in turns]
    paths = [str(path) for path in images]
    named = {"image": paths if len(paths) > 1 else paths[0]} if paths else {}
    return {"id": str(id), **named, "conversations": said, **more}


@dataclasses.dataclass
class Written:
    """How many rows were written, how many were not as an image of theirs is missing, and one of
    these images."""

    rows: int = 0
    left_out: int = 0
    example: str = ""


def write(rows: Iterable[dict], to: pathlib.Path, root: pathlib.Path) -> Written:
    """Writes the rows whose images are there, whole or not at all; paths are relative to `root`.

    Raises:
        UserError: an image is not below the root, the file can't be written, or none is left.
    """
    found, seen = Written(), {}
    root, partial = pathlib.Path(os.path.abspath(root)), to.with_name(f".{to.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for one in _sound(rows):
                paths = one.get("image", [])
                paths = [paths] if isinstance(paths, str) else paths
                gone = next((path for path in paths if not _is_there(path, seen)), None)
                if gone is not None:
                    found.left_out += 1
                    found.example = found.example or gone
                    continue
                names = [_below(root, path) for path in paths]
                named = {"image": names if len(names) > 1 else names[0]} if names else {}
                file.write(json.dumps(one | named, ensure_ascii=False) + "\n")
                found.rows += 1
        if not found.rows:
            why = f"; an image is missing, {shown(found.example)}" if found.example else ""
            raise FileError(f"no rows{why}")
        partial.replace(to)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        why = error.strerror or error
        raise FileError(f"{shown(to)} can't be written: {why}") from error
    finally:
        partial.unlink(missing_ok=True)
    return found


def _sound(rows: Iterable[dict]) -> Iterator[dict]:
    """The rows; FileError in place of what a reader raises that meets a value of another type."""
    number, rows = 0, iter(rows)
    while True:
        try:
            one = next(rows)
        except StopIteration:
            return
        except UserError:
            raise
        except _ODD as error:
            what = f"{type(error).__name__}: {shown(error)}"
            raise FileError(f"the official files hold something unexpected after {number:,} rows "
                            f"({what})") from error  # fmt: skip
        number += 1
        yield one


def _is_there(path: str, seen: dict[str, bool]) -> bool:
    if path not in seen:
        if len(seen) > 100_000:
            seen.clear()
        seen[path] = os.path.isfile(path)
    return seen[path]


def _below(root: pathlib.Path, path: str) -> str:
    try:
        return pathlib.Path(os.path.abspath(path)).relative_to(root).as_posix()
    except ValueError as error:
        raise UserError(
            f"{files.shown(path)} is not below {files.shown(root)}: give --root, a folder that has "
            "all images"
        ) from error
