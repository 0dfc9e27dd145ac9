"""LLaVA's templates and labels, against what its reference wrote (tests/golden/llava)."""

import copy
import dataclasses
import functools
import hashlib
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from metamorph_jax.convert.chat_template import to_jinja
from metamorph_jax.data import official_masks, pipeline
from metamorph_jax.data.chat import IGNORE, SENTINEL, Chat, Markers
from metamorph_jax.data.chat_templates import TEMPLATES, Special, render, show_image_first
from metamorph_jax.data.config import DataConfig, InputSpec, OrderConfig, RowConfig, SourceConfig
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.published_templates import template_of
from metamorph_jax.data.sources.base import IMAGE, ImageRef, Sample, images_in_front
from metamorph_jax.data.sources.kinds import turns_of
from metamorph_jax.data.views import Single
from metamorph_jax.errors import BadSample, ConfigError
from metamorph_jax.recipe import Shard
from tests.data.conftest import conversation, make_image, write_jsonl

PROMPTS, MASKS, TEXTS = (f"llava/conversation/{n}.json" for n in ("prompts", "masks", "tokenize"))


def read(root, name):
    return json.loads((pathlib.Path(root) / name).read_text())


def pytest_generate_tests(metafunc):
    """Every case of every descriptor is one that a test here takes."""
    root = metafunc.config.getoption("--golden-root")
    tables = {
        "template": (PROMPTS, lambda d: list(d["templates"])),
        "prompt": (PROMPTS, lambda d: [str(k) for k in range(len(d["cases"]))]),
        "masks": (MASKS, lambda d: [str(k) for k in range(len(d["cases"]))]),
    }
    for name, (file, cases) in tables.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases(read(root, file)))


@pytest.fixture(scope="module")
def golden(golden_root):
    return {name: read(golden_root, name) for name in (PROMPTS, MASKS, TEXTS)}


@pytest.fixture(scope="module")
def tokenizers(golden_root):
    """Name in the descriptors -> tokenizer; the golden files hold the models, not the settings."""

    def load(file, chatml=(), **special):
        path = golden_root / "llava/tokenizer" / file
        made = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
        made.add_tokens([AddedToken(t, normalized=False, special=True) for t in chatml])
        return made

    llama = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    chatml, found = ("<|im_start|>", "<|im_end|>"), {}
    for legacy, file in ((False, "tokenizer.json"), (True, "tokenizer_legacy.json")):
        name = f"sentencepiece legacy={legacy}"
        found[name] = load(file, **llama)
        found[f"{name} + chatml special tokens"] = load(file, chatml, **llama)
    found["bytelevel_chatml (no BOS)"] = load("bytelevel_chatml.json", eos_token="<|im_end|>")
    return found


def written(template, turns, system="default"):
    """A conversation as one string."""
    system = template.default_system if system == "default" else system
    return "".join(piece for piece, _ in render(template, turns, system))


# ---- prompts


@pytest.mark.golden
def test_template_golden(template, golden):
    """Separators, roles, and the system message down to its hash."""
    facts, row = golden[PROMPTS]["templates"][template], TEMPLATES[template]
    assert set(facts) == {
        "sep_style", "sep", "sep2", "version", "roles", "offset", "system_len", "system_sha256",
        "n_preset_messages",
    }  # fmt: skip
    system = row.default_system or ""
    if facts["sep_style"] == "MPT":  # here the reference counts the beginning of the turn
        system = written(row, ()).removesuffix(facts["sep"])
    assert len(system) == facts["system_len"]
    assert hashlib.sha256(system.encode()).hexdigest() == facts["system_sha256"]
    ends = {"SINGLE": "sep", "TWO": "sep2", "LLAMA_2": "sep2", "MPT": "sep", "PLAIN": "sep"}
    assert (row.close or row.stop) == facts[ends[facts["sep_style"]]]
    assert len(row.preset) == facts["offset"] == facts["n_preset_messages"]
    routine = official_masks.ROUNDS.get(template)
    assert (template in official_masks.CAPTIONS) == (facts["sep_style"] == "PLAIN")
    assert (routine is not None and " ASSISTANT: " in routine.border) == (
        facts["version"].startswith("v1")
    )
    assert (template in official_masks.PIECES) == (facts["sep_style"] == "SINGLE")
    if facts["sep_style"] not in ("LLAMA_2", "PLAIN"):  # those write no names
        empty = written(row, [("user", ""), ("assistant", "")])
        assert all(role in empty for role in facts["roles"])


