"""Tokenizers of language models, and the tokens that a recipe adds to them.

Ids of a model: [0, V) are rows of the published table, V + j is added token j, whatever the
tokenizer holds. Published tables may be longer than their tokenizer (Qwen's are); an exported
tokenizer gets names for the ids between, so that an added token has the same id in transformers:

    tokenizer   0 … T-1    T … V-1               V               V + 1
                as it was  <|unused_0|> …        <image_start>   <image_end>

Rows that only pad our tables for sharding come after V, too, but have no ids; exports leave
them out.
"""

import pathlib
from collections.abc import Sequence

from metamorph_jax.errors import ConfigError

# Files of a tokenizer or processor, which are copied as they are.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def load(folder: str | pathlib.Path):
    """The transformers tokenizer of a folder, the fast one where it exists.

    Raises:
        FileNotFoundError: if the folder has none.
    """
    from transformers import AutoTokenizer

    folder = pathlib.Path(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        if any((folder / name).is_file() for name in FILES[:3] + FILES[5:7]):
            raise
        raise FileNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)"
        ) from error


def check(tokenizer, vocab_size: int, added: Sequence[str]) -> None:
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
        ConfigError: as `check` has it.
    """
    import copy

    from tokenizers import AddedToken

    check(tokenizer, vocab_size, added)
    out = copy.deepcopy(tokenizer)
    special = lambda text: AddedToken(text, special=True, normalized=False)  # noqa: E731
    known = {text: id for text, id in out.get_vocab().items() if text in added}
    rest = [text for text in added if text not in known]
    if rest:
        gap = vocab_size + len(known) - len(out)
        out.add_tokens([special(f"<|unused_{i}|>") for i in range(gap)], special_tokens=True)
        out.add_tokens([special(text) for text in rest], special_tokens=True)
    check(out, vocab_size, added)
    return out
