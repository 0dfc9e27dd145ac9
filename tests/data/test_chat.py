import dataclasses
import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from metamorph_jax.data.chat import IGNORE, SENTINEL, Chat, Markers
from metamorph_jax.data.chat_templates import TEMPLATES, ChatTemplate, Special, fill, render
from metamorph_jax.data.interleave import build_row
from metamorph_jax.data.sources.kinds import turns_of
from metamorph_jax.data.text_ids import TextIds
from metamorph_jax.errors import BadSample, ConfigError
from tests.data.conftest import Ends

GOLDEN = "metamorph/conversations.json"


@pytest.fixture(scope="session")
def golden(golden_root):
    return json.loads((golden_root / GOLDEN).read_text())


def golden_chat(golden, tokenizer, **kw):
    ids = golden["special_ids"]
    return Chat(tokenizer, markers=Markers((ids["<image_start>"],), (ids["<image_end>"],)), **kw)


@pytest.fixture(scope="session")
def tokenizer(golden_root):
    return PreTrainedTokenizerFast(tokenizer_file=str(golden_root / "metamorph/tokenizer.json"))


def pytest_generate_tests(metafunc):
    import pathlib

    root = pathlib.Path(metafunc.config.getoption("--golden-root"))
    data = json.loads((root / GOLDEN).read_text())
    for name, key in (("case", "conversations"), ("question", "inference_prompts")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(data[key]))


def encode(chat, case):
    return chat.conversation(turns_of({"conversations": case["conversation"]}))


@pytest.mark.golden
def test_conversation_golden(case, golden, tokenizer):
    case = golden["conversations"][case]
    got = encode(golden_chat(golden, tokenizer), case)
    # Text alone is cut when tokenised by the reference; rows with pictures are cut by the collator.
    limit = None if case["has_image"] else case["model_max_length"]
    assert got.ids[:limit].tolist() == case["input_ids"]
    assert got.labels[:limit].tolist() == case["labels"]


@pytest.mark.golden
def test_prompt_golden(question, golden, tokenizer):
    case = golden["inference_prompts"][question]
    got = golden_chat(golden, tokenizer).question(case["question"], case["n_images"])
    assert got.tolist() == case["input_ids"]


@pytest.mark.golden
def test_collator_golden(golden, tokenizer):
    collator = golden["collator"]
    n, chat = collator["model_max_length"], golden_chat(golden, tokenizer)
    pad, stack = golden["special_ids"][golden["pad_token"]], []
    for k, name in enumerate(collator["samples"]):
        got = encode(chat, golden["conversations"][name])
        ids, labels = got.ids[:n].tolist(), got.labels[:n].tolist()
        fill = len(collator["input_ids"][k]) - len(ids)
        assert ids + [pad] * fill == collator["input_ids"][k]
        assert labels + [IGNORE] * fill == collator["labels"][k]
        assert [1] * len(ids) + [0] * fill == collator["attention_mask"][k]
        stack += [10 * k + i for i in range(ids.count(SENTINEL))]
    # The reference keeps the pictures of cut sentinels, so that later ones shift; ours don't.
    assert set(stack) < set(collator["image_order"])


@pytest.mark.golden
def test_every_part_of_the_golden_file_is_read(golden):
    assert set(golden) == {
        "special_ids", "vocab_size", "pad_token", "image_placeholder", "ignore", "conversations",
        "inference_prompts", "collator", "note",
    }  # fmt: skip
    assert (golden["image_placeholder"], golden["ignore"]) == (SENTINEL, IGNORE)


def test_single_bos(tokenizer):
    two, one = Chat(tokenizer), Chat(tokenizer, single_bos=True)
    turns = (("user", "What is this?"), ("assistant", "a dog"))
    assert one.conversation(turns).ids.tolist() == two.conversation(turns).ids.tolist()[1:]


def test_training_starts_like_the_prompt(tokenizer):
    chat = Chat(tokenizer)
    turns = (("user", "<image>\nWhat?"), ("assistant", "A cat."))
    prompt = chat.prompt(turns[:1])
    ids = chat.conversation(turns).ids
    assert ids[: len(prompt)].tolist() == prompt.tolist()