@pytest.mark.golden
def test_prompt_golden(prompt, golden):
    case = golden[PROMPTS]["cases"][int(prompt)]
    assert set(case) == {
        "template", "messages", "append_empty_assistant", "image_tuple", "prompt", "error",
    }  # fmt: skip
    row, messages = TEMPLATES[case["template"]], case["messages"]
    turns = [(("user", "assistant")[k % 2], text) for k, text in enumerate(messages)]
    if case["image_tuple"]:
        turns = show_image_first(row, *messages)
    if case["append_empty_assistant"]:
        turns.append(("assistant", ""))
    if case["error"]:
        with pytest.raises(BadSample, match=f"{row.name} has no place for a turn by assistant"):
            written(row, turns)
    else:
        assert written(row, turns) == case["prompt"]


@pytest.mark.golden
def test_prompts_are_written_as_ids(golden, tokenizers):
    """`Chat.prompt` is the prompt's text as the reference tokenises it."""
    for tokenizer, style in (
        ("sentencepiece legacy=False + chatml special tokens", ("TWO", "LLAMA_2", "MPT", "SINGLE")),
        ("sentencepiece legacy=True + chatml special tokens", ("TWO", "LLAMA_2", "MPT", "PLAIN")),
        ("bytelevel_chatml (no BOS)", ("MPT",)),
    ):
        reference = reference_ids(tokenizers[tokenizer])
        for case in golden[PROMPTS]["cases"]:
            facts = golden[PROMPTS]["templates"][case["template"]]
            if case["error"] or facts["sep_style"] not in style:
                continue
            chat = Chat(tokenizers[tokenizer], case["template"])
            messages = case["messages"]
            turns = [(("user", "assistant")[k % 2], text) for k, text in enumerate(messages)]
            if case["image_tuple"]:
                turns = show_image_first(chat.template, *messages)
            assert chat.prompt(turns).tolist() == reference(case["prompt"]), case


def reference_ids(tokenizer):
    """The reference's way: each part between images by itself, all with BOS, of which one stays."""

    def ids(text):
        parts = [tokenizer.encode(part, add_special_tokens=False) for part in text.split(IMAGE)]
        start = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
        return [*start, *[i for part in parts for i in (SENTINEL, *part)][1:]]

    return ids


# ---- ids and labels


def masks_chat(case, tokenizers, **options):
    template = TEMPLATES[case["template"]]
    if case["mm_use_im_start_end"]:  # these tokenizers don't have them as tokens
        template = dataclasses.replace(template, image=f"<im_start>{IMAGE}<im_end>")
    return Chat(tokenizers[case["tokenizer"]], template, **options)


def masks_turns(case, golden):
    """The turns of a case, as the sources make them; v0 keeps a leading answer."""
    (record,) = (s for s in golden[MASKS]["samples"] if s["id"] == case["sample"])
    said = record["conversations"]
    roles = {"human": "user", "gpt": "assistant"}
    whole = tuple((roles[turn["from"]], turn["value"]) for turn in said)
    assert case["has_image"] == ("image" in record)
    sample = Sample("", "", whole, (ImageRef("a.png"),) * case["has_image"])
    front = images_in_front(sample) if sample.images else sample
    front = front.checked(1)
    if case["template"] in official_masks.PIECES or whole[0][0] == "user":
        return front.turns
    kept = turns_of({"conversations": [{"from": r, "value": t} for r, t in front.turns]})
    assert kept == front.turns[1:]
    return kept


