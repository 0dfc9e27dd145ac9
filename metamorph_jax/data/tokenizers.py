"""Tokenizers of language models, and the tokens that a recipe adds to them.

Ids of a model: [0, V) are rows of the published table, V + j is added token j, whatever the
tokenizer holds. Published tables may be longer than their tokenizer (Qwen's are); an exported
tokenizer gets names for the ids between, so that an added token has the same id in transformers:

    tokenizer   0 … T-1    T … V-1               V               V + 1
                as it was  <|unused_0|> …        <image_start>   <image_end>

Rows that only pad our tables for sharding come after V, too, but have no ids; exports leave
them out.
"""

import contextlib
import pathlib
from collections.abc import Sequence

from metamorph_jax import files
from metamorph_jax.data.tokenizer_limits import Limited, slow_part
from metamorph_jax.errors import ConfigError, FileError, MissingFile, WeightError
from metamorph_jax.files import shown

# Files of a tokenizer or processor, which are copied as they are.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


# A tokenizer.json of 262,000 tokens has 33 million bytes and half a million lists.
_LARGEST, _MOST_LISTS = 2**26, 2**22


def is_in(folder: pathlib.Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / name).exists() for name in FILES[:3] + FILES[5:7])


def load(folder: str | pathlib.Path):
    """The transformers tokenizer of a folder, the fast one where it exists.

    Code that the folder brings (`auto_map`) is never run.

    Raises:
        MissingFile: the folder has none.
        FileError: one of its files is not what its name says.
    """
    folder = pathlib.Path(folder)
    if not is_in(folder):
        raise MissingFile(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)"
        )
    slow = check_all(folder)
    from transformers import AutoTokenizer  # takes seconds, so it comes after the checks

    with _naming(folder):
        return _limited(AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        ), folder, slow)  # fmt: skip


def load_file(file: str | pathlib.Path):
    """The transformers tokenizer of a tokenizer.json alone; raises as `load`."""
    slow = check(file)
    from transformers import PreTrainedTokenizerFast

    with _naming(file):
        return _limited(PreTrainedTokenizerFast(tokenizer_file=str(file)), file, slow)


def _limited(tokenizer, where: str | pathlib.Path, slow: str):
    """The tokenizer; its work is bounded if a part of its file may be slow."""
    if slow and hasattr(tokenizer, "backend_tokenizer"):
        tokenizer._tokenizer = Limited(tokenizer.backend_tokenizer, shown(where), slow)
    return tokenizer


def read(path: str | pathlib.Path):
    """The transformers tokenizer of a folder, or of a tokenizer.json; raises as `load`."""
    return load(path) if pathlib.Path(path).is_dir() else load_file(path)


def check_all(folder: pathlib.Path) -> str:
    """`check` for those files beside the weights in a folder that are read or copied; returns what
    may be slow in a tokenizer.json, or one that is named for a version of transformers."""
    others = {file.name for file in folder.glob("tokenizer*.json")}
    names = (*FILES, "config.json", "generation_config.json", *sorted(others - {*FILES}))
    slow = [check(folder / name) for name in names if (folder / name).exists()]
    return next(filter(None, slow), "")


def check(file: str | pathlib.Path) -> str:
    """What may be slow in a file of a tokenizer, "" for nothing; see `slow_part`.

    Raises:
        FileError: it is no regular file, too large, or not the JSON object that its ending
            promises; or as `slow_part`.
    """
    file = pathlib.Path(file)
    if file.suffix != ".json":
        files.opened(file, _LARGEST).close()
        return ""
    text = files.read_text(file, _LARGEST)
    if text.count("[") + text.count("{") > _MOST_LISTS:
        raise FileError(f"{shown(file)} has more than {_MOST_LISTS:,} lists and objects")
    return slow_part(files.parse(text, shown(file), dict), shown(file))


@contextlib.contextmanager
def _naming(where):
    """Whatever the libraries make of a damaged tokenizer, as one line that names it."""
    try:
        yield
    except ImportError:
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shown((str(error).splitlines() or [""])[0])
        raise WeightError(
            f"the tokenizer of {where} can't be loaded: {type(error).__name__}: {reason}"
        ) from error


def check_ids(tokenizer, vocab_size: int, added: Sequence[str]) -> None:
    """Compares the ids of a tokenizer with the rows of a model's table.

    Args:
        added: tokens that the model adds; where the tokenizer has them, their ids must be
            `vocab_size` and those that follow.

    Raises:
        ConfigError: a token has an id that the table doesn't have, or is that of an added token.
    """
    ids, expected = tokenizer.get_vocab(), {text: vocab_size + j for j, text in enumerate(added)}
    for text, id in expected.items():
        if ids.get(text, id) != id:
            raise ConfigError(f"{text} has id {ids[text]} in the tokenizer, {id} in the model")
    extra = sorted((id, text) for text, id in ids.items() if id >= vocab_size
                   and text not in expected)  # fmt: skip
    if extra:
        listed = ", ".join(f"{text!r} ({id})" for id, text in extra[:8])
        raise ConfigError(
            f"the tokenizer has {len(ids)} tokens, but the model's table has {vocab_size} rows, "
            f"none for {listed}: take these tokens out of the tokenizer, or weights with more rows"
        )


def extend(tokenizer, vocab_size: int, added: Sequence[str]):
    """A copy of a tokenizer in which `added[j]` has the id `vocab_size + j`; the ids in between get
    placeholder names.

    Raises:
        ConfigError: as `check_ids` has it.
    """
    import copy

    from tokenizers import AddedToken

    check_ids(tokenizer, vocab_size, added)
    out = copy.deepcopy(tokenizer)
    special = lambda text: AddedToken(text, special=True, normalized=False)  # noqa: E731
    known = {text: id for text, id in out.get_vocab().items() if text in added}
    rest = [text for text in added if text not in known]
    if rest:
        gap = vocab_size + len(known) - len(out)
        out.add_tokens([special(f"<|unused_{i}|>") for i in range(gap)], special_tokens=True)
        out.add_tokens([special(text) for text in rest], special_tokens=True)
    check_ids(out, vocab_size, added)
    return out
