"""Added tokens keep the ids that the model gives them."""

import pathlib

import pytest
import tokenizers as rust
from transformers import PreTrainedTokenizerFast

from metamorph_jax.data import tokenizers
from metamorph_jax.data.chat import END_TOKEN, START_TOKEN

PICTURE = [START_TOKEN, END_TOKEN]


def small(*more):
    words = ["<unk>", "a", "b", "c", *more]
    model = rust.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    inner = rust.Tokenizer(model)
    inner.pre_tokenizer = rust.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("rows", [4, 9])
def test_added_tokens_stand_behind_the_table(rows, tmp_path):
    before = small()
    tokenizer = tokenizers.extend(before, rows, PICTURE)
    assert tokenizer.convert_tokens_to_ids(PICTURE) == [rows, rows + 1]
    assert len(tokenizer) == rows + 2 and len(before) == 4
    tokenizer.save_pretrained(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.encode(f"a {START_TOKEN}{END_TOKEN}b") == [1, rows, rows + 1, 2]
    assert again.decode([1, rows, rows + 1], skip_special_tokens=True) == "a"
    assert tokenizers.extend(again, rows, PICTURE).get_vocab() == again.get_vocab()


def test_a_tokenizer_that_does_not_fit():
    with pytest.raises(ValueError, match="4 tokens, but the model's table has 3 rows"):
        tokenizers.extend(small(), 3, PICTURE)
    with pytest.raises(ValueError, match="<image_start> has id 4 in the tokenizer, 8 in the model"):
        tokenizers.extend(small(*PICTURE), 8, PICTURE)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        tokenizers.load(tmp_path)


def test_no_template_of_a_tokenizer_is_ever_rendered():
    """Prompts are written by our own templates, so one that loops for ever costs nothing."""
    package = pathlib.Path(tokenizers.__file__).parents[1]
    calls = [file for file in package.rglob("*.py") if ".apply_chat_template(" in
             file.read_text().replace("`tokenizer.apply_chat_template(", "")]  # fmt: skip
    assert not calls