@pytest.mark.golden
def test_values_golden(masks, golden):
    """Where the images of a message go, and what stands around them."""
    case = golden[MASKS]["cases"][int(masks)]
    image = f"<im_start>{IMAGE}<im_end>" if case["mm_use_im_start_end"] else IMAGE
    image = TEMPLATES[case["template"]].image.replace(IMAGE, image)
    got = [text.replace(IMAGE, image) for _, text in masks_turns(case, golden)]
    want = case["values_after_multimodal"]
    assert got == want[len(want) - len(got) :]  # the first answer is dropped where it leads


@pytest.mark.golden
def test_ids_golden(masks, golden, tokenizers):
    """Ids of all cases, labels of those that the reference does not get wrong."""
    case = golden[MASKS]["cases"][int(masks)]
    chat = masks_chat(case, tokenizers)
    got = chat.conversation(masks_turns(case, golden))
    assert got.ids.tolist() == case["input_ids"]
    learnt = got.labels[got.labels != IGNORE]
    rounds = official_masks.ROUNDS.get(case["template"])
    drifting = case["template"] in official_masks.PIECES or (rounds and rounds.first > 1)
    if case["mismatch_warning"] or drifting:
        answers = [text for role, text in masks_turns(case, golden) if role == "assistant"]
        text = chat.tokenizer.decode(learnt)
        end = chat.close and str(chat.template.close) or "\n###"
        assert text.replace(" ", "") == "".join(a + end for a in answers).replace(" ", "")
    else:
        assert got.labels.tolist() == case["labels"]


@pytest.mark.golden
def test_official_masks_golden(masks, golden, tokenizers):
    case = golden[MASKS]["cases"][int(masks)]
    assert set(case) == {
        "template", "tokenizer", "sample", "has_image", "mm_use_im_start_end", "model_max_length",
        "values_after_multimodal", "input_ids", "labels", "mismatch_warning", "n_supervised",
        "supervised_tokens",
    }  # fmt: skip
    chat = masks_chat(case, tokenizers, official=case["model_max_length"])
    got = chat.conversation(masks_turns(case, golden))
    assert got.ids.tolist() == case["input_ids"]
    assert got.labels.tolist() == case["labels"]
    assert bool(got.ignored) == case["mismatch_warning"]
    learnt = got.labels[got.labels != IGNORE].tolist()
    assert len(learnt) == case["n_supervised"]
    assert chat.tokenizer.convert_ids_to_tokens(learnt) == case["supervised_tokens"]


@pytest.mark.golden
def test_every_part_of_the_golden_files_is_read(golden, tokenizers):
    prompts, masks, texts = (golden[name] for name in (PROMPTS, MASKS, TEXTS))
    assert set(prompts) == {"templates", "cases"}
    assert {c["template"] for c in prompts["cases"]} == set(prompts["templates"])
    assert set(prompts["templates"]) <= set(TEMPLATES)
    assert set(prompts["templates"]) == set(official_masks.TEMPLATES)
    assert set(masks) == {
        "constants", "special_ids", "special_ids_bytelevel", "special_ids_chatml_on_sentencepiece",
        "samples", "cases",
    }  # fmt: skip
    assert masks["constants"] == {"IGNORE_INDEX": IGNORE, "IMAGE_TOKEN_INDEX": SENTINEL}
    assert {c["sample"] for c in masks["cases"]} == {s["id"] for s in masks["samples"]}
    llama = tokenizers["sentencepiece legacy=False + chatml special tokens"]
    ids = masks["special_ids"]
    assert (llama.bos_token_id, llama.eos_token_id) == (ids["bos"], ids["eos"])
    assert llama.unk_token_id == ids["unk"] == ids["pad"] == official_masks.PAD
    for name, special in (
        ("bytelevel_chatml (no BOS)", masks["special_ids_bytelevel"]),
        (f"{'sentencepiece legacy=False'} + chatml special tokens",
         masks["special_ids_chatml_on_sentencepiece"]),
    ):  # fmt: skip
        found = tokenizers[name].convert_tokens_to_ids(list(special))
        assert dict(zip(special, found, strict=True)) == special
    used = {c["tokenizer"] for c in masks["cases"]} | {c["tokenizer"] for c in texts["image_token"]}
    assert used == set(tokenizers)


