"""Replies of models: which are taken, which are repaired, and which are refused."""

import shutil

import pytest

from metamorph_jax.errors import BadSample, ConfigError, FileError
from metamorph_jax.instruct import kinds
from metamorph_jax.instruct.kinds import KINDS

GOOD = "Question:\nWhat is it?\n===\nAnswer:\nA cat.\n===\nQuestion:\nWhere?\n===\nAnswer:\nHere.\n"
PAIRS = (("What is it?", "A cat."), ("Where?", "Here."))


def parsed(text, kind="conversation", cut=False):
    return KINDS[kind].parse(text, cut)


def test_the_form_that_was_asked_for():
    assert parsed(GOOD + "===\n") == kinds.Parsed(PAIRS)
    assert kinds.written(PAIRS) == GOOD + "===\n"


@pytest.mark.parametrize("text", [
    GOOD,
    GOOD.replace("\n", "\r\n"),
    GOOD.replace("===\n", ""),
    GOOD.replace("===", "====="),
    GOOD.replace("Question:\n", "**Question:** ").replace("Answer:\n", "**Answer**: "),
    GOOD.replace("Question:", "### Question 1:").replace("Answer:", "answer:"),
    "Here is the dialogue you asked for:\n\n" + GOOD,
    "```text\n" + GOOD + "\n```\n",
    GOOD + "===\n\n===\n",
], ids="unended windows bare long bold numbered introduced fenced separated".split())  # fmt: skip
def test_safe_repairs(text):
    assert parsed(text) == kinds.Parsed(PAIRS, repaired=True)


@pytest.mark.parametrize("text, reason", [
    ("A cat sits here.", "no_blocks"),
    ("", "no_blocks"),
    ("Question:\nWhat?\n===\n", "odd_blocks"),
    ("Answer:\nA cat.\n===\n" + GOOD, "odd_blocks"),
    (GOOD + "===\nQuestion:\nAnd?\n===\nQuestion:\nWhy?\n===\nAnswer:\nSo.\n===\n", "odd_blocks"),
    (GOOD + "===\nAnswer:\nAnother answer.\n", "odd_blocks"),
    (GOOD + "===\nI hope that this helps!", "odd_blocks"),
    ("So much text before it. " * 20 + "\n" + GOOD, "odd_blocks"),
    ("Question:\n\n===\nAnswer:\nA cat.\n===\n", "empty"),
    ("Question:\nWhat?\n===\nAnswer:\n===\n", "empty"),
    (GOOD.replace("A cat", "The captions name a cat"), "leak"),
    (GOOD.replace("A cat", "The second bounding box holds a cat"), "leak"),
    (GOOD.replace("A cat", "A cat at [0.1, 0.25, 0.3, 0.4]"), "leak"),
    (GOOD.replace("A cat", "The given descriptions name a cat"), "leak"),
    (GOOD.replace("A cat", "A cat <image>"), "marker"),
    (GOOD.replace("Here", "I'm sorry, but I cannot say"), "refusal"),
])  # fmt: skip
def test_malformed_conversations(text, reason):
    with pytest.raises(BadSample) as caught:
        parsed(text)
    assert caught.value.reason == reason


@pytest.mark.parametrize("text", [
    "She wears a cap, and a box of tools stands beside her.",
    "There are 3 cups, 0.5 litres each.",
])  # fmt: skip
def test_words_that_are_no_leak(text):
    assert parsed(text, "detail").pairs == (("", text),)


@pytest.mark.parametrize("end, kept", [
    ("===\nQuestion:\nAnd wh", 2), ("===\nQuestion:\nAnd?\n===\nAnswer:\nBeca", 2), ("===\n", 2),
    ("", 1),
])  # fmt: skip
def test_what_was_cut_off_ends_with_the_last_whole_block(end, kept):
    assert parsed(GOOD + end, cut=True).pairs == PAIRS[:kept]