class Letters:
    """A toy tokenizer: one id per character, special tokens by name."""

    special = ("<|im_start|>", "<|im_end|>")
    unk_token_id, unk_token = 0, "<unk>"

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]

    def convert_tokens_to_ids(self, token):
        return 900 + self.special.index(token) if token in self.special else 0

    def __len__(self):
        return 1000


def readable(ids):
    names = {900: "[", 901: "]", 1000: "<", 1001: ">", SENTINEL: "@"}
    return "".join(names.get(i, chr(i) if i >= 0 else "-") for i in np.asarray(ids).tolist())


AROUND = Markers((1000,), (1001,))


def test_markers_may_be_missing():
    turns = (("user", "<image>Hi"), ("assistant", "Yo"))
    for markers, image in (((), ()), "@"), (((1000,), ()), "<@"), (((), (1001,)), "@>"):
        chat = Chat(Letters(), "chatml", markers=Markers(*markers))
        assert readable(chat.conversation(turns).ids).startswith(f"[user\n{image}Hi]")


def test_chatml_layout():
    chat = Chat(Letters(), "chatml", system="Be kind", markers=AROUND)
    got = chat.conversation((("user", "<image>Hi"), ("assistant", "Yo <image>")))
    text = "[system\nBe kind]\n[user\n<@>Hi]\n[assistant\nYo <@>]\n"
    assert readable(got.ids) == text
    masked = "".join("." if v == IGNORE else c for v, c in zip(got.labels, text, strict=True))
    assert masked == "." * text.index("Yo") + "Yo <@>]" + "."


def test_document():
    """As it stands, between BOS and EOS; what the assistant says is learnt, and so is the EOS."""
    chat = Chat(Ends(), "document", markers=Markers((1000,)))
    text = lambda ids: readable(ids).replace("[", "^").replace("]", "$")  # noqa: E731
    for turns, ids, labels in (
        ([("user", "a kite"), ("assistant", "<image>")], "^a kite<@$", "-------<@$"),
        ([("user", "<image>"), ("assistant", "a kite")], "^<@a kite$", "---a kite$"),
        ([("assistant", "a<image>b")], "^a<@b$", "-a<@b$"),
        ([("user", "<image>"), ("assistant", "$<image>")], "^<@$<@$", "---$<@$"),
    ):
        got = chat.conversation(turns)
        assert (text(got.ids), text(got.labels)) == (ids, labels)
    assert text(chat.prompt([("user", "<image>Why?")])) == "^<@Why?"
    assert text(chat.question("Why?", 2)) == "^<@<@Why?"
    assert got.ids[3] == ord("$") and chat.stop == (901,) and chat.is_closed(got.ids)
    with pytest.raises(ValueError, match="no EOS .* template document"):
        Chat(Letters(), "document")


@pytest.mark.parametrize("name,start", [("smollm2", "[system\nYou are"), ("chatml", "[user")])
def test_default_system_turn(name, start):
    assert readable(Chat(Letters(), name).question("Hi")).startswith(start)


def test_chatml_without_roles():
    chat = Chat(Letters(), "chatml_short", markers=AROUND)
    got = chat.conversation((("user", "<image>\nOne?"), ("assistant", "a<image>b")))
    assert readable(got.ids) == "[<@>\nOne?\na<@>b]"
    assert readable(got.ids[got.labels != IGNORE]) == "a<@>b]"
    assert readable(chat.question("One?", 1)) == "[<@>\nOne?\n"
    assert readable(chat.prompt((("user", "Draw."),))) == "[Draw.\n"


@pytest.mark.parametrize("template", ["chatml", "chatml_short"])
def test_an_independent_turn_is_the_question_alone(template):
    chat = Chat(Letters(), template, markers=AROUND)
    asked = [(("user", f"{start}{q}?"), ("assistant", q)) for start, q in
             (("<image>\n", "One"), ("", "Two"))]  # fmt: skip
    got = chat.conversation(sum(asked, ()), independent=True)
    for k, q in ((1, "One"), (2, "Two")):  # prefix + turn k
        alone = chat.conversation((("user", f"<image>\n{q}?"), ("assistant", q)))
        see = (got.turns == 0) | (got.turns == k)
        assert got.ids[see].tolist() == alone.ids.tolist()
        assert got.labels[see].tolist() == alone.labels.tolist()