@pytest.mark.golden
def test_texts_golden(golden, tokenizers):
    """Ids of texts; also of one that begins with a blank, which tokenizer.json loses by itself."""
    texts = golden[TEXTS]
    assert set(texts) == {"texts", "image_token"}
    for case in texts["texts"]:
        assert set(case) == {"text", "legacy", "ids", "tokenizer_json_equal"}
        tokenizer = tokenizers[f"sentencepiece legacy={case['legacy']}"]
        got = Chat(tokenizer, "v1")._texts.parsed(case["text"])
        assert [tokenizer.bos_token_id, *got] == case["ids"], case
        plain = tokenizer.encode(case["text"], add_special_tokens=False)
        assert ([tokenizer.bos_token_id, *plain] == case["ids"]) == case["tokenizer_json_equal"]
    for case in texts["image_token"]:
        assert set(case) == {"prompt", "tokenizer", "ids"}
        chat = Chat(tokenizers[case["tokenizer"]], BARE)
        assert chat.conversation([("user", case["prompt"])]).ids.tolist() == case["ids"], case


BARE = dataclasses.replace(TEMPLATES["plain"], user=(("{text}", False),), training=None)


# ---- any text, any tokenizer

SEPARATORS = (" ASSISTANT: ", "</s>", "[/INST] ", "<s>", "###", "\n", "<|im_end|>", "<|im_start|>",
              "USER:", "{text}", "{system}", " ", "<unk>")  # fmt: skip
TEXT = st.lists(
    st.sampled_from(SEPARATORS) | st.text(st.characters(codec="utf-8", exclude_characters="▁")),
    max_size=6,
).map("".join)
NAMES = sorted(set(official_masks.TEMPLATES) - set(official_masks.CAPTIONS))


def runs(labels):
    """Stretches of labels one after another."""
    at = np.flatnonzero(labels != IGNORE)
    return [labels[part] for part in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if len(part)]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(NAMES), st.booleans(), st.lists(TEXT, min_size=2, max_size=6))
def test_answers_and_what_ends_them_are_learnt(tokenizers, data, name, legacy, texts):
    """Whatever stands in a message is data: each answer is learnt as a whole, and nothing else."""
    known = [f"sentencepiece legacy={legacy} + chatml special tokens"]
    if TEMPLATES[name].user[0][0] == Special("<|im_start|>"):
        known.append("bytelevel_chatml (no BOS)")
    tokenizer = tokenizers[data.draw(st.sampled_from(known))]
    chat = Chat(tokenizer, name)
    texts = [text.replace(IMAGE, "image") for text in texts]
    turns = [
        ("assistant", text) if k % 2 else ("user", text or "Q") for k, text in enumerate(texts)
    ]
    got = chat.conversation(turns)
    end = [chat.close] if chat.close else []
    after = "" if chat.close else "\n###"
    guard = tokenizer.encode("x", add_special_tokens=False)
    before = " " if (chat.template.training or chat.template).assistant[-2][0][0] == " " else ""
    learnt = []
    for run in runs(got.labels):
        assert run[len(run) - len(end) :].tolist() == end
        ids = [*guard, *run[: len(run) - len(end)].tolist()]
        assert not set(ids) & set(chat.specials.values())
        learnt.append(tokenizer.decode(ids, clean_up_tokenization_spaces=False)[1:])
    wanted = [before + text + after for role, text in turns if role == "assistant" and text]
    if name in ("llama_2", "llava_llama_2", "mistral_instruct"):
        wanted = [f"{text} " for text in wanted]
    assert learnt == wanted