@pytest.mark.parametrize("kind, text, reason", [
    ("conversation", "Question:\nWhat?\n===\nAnswer:\nA c", "cut_off"),
    ("conversation", "Question:\nWh", "cut_off"),
    ("reasoning", "Question:\nWhat?\n===\nAnswer:\nA c", "cut_off"),
    ("detail", "The image sh", "cut_off"),
    ("captions", "A c", "no_captions"),
])  # fmt: skip
def test_what_was_cut_off_too_early(kind, text, reason):
    with pytest.raises(BadSample) as caught:
        parsed(text, kind, cut=True)
    assert caught.value.reason == reason


def test_reasoning_is_one_block():
    one = "Question:\nWhy?\n===\nAnswer:\nBecause.\n===\n"
    assert parsed(one, "reasoning").pairs == (("Why?", "Because."),)
    with pytest.raises(BadSample, match="2 questions, expected one"):
        parsed(one + one, "reasoning")


def test_a_description_is_text_alone():
    assert parsed("A cat.\n\nIt sleeps.", "detail") == kinds.Parsed((("", "A cat.\n\nIt sleeps."),))
    assert parsed("A cat.\n===\n", "detail") == kinds.Parsed((("", "A cat."),), repaired=True)
    for text, reason in ((GOOD, "odd_blocks"), (" \n", "empty"), ("As an AI I can't", "refusal")):
        with pytest.raises(BadSample) as caught:
            parsed(text, "detail")
        assert caught.value.reason == reason


def test_captions_are_lines():
    plain = (("", "A cat."), ("", "It is 3 years old."))
    assert parsed("A cat.\nIt is 3 years old.\n", "captions") == kinds.Parsed(plain)
    listed = 'Here they are:\n\n1. A cat.\n- "It is 3 years old."\n'
    assert parsed(listed, "captions") == kinds.Parsed(plain, repaired=True)
    assert parsed("A cat.\nIt is", "captions", cut=True).pairs == plain[:1]
    with pytest.raises(BadSample, match="11 lines"):
        parsed("A cat.\n" * 11, "captions")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_our_own_examples_are_of_the_form_that_is_asked_for(kind):
    (role, system), *rest = kinds.opening(kind)
    assert role == "system" and len(system) > 50
    assert [role for role, _ in rest] == ["user", "assistant"] * (len(rest) // 2)
    assert len(rest) // 2 == {"conversation": 2, "captions": 0}.get(kind.name, 3)
    for (_, context), (_, reply) in zip(rest[::2], rest[1::2], strict=True):
        assert not kind.parse(reply).repaired
        assert ("\n\n" in context) == kind.boxes


def test_examples_of_ones_own(tmp_path):
    (tmp_path / "a_caps.txt").write_text("A dog.")
    (tmp_path / "a_conv.txt").write_text("It is a dog.")
    system, *rest = kinds.opening(KINDS["detail"], tmp_path)
    assert system == kinds.opening(KINDS["detail"])[0]
    assert rest == [("user", "A dog."), ("assistant", "It is a dog.")]
    (tmp_path / "system_message.txt").write_text("Be brief.")
    assert kinds.opening(KINDS["detail"], tmp_path)[0] == ("system", "Be brief.")
    with pytest.raises(ConfigError, match="a_conv.txt would be refused as a reply: no_blocks"):
        kinds.opening(KINDS["reasoning"], tmp_path)
    (tmp_path / "b_caps.txt").write_text("A bird.")
    with pytest.raises(FileError, match="lacks b_conv.txt"):
        kinds.opening(KINDS["detail"], tmp_path)
    shutil.move(tmp_path / "b_caps.txt", tmp_path / "c_conv.txt")
    with pytest.raises(FileError, match="lacks c_caps.txt"):
        kinds.opening(KINDS["detail"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="holds neither system_message.txt nor pairs"):
        kinds.opening(KINDS["detail"], tmp_path / "empty")