def test_independent_turns():
    chat = Chat(Letters(), "chatml", markers=AROUND)
    turns = (
        ("user", "<image>\nOne?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"),
    )  # fmt: skip
    got = chat.conversation(turns, independent=True)
    text = {k: readable(got.ids[got.turns == k]) for k in (0, 1, 2)}
    assert text[0] == "[user\n<@>"
    assert text[1] == "\nOne?]\n[assistant\n1]\n"
    assert text[2] == "\nTwo?]\n[assistant\n2]\n"
    assert chat.conversation(turns[:2], independent=True).turns is None
    assert chat.conversation((("user", "No picture"), *turns[1:]), independent=True).turns is None


def test_missing_special_token_is_named():
    with pytest.raises(ValueError, match="begin_of_text"):
        Chat(Letters(), "llama3")
    with pytest.raises(ValueError, match="expected one of"):
        Chat(Letters(), "vicuna")


# ---- templates of another kind


LINES = ChatTemplate(
    "lines",
    user=(("USER: {text} ", False),),
    assistant=(("ASSISTANT:", False), (" {text}", True), (Special("<|im_end|>"), True)),
    system=(("{text} ", False),),
    start=(Special("<|im_start|>"),),
    default_system="Chat.",
)
INST = ChatTemplate(
    "inst",
    user=(("[INST] {text} [/INST]", False),),
    first_user=(("[INST] <<{system}>> {text} [/INST]", False),),
    assistant=((" {text} ", True), (Special("<|im_end|>"), True)),
    default_system="Be {text}",
)
CAPTION = ChatTemplate("caption", user=(("{images}", False),), assistant=(("{text}\n", True),))
TURNS = (("user", "<image>\nQ"), ("assistant", "A {system}"), ("user", "R"), ("assistant", "B"))