# ---- markers, stops, what does not fit


@pytest.mark.parametrize("legacy", [False, True])
def test_markers_that_are_tokens(tokenizers, legacy):
    """Text after the end marker continues it, as in the reference's own string."""
    tokenizer = copy.deepcopy(tokenizers[f"sentencepiece legacy={legacy}"])
    names = ["<im_start>", "<im_end>"]
    tokenizer.add_tokens([AddedToken(n, normalized=False, special=True) for n in names])
    start, end = tokenizer.convert_tokens_to_ids(names)
    turns = [("user", f"{IMAGE}\nWhat is this?"), ("assistant", "a dog")]
    text = written(TEMPLATES["v1"], turns).replace(IMAGE, f"<im_start>{IMAGE}<im_end>")
    for official in (0, 2048):
        chat = Chat(tokenizer, "v1", markers=Markers((start,), (end,)), official=official)
        got = chat.conversation(turns)
        assert got.ids.tolist() == reference_ids(tokenizer)(text) and not got.ignored
        assert tokenizer.decode(got.labels[got.labels != IGNORE]) == "a dog</s>"
    with pytest.raises(ConfigError, match="needs a tokenizer that has the markers"):
        Chat(tokenizer, "v1", markers=Markers((9999,)), official=2048)
    with pytest.raises(ConfigError, match="v1.*not of chatml"):
        chatml = tokenizers["bytelevel_chatml (no BOS)"]
        Chat(chatml, "chatml", official=2048)


def test_stops(tokenizers):
    tokenizer = tokenizers["sentencepiece legacy=False + chatml special tokens"]
    for name in official_masks.TEMPLATES:
        chat = Chat(tokenizer, name)
        text = chat.template.stop or str(chat.template.close)
        assert tokenizer.decode([*tokenizer.encode("x"), *chat.stop]) == f"<s> x{text}"
        assert (chat.close in chat.stop) == bool(chat.template.close)


@pytest.mark.parametrize("name", ["v1", "llama_2", "llava_v0", "chatml_direct"])
def test_a_second_turn_continues_the_first(tokenizers, name):
    """What a chat has read is what a prompt of both turns holds."""
    chat = Chat(tokenizers["sentencepiece legacy=False + chatml special tokens"], name)
    first, answer = [("user", "What is this?")], chat.encode("a dog")
    begun = chat.prompt(first).tolist()
    both = [*first, ("assistant", "a dog"), ("user", "And the colour?")]
    for ids in (answer, [*answer, *chat.stop]):
        closed = chat.is_closed(np.array(ids))
        assert closed == (ids is not answer)
        read = [*begun, *ids, *chat.next_prompt("And the colour?", closed).tolist()]
        same = chat.tokenizer.decode(read).replace(" ", "")
        assert same == chat.tokenizer.decode(chat.prompt(both)).replace(" ", "")


def test_a_bos_only_where_the_tokenizer_writes_one(tokenizers, golden_root):
    path = str(golden_root / "llava/tokenizer/tokenizer.json")
    without = PreTrainedTokenizerFast(tokenizer_file=path, bos_token="<s>", unk_token="<unk>")
    turns = [("user", "hi"), ("assistant", "yo")]
    with_bos = Chat(tokenizers["sentencepiece legacy=False"], "v1").conversation(turns).ids
    assert with_bos[0] == 1 and Chat(without, "v1").conversation(turns).ids.tolist() == list(
        with_bos[1:]
    )


