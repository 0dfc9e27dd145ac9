"""Added tokens keep the ids that the model gives them; what a file brings is bounded."""

import json
import pathlib
import re

import pytest
import tokenizers as rust
from transformers import PreTrainedTokenizerFast

from metamorph_jax import cli
from metamorph_jax.data import tokenizer_limits, tokenizers
from metamorph_jax.data.chat import END_TOKEN, START_TOKEN
from metamorph_jax.data.text_ids import TextIds
from metamorph_jax.errors import FileError

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


def written(tmp_path, **parts):
    """A tokenizer.json of ours with parts of it replaced."""
    table = json.loads(small().backend_tokenizer.to_str()) | parts
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    return tmp_path / "tokenizer.json"


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


# Each word of 12 letters takes a millisecond or so.
SLOW = r"(?:[a-z]|[a-z])*(?=!)x|\S+|\s"


def test_many_slow_matches_together_are_bounded(tmp_path, monkeypatch):
    file = written(tmp_path, pre_tokenizer=split(SLOW))
    ids = TextIds(tokenizers.load_file(file), (), True)
    assert ids("a b") == [1, 0, 2]
    monkeypatch.setattr(tokenizer_limits, "SECONDS", 0.1)
    monkeypatch.setattr(tokenizer_limits, "SECONDS_PER_CHARACTER", 1e-9)
    line = rf"tokenizer of {re.escape(str(file))} takes too long.*the pattern .* pre_tokenizer may"
    for text in ("abcdefghijkl x! " * 2000, "a"):  # the second one finds the time used up
        with pytest.raises(FileError, match=line):
            ids(text)


def test_a_tokenizer_that_takes_too_long_is_no_fault_of_a_sample(tmp_path, monkeypatch, capsys):
    """It ends the command; all samples were counted as bad, one after the other."""
    monkeypatch.setattr(tokenizer_limits, "SECONDS", 0.1)
    monkeypatch.setattr(tokenizer_limits, "SECONDS_PER_CHARACTER", 1e-9)
    data, said = tmp_path / "data.jsonl", "abcdefghijkl x! " * 2000
    record = {"id": "1", "conversations": [{"from": "human", "value": said},
                                           {"from": "gpt", "value": "a"}]}  # fmt: skip
    data.write_text(json.dumps(record) + "\n")
    ends = dict(special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    ends = [ends | {"id": id, "content": f"<|im_{n}|>"} for id, n in ((4, "start"), (5, "end"))]
    file = written(tmp_path, pre_tokenizer=split(SLOW), added_tokens=ends)
    assert cli.main(["data", "check", str(data), "--tokenizer", str(file)]) == 2
    assert f"the tokenizer of {file} takes too long" in capsys.readouterr().err


def test_only_patterns_that_may_be_slow_are_watched(tmp_path):
    quick = written(tmp_path, pre_tokenizer=split(r"\p{L}+| ?[^\s\p{L}]{1,3}|\s{2,}"))
    assert isinstance(tokenizers.load_file(quick).backend_tokenizer, rust.Tokenizer)
    watched = tokenizers.load_file(written(tmp_path, pre_tokenizer=split(SLOW)))
    assert isinstance(watched.backend_tokenizer, tokenizer_limits.Limited)
    grown = tokenizers.extend(watched, 4, PICTURE)  # copies, adds, saves, loads, reads, writes
    grown.save_pretrained(tmp_path / "again")
    again = tokenizers.load(tmp_path / "again")
    assert isinstance(again.backend_tokenizer, tokenizer_limits.Limited)
    assert again(f"a {START_TOKEN}b")["input_ids"] == [1, 0, 4, 2]
    assert again.decode([1, 2]) == "a b"


@pytest.mark.parametrize("pattern", [
    "(a|a)*b", "a*a*b", "a?a?a?b", r"\s+$", "a+b", r"(a)\1", "a{1000,}", "[a&&b]+", "(?=a*)b",
    "a+?b", "(?:a?){9}", "a++", r"\g<0>", "[[:alpha:]]*b",
])  # fmt: skip
def test_a_normalizer_is_quick(pattern, tmp_path):
    file = written(tmp_path, normalizer=replace({"Regex": pattern}, ""))
    with pytest.raises(FileError, match=r"tokenizer.json: the pattern .* of its normalizer"):
        tokenizers.load_file(file)


def test_texts_do_not_grow_without_bound(tmp_path):
    bomb = [replace({"String": "a"}, "a" * 1000), replace({"String": "aa"}, "a" * 1000)]
    file = written(tmp_path, normalizer={"type": "Sequence", "normalizers": bomb})
    with pytest.raises(FileError, match="normalizer may make texts more than 10,000 times as long"):
        tokenizers.load(file.parent)