@pytest.mark.parametrize(
    "template, want, supervised",
    [
        (LINES, "[Chat. USER: @\nQ ASSISTANT: A {system}]USER: R ASSISTANT: B]", " A {system}] B]"),
        (INST, "[INST] <<Be {text}>> @\nQ [/INST] A {system} ][INST] R [/INST] B ]",
               " A {system} ] B ]"),
        (CAPTION, "@A {system}\nB\n", "A {system}\nB\n"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)  # fmt: skip
def test_templates_are_rows(template, want, supervised):
    """LLaVA's ways to write: one line, a system message in the first turn, captions alone."""
    chat = Chat(Letters(), template)
    got = chat.conversation(TURNS)
    assert readable(got.ids) == want
    assert readable(got.labels[got.labels != IGNORE]) == supervised
    alone = chat.conversation(TURNS, independent=True)
    if template is not CAPTION:
        prefix = readable(alone.ids[alone.turns == 0])
        assert want.startswith(prefix) and prefix.endswith("@")


def test_a_prompt_ends_with_the_head_of_an_answer():
    assert readable(Chat(Letters(), LINES).question("Q", 1)) == "[Chat. USER: @\nQ ASSISTANT:"
    assert list(fill(LINES.assistant, "")) == [("ASSISTANT:", False)]
    assert render(INST, (), "Be kind") == []


class Blanks(Letters):
    """Begins a text with a blank "_", unless it follows a special token, as SentencePiece does."""

    def encode(self, text, add_special_tokens=False):
        for token in self.special:
            if text.startswith(token):
                return [self.convert_tokens_to_ids(token), *super().encode(text[len(token) :])]
        return super().encode("_" + text)


@pytest.mark.parametrize("in_context, second", [(False, "]_USER: R"), (True, "]USER: R")])
def test_text_after_a_special_token(in_context, second):
    chat = Chat(Blanks(), dataclasses.replace(LINES, in_context=in_context))
    got = chat.conversation(TURNS)
    want = f"[_Chat. USER: @_\nQ ASSISTANT: A {{system}}{second} ASSISTANT: B]"
    assert readable(got.ids) == want
    assert readable(got.labels[got.labels != IGNORE]) == " A {system}] B]"


def test_text_after_a_token_that_a_tokenizer_does_not_recognise():
    """Such as stand in for one in `metamorph data check`."""
    chat = Chat(Letters(), dataclasses.replace(LINES, in_context=True))
    assert readable(chat.conversation(TURNS).ids).endswith("A {system}]USER: R ASSISTANT: B]")


# ---- special tokens and long messages


def test_special_tokens_in_a_message_are_text(tokenizer):
    """In answers no label closes the turn, in prompts no turn begins."""
    chat = Chat(tokenizer, markers=AROUND)
    tags = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    assert len(tags) > 5
    for tag in tags:
        text = f"a {tag}{tag} b"
        ids = chat.encode(text)
        assert not set(ids) & set(tokenizer.all_special_ids) and tokenizer.decode(ids) == text
        learnt = chat.conversation((("user", text), ("assistant", text))).labels
        learnt = learnt[learnt != IGNORE].tolist()
        assert learnt == [*ids, chat.close]
        prompt = chat.prompt([("user", text)]).tolist()
        assert prompt.count(chat.close) == 1


class Parsing(Letters):
    """Recognises its special tokens wherever they stand, as tokenizers do that can't be told."""

    def encode(self, text, add_special_tokens=False):
        ids = []
        while text:
            found = next((t for t in self.special if text.startswith(t)), text[0])
            ids.append(self.convert_tokens_to_ids(found) if len(found) > 1 else ord(found))
            text = text[len(found) :]
        return ids


@pytest.mark.parametrize("in_context", [False, True])
def test_special_tokens_of_other_tokenizers(in_context):
    chat = Chat(Parsing(), dataclasses.replace(TEMPLATES["chatml"], in_context=in_context))
    text = "a<|im_end|>\n<|im_start|>b<|im_"
    ids = chat.conversation((("user", text), ("assistant", text))).ids
    assert readable(ids) == f"[user\n{text}]\n[assistant\n{text}]\n"


def test_long_messages_are_whole():
    """What comes after a long document is kept; a cut answer is not taught to end."""
    chat = Chat(Letters(), "chatml")
    document = "x" * 150_000
    ids = chat.conversation((("user", document + "Q?"), ("assistant", "A"))).ids
    assert readable(ids).endswith("Q?]\n[assistant\nA]\n") and len(ids) > 150_000
    assert readable(chat.prompt([("user", document + "Q?")])).endswith("Q?]\n[assistant\n")
    encoded = chat.conversation((("user", "Q"), ("assistant", document)))
    row = build_row(encoded.ids, encoded.labels, [], 1, 4096)
    assert row.cut and chat.close not in row.text_targets
    whole = chat.conversation((("user", "Q"), ("assistant", "A")))
    assert not build_row(whole.ids, whole.labels, [], 1, 4096).cut
    with pytest.raises(BadSample, match="too_long"):
        chat.conversation((("user", "x" * 3_000_000), ("assistant", "A")))


def test_a_pattern_that_takes_for_ever_costs_one_sample():
    """Oniguruma gives up on a match; that is not the end of the program, nor of the tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def text_ids(pattern):
        inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, " ": 2}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return TextIds(PreTrainedTokenizerFast(tokenizer_object=inner), (), False)

    ids = text_ids("(a+)+b")
    with pytest.raises(BadSample, match="tokenizer: it fails on a text of 60 characters .*limit"):
        ids("a" * 60)
    assert ids("a") == [1]

    def panics(*_, **__):
        raise type("PanicException", (BaseException,), {})("as in Rust")

    broken = Letters()
    broken.encode = panics
    with pytest.raises(ConfigError, match="can't be used: .* 2 characters .as in Rust"):
        TextIds(broken, (), False)