def test_what_has_no_place_in_a_template(tokenizers):
    tokenizer = tokenizers["sentencepiece legacy=False"]
    for name, turns, what in (
        ("plain", (("system", "S"), ("user", IMAGE), ("assistant", "a")), "no place for a system"),
        ("llama_2", (("user", ""), ("assistant", "a")), "can't begin with an empty message"),
    ):
        with pytest.raises(BadSample, match=f"{name} .*{what}"):
            Chat(tokenizer, name).conversation(turns)
    with pytest.raises(ValueError, match="plain is one message"):
        Chat(tokenizer, "plain").next_prompt("and?", False)
    with pytest.raises(BadSample, match="an image and its caption, no more"):
        Chat(tokenizer, "plain", official=99).conversation((("user", "q"), ("assistant", "a")))
    silent = Chat(tokenizer, "llama_2", system="").prompt([("user", "hi")])
    assert tokenizer.decode(silent) == "<s> [INST] hi [/INST]"


def test_images_go_to_the_front_of_their_messages():
    ref = ImageRef("a.png")
    turns = (("user", f" a {IMAGE} b{IMAGE} "), ("assistant", "c"), ("user", IMAGE))
    moved = images_in_front(Sample("", "", turns, (ref, ref)))
    assert [text for _, text in moved.turns] == [f"{IMAGE}\na  b", "c", IMAGE]
    assert moved.checked(2).images == (ref, ref)
    with pytest.raises(BadSample, match="several_images.*one image of a message"):
        images_in_front(Sample("", "", turns, (ref, ref, ref)))


def test_mmtag_prompts_show_the_image_first(tokenizers):
    chat = Chat(tokenizers["sentencepiece legacy=True"], "v1_mmtag", system="")
    text = chat.tokenizer.decode([i for i in chat.question("Where?", 1) if i != SENTINEL])
    assert text.startswith("<s> USER: <Image> </Image> ASSISTANT: Received.</s>")
    assert text.endswith("USER: Where? ASSISTANT:")
    assert (chat.question("Where?", 1) == SENTINEL).sum() == 1


def test_rows_that_the_reference_ignores_are_counted(tokenizers, tmp_path):
    """From files: official labels, images in front, and a longest sample."""
    make_image(0).save(tmp_path / "a.png")
    said = (
        (f"What?\n{IMAGE}", "red"),
        (f"{IMAGE} What does \" ASSISTANT: \" mean?", "It is the assistant."),
        (f"{IMAGE}{IMAGE} Two tags, one image", "fine"),
        (f"{IMAGE}\nQ", "a very long answer " * 9),
        (f"Q {'x' * 200}\n{IMAGE}", "late"),
    )  # fmt: skip
    records = [{"image": "a.png", "conversations": conversation(*texts)} for texts in said]
    write_jsonl(tmp_path / "a.jsonl", records)
    tokenizer = tokenizers["sentencepiece legacy=False"]

    def counts(**row):
        row = RowConfig("v1", packing="pad", length=128, sample_length=96, images=1, **row)
        source = SourceConfig(str(tmp_path / "a.jsonl"), name="s")
        config = DataConfig((source,), OrderConfig(epochs=1, shuffle=False), row=row)
        stream = pipeline.make_pipeline(
            config, InputSpec(Single(4, Preprocess(8, "crop"))), Chat.of(tokenizer, row),
            pipeline.open_sources(config), Shard(1),
        )  # fmt: skip
        batches = list(stream)
        assert all((batch.segments > 0).sum() <= 96 for batch in batches)
        starts = [int(batch.images.start[0, 0]) for batch in batches]
        stream.close()
        return dict(stream.counts), starts

    found, starts = counts()
    assert found == {"s/marker_mismatch": 1, "s/too_long": 1, "s/cut": 1}
    assert len(set(starts)) > 1  # where the markers stand
    found, starts = counts(official_masks=True, legacy_image_front=True)
    assert found == {"s/official_masks": 1, "s/too_long": 1, "s/cut": 1}
    assert len(set(starts)) == 1
    with pytest.raises(ValueError, match="sample_length is 9: expected at most"):
        RowConfig(length=8, sample_length=9)


# ---- published checkpoints

ORIGINAL = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14"}
V15 = {**ORIGINAL, "mm_projector_type": "mlp2x_gelu", "vocab_size": 32000}
HF = {"model_type": "llava_next"}


@pytest.mark.parametrize(
    "fields, name, expected",
    [
        (V15, "my-model", "vicuna_v1"),
        (V15, "some/llava-v1.5-7b", "vicuna_v1"),
        ({**HF, "text_config": {"model_type": "llama", "vocab_size": 32064}}, "", "vicuna_v1"),
        ({**HF, "text_config": {"model_type": "mistral"}}, "", "mistral_instruct"),
        ({**HF, "text_config": {"model_type": "llama", "vocab_size": 64064}}, "", "chatml_direct"),
        ({**V15, "vocab_size": 64000}, "llava-v1.6-34b", "chatml_direct"),
        ({**V15, "architectures": ["LlavaMistralForCausalLM"]}, "", "mistral_instruct"),
        ({**ORIGINAL, "model_type": "llava_mpt"}, "", "mpt"),
        (ORIGINAL, "LLaVA-Lightning-MPT-7B-preview", "mpt"),
        (ORIGINAL, "llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        (ORIGINAL, "hub/LLaVA-13b-delta-v1-1/", "vicuna_v1"),
        ({**ORIGINAL, "_name_or_path": "LLaVA-7b-v1"}, "", "vicuna_v1"),
        (ORIGINAL, "v1-folder/LLaVA-13b-delta-v0", "llava_v0"),
        ({}, "llava-v1.6-mistral-7b", "mistral_instruct"),
        ({}, "llava-v1.6-34b", "chatml_direct"),
        ({}, "anything", "llava_v0"),
        ({**V15, "_name_or_path": "llava-llama-2-7b"}, "", "llava_llama_2"),
    ],
)
def test_the_template_of_a_published_checkpoint(fields, name, expected):
    assert template_of(fields, name) == expected and expected in TEMPLATES
    shown = template_of(fields, name, demo=True)
    assert shown == ("llava_v1" if expected == "vicuna_v1" else expected)


# ---- exported tokenizers


@pytest.mark.golden
@pytest.mark.parametrize("legacy", [False, True])
def test_transformers_writes_these_prompts(golden, tokenizers, legacy):
    """The Jinja template of each row gives the golden prompts, and the ids of `Chat.prompt`."""
    tokenizer = copy.deepcopy(tokenizers[f"sentencepiece legacy={legacy} + chatml special tokens"])
    for case in golden[PROMPTS]["cases"]:
        if case["image_tuple"]:
            continue
        turns = [
            {"role": ("user", "assistant")[k % 2], "content": text}
            for k, text in enumerate(case["messages"])
        ]
        chat = Chat(tokenizer, case["template"])
        tokenizer.chat_template = to_jinja(chat)
        write = functools.partial(
            tokenizer.apply_chat_template, turns, add_generation_prompt=True, return_dict=False
        )
        if case["error"]:
            with pytest.raises(Exception, match=f"{chat.template.name} has no place for an answer"):
                write()
        else:
            start = "<s>" if legacy or case["prompt"].startswith("<|im_start|>") else "<s> "
            assert write(tokenize=False) == start + case["prompt"]
            pairs = [(turn["role"], turn["content"]) for turn in turns]
            assert write() == chat.prompt(pairs).tolist()


def test_a_tag_around_images_is_exported(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["sentencepiece legacy=True"])
    tokenizer.chat_template = to_jinja(Chat(tokenizer, "v1_mmtag", system=""))
    turns = [{"role": "user", "content": f"{IMAGE}\nWhat?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == f"<s>USER: <Image>{IMAGE}</Image>\nWhat? "
