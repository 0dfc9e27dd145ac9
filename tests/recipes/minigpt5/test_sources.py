"""What MiniGPT-5 is trained on: official files, strings and labels against the golden set."""

import collections
import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data import pipeline
from metamorph_jax.data.caption_ids import CaptionIds
from metamorph_jax.data.chat import SENTINEL, Chat
from metamorph_jax.data.config import (
    DataConfig,
    DrawingSpec,
    ImageConfig,
    InputSpec,
    OrderConfig,
    RowConfig,
    SourceConfig,
)
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import in_answers
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.data.views import Single
from metamorph_jax.errors import BadSample, DataError, FileError
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.minigpt5 import sources, wordings
from tests.data.conftest import conversation, make_image, write_jsonl, write_tar
from tests.data.sets import made as story_sets
from tests.recipes.minigpt5 import made

V8 = "".join(f"[IMG{k}]" for k in range(8))


def data_of(path, kind, **more):
    config = DataConfig(
        sources=(SourceConfig(str(path), kind=kind, blocked=more.pop("blocked", "")),),
        row=RowConfig("vokens", length=512, images=8),
        order=OrderConfig(epochs=1, shuffle=False),
        **more,
    )
    return config


def opened(path, kind, chat=None, **more):
    known = sources.kinds(chat and chat.encode)
    return pipeline.open_sources(data_of(path, kind, **more), known)[0]


def spec_of(**more):
    drawings = DrawingSpec(
        4, in_answers, Preprocess(8, "pad", mean=(1.0, 1.0, 1.0)),
        ids=tuple(range(made.VOKENS, made.VOKENS + 8)), unlearnt=tuple(range(1, 7)), **more,
    )  # fmt: skip
    return InputSpec(Single(1, Preprocess(8)), drawings=drawings)


def stream_of(path, kind, tokenizer=None, spec=None, **more):
    chat = Chat(tokenizer or made.Words(), "vokens")
    config = data_of(path, kind, **more)
    found = pipeline.open_sources(config, sources.kinds(chat.encode))
    return pipeline.make_stream(config, spec or spec_of(), chat, found)


def samples_of(source):
    """(good samples, how often each reason) of a source."""
    good, bad = [], collections.Counter()
    for k in range(len(source)):
        try:
            good.append(source.sample(k, np.random.default_rng(k)))
        except BadSample as error:
            bad[error.reason] += 1
    return good, dict(bad)


# ---- the golden set


@pytest.fixture(scope="module")
def golden(golden_root):
    return json.loads((golden_root / "minigpt5/datasets.json").read_text())


def check_items(source, items, root, templates=()):
    """All samples of a source that can be used are the golden items, in their order; where the
    wording is a choice, it is one of `templates` for some seed."""
    good = [k for k in range(len(source)) if usable(source, k)]
    assert len(good) == len(items)
    for k, item in zip(good, items, strict=True):
        found = next((s for s in drawn(source, k) if text_of(s)[0] == item["source"]), None)
        assert found is not None, f"no seed gives {item['source']!r}"
        assert text_of(found)[1] == item["target"]
        read = [ref.path for ref in found.images[: found.turns[0][1].count(IMAGE)]]
        wanted = [name for name in item["input_images"] if name is not None]
        assert [p.removeprefix(f"{root}/") for p in read] == [tail(name) for name in wanted]
        to_draw = [ref.path.removeprefix(f"{root}/") for ref in found.answer_images]
        assert to_draw == ([tail(item["output_image"])] if item["output_image"] else [])
        captions = [ref.caption for ref in found.answer_images]
        assert captions == [item["caption"] or ""] * len(to_draw)
        assert found.id in item["task_name"] or item["task_name"].startswith(found.id)


def usable(source, k):
    try:
        source.sample(k, np.random.default_rng(0))
    except BadSample:
        return False
    return True


def drawn(source, k):
    """Sample k with many seeds."""
    return (source.sample(k, np.random.default_rng(seed)) for seed in range(100))


def text_of(sample):
    """(source, target) as the reference has them."""
    (first, given), (second, learnt) = sample.turns
    assert (first, second) == ("source", "target")
    return given.replace(IMAGE, "<ImageHere>"), learnt.replace(IMAGE, V8)


def tail(name):
    """The path of an image without the folders of its set."""
    return name.split("/", 2)[2] if name.startswith("MMDialog") else name.split("/", 1)[1]


@pytest.mark.golden
def test_all_of_it_is_read(golden):
    """Every set of the file, and of each set everything, is what the tests below ask for."""
    known = {
        "cc3m": {"raw_captions", "random_seed", "train_items", "item0"},
        "vist": {"stories", "image_mapping", "random_seed", "train_items", "multimodal_item",
                 "understanding_item", "test_items"},
        "mmdialog": {"conversations", "existing_images", "train_items", "test_items"},
    }  # fmt: skip
    assert {name: set(case) for name, case in golden.items()} == known


@pytest.mark.golden
def test_cc3m_golden(golden, tmp_path):
    case = golden["cc3m"]
    path = made.cc3m(tmp_path, case["raw_captions"])
    check_items(opened(path, "cc3m"), case["train_items"], tmp_path)
    plain = [item for item in case["train_items"] if "instruction" not in item["task_name"]]
    check_items(opened(path, "cc3m_test"), plain, tmp_path)


@pytest.mark.golden
def test_vist_golden(golden, tmp_path):
    case = golden["vist"]
    path = made.vist(tmp_path, case["stories"], case["image_mapping"])
    made.pictures(tmp_path, *case["image_mapping"].values())
    check_items(opened(path, "vist"), case["train_items"], tmp_path)
    check_items(opened(path, "vist_test"), case["test_items"], tmp_path)


@pytest.mark.golden
def test_mmdialog_golden(golden, tmp_path):
    case = golden["mmdialog"]
    path = made.mmdialog(tmp_path, case["conversations"])
    made.pictures(tmp_path, *case["existing_images"])
    chat = Chat(made.Words(), "vokens")
    check_items(opened(path, "mmdialog", chat), case["train_items"], tmp_path)
    check_items(opened(path, "mmdialog_test", chat), case["test_items"], tmp_path)


@pytest.mark.golden
def test_ids_and_labels_golden(golden, tmp_path):
    """The three items whose ids are given: the same but for what the words' ids are. The begin
    token comes before them, and the labels of our rows are those of the next position."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    cc3m = made.cc3m(tmp_path / "a", golden["cc3m"]["raw_captions"])
    case = golden["vist"]
    vist = made.vist(tmp_path / "b", case["stories"], case["image_mapping"])
    made.pictures(tmp_path / "b", *case["image_mapping"].values())
    words, names = made.Words(), {}
    for path, kind, item, task in (
        (cc3m, "cc3m", golden["cc3m"]["item0"], "cc3m_0"),
        (vist, "vist", case["multimodal_item"], case["multimodal_item"]["task_name"]),
        (vist, "vist", case["understanding_item"], case["understanding_item"]["task_name"]),
    ):
        check_ids(stream_of(path, kind, words), item, task, golden, names)


def check_ids(stream, item, task, golden, names):
    (source,) = stream.sources
    wanted = next(x for name in ("cc3m", "vist") for x in golden[name]["train_items"]
                  if x["task_name"] == task)  # fmt: skip
    k = next(k for k in range(len(source)) if source.sample(k, np.random.default_rng(0)).id == task)
    sample = next(s for s in drawn(source, k) if text_of(s)[0] == wanted["source"])
    row = stream._item(sample, 0)
    ids = np.where(row["image_slots"] >= 0, made.READ_ID, row["tokens"]).tolist()
    assert ids[0] == made.BOS and len(ids) == 1 + len(item["input_ids"])
    for ours, theirs in zip(ids[1:], item["input_ids"], strict=True):  # words by another name
        assert ours == theirs if theirs >= made.VOKENS else names.setdefault(theirs, ours) == ours
    assert len({*names.values()}) == len(names)
    labels = [-100 if label < 0 else label for label in row["text_targets"][:-1]]
    wanted = [names.get(label, label) for label in item["labels"]]
    assert labels == wanted and row["text_targets"][-1] == -1
    assert item["attention_mask"] == [1] * len(labels)
    assert len(row["view_starts"]) == item.get("num_input_images", 0)
    if item.get("output_image_is_zeros"):
        assert "drawings" not in row
    else:
        (start,) = row["drawing_starts"]
        assert row["tokens"][start + 1] == made.VOKENS  # its state predicts the first voken


# ---- tokens


def test_ids_are_those_of_the_slow_tokenizer(golden_root):
    """What `LlamaTokenizer(legacy=True)` of transformers 4.31.0 makes of sources and targets, with
    the vokens as additional special tokens: blanks beside these are lost, and the text after one
    begins like a text of its own. Whatever the tokenizer's own setting is."""
    from transformers import PreTrainedTokenizerFast

    cases = json.loads(pathlib.Path(__file__).with_name("slow_ids.json").read_text())
    for file in ("tokenizer.json", "tokenizer_legacy.json"):
        path = str(golden_root / "llava/tokenizer" / file)
        names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        chat = Chat(PreTrainedTokenizerFast(tokenizer_file=path, **names), "vokens")
        for case in cases:
            turns = [("source", case["source"].replace("<ImageHere>", IMAGE)),
                     ("target", case["target"].replace(V8, IMAGE))]  # fmt: skip
            found = chat.conversation(turns)
            assert found.ids.tolist() == [*case["source_ids"], *case["target_ids"]]
            assert (found.labels == -100).sum() == len(case["source_ids"])


def test_turns_are_written_as_dialogues_are():
    """A conversation of several turns has the ids of a dialogue's turns up to there."""
    chat, told = Chat(made.Words(), "vokens"), wordings.DIALOGUE_SYSTEM
    turns = [("user", f"hello there {IMAGE}"), ("assistant", "nice photo"), ("user", "and yours?"),
             ("assistant", f"here it is {IMAGE}")]  # fmt: skip
    source = (f"{told} ###Human: hello there <Img>{IMAGE}</Img> ###Assistant: nice photo "
              "###Human: and yours? ###Assistant:")  # fmt: skip
    whole = chat.conversation(turns)
    single = chat.conversation([("source", source), ("target", f"here it is {IMAGE} ###")])
    assert whole.ids.tolist() == single.ids.tolist()
    last = single.labels != -100
    assert (whole.labels[last] == single.labels[last]).all() and (whole.labels != -100).sum() == 8
    prompt = chat.prompt(turns[:3]).tolist()
    assert prompt == chat.prompt([("source", source)]).tolist() == whole.ids[: len(prompt)].tolist()
    answer = whole.ids[len(prompt) :]
    assert chat.is_closed(answer) and SENTINEL in answer


# ---- captions


def test_every_hundredth_caption_is_asked_for(tmp_path):
    path = made.cc3m(tmp_path, [f"picture {k}" for k in range(201)], "image")
    source = opened(path, "cc3m")
    good, bad = samples_of(source)
    assert not bad and len(good) == 204 and len(opened(path, "cc3m_test")) == 201
    asked = [k for k, sample in enumerate(good) if "_instruction" in sample.id]
    assert asked == [1, 102, 203]
    for k in asked:
        given = good[k].turns[0][1]
        assert given.startswith(wordings.CAPTION_SYSTEM + "###Human: ")
        assert given.endswith(f" picture {100 * asked.index(k)} ###Assistant:")
    seen = {text_of(s)[0].split("Human: ")[1].split(" picture")[0] for s in drawn(source, 1)}
    assert seen == {*wordings.PREFIXES}


def test_captions_from_hostile_rows(tmp_path):
    path = made.cc3m(tmp_path, ['a "quote', "fine", '"end', "x", "y", "z", "gone"])
    (tmp_path / "val/6.jpg").unlink()
    with open(path, "ab") as file:
        file.write(b"no image\na\tb\tc\n\n\xff\tval/0.jpg\n !!! \tval/0.jpg\n")
        file.write(b"out\t../../etc/passwd\nurl\thttp://x.test/1.jpg\nlast\tval/1.jpg")
    _, bad = samples_of(opened(path, "cc3m_test"))
    assert bad == {"bad_row": 3, "no_text": 1, "path_outside_root": 1, "bad_path": 1}
    stream = stream_of(path, "cc3m_test")
    items = [stream[k] for k in range(len(stream.sources[0]))]
    reasons = collections.Counter(item["bad"] for item in items if "bad" in item)
    assert reasons == {**bad, "missing": 1}
    details = "\n".join(item["detail"] for item in items if "bad" in item)
    for line in ("line 8", "line 9", "has 1 cells, expected 2", "6.jpg"):
        assert line in details


def test_tsv_without_names_of_columns(tmp_path):
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text("a red kite .\thttp://x.test/1.jpg\n")
    with pytest.raises(FileError, match="Train_GCC-training.tsv.*name the columns caption"):
        opened(path, "cc3m")
    path.write_text("caption\turl\na\tb\n")
    with pytest.raises(FileError, match="no column image_path or image"):
        opened(path, "cc3m")
    path.write_text("caption\timage\n")
    with pytest.raises(DataError, match="holds no records"):
        opened(path, "cc3m")


def test_captions_in_tars(tmp_path):
    image = tmp_path / "x.jpg"
    make_image(0).save(image)
    write_tar(tmp_path / "0.tar", [("1.jpg", image.read_bytes()), ("1.txt", "A kite!")])
    (sample,), bad = samples_of(opened(tmp_path / "0.tar", "drawn_caption"))
    assert text_of(sample) == ("a kite", f"{V8} ###") and not bad
    assert sample.images[0].caption == "a kite"


# ---- stories


def test_samples_of_a_story(tmp_path):
    """13 for training, 5 for tests, whatever the order in the file."""
    path = made.vist(tmp_path, *made.five_steps())
    made.pictures(tmp_path, *(f"val_images/{k}.jpg" for k in range(5)))
    good, bad = samples_of(opened(path, "vist"))
    tasks = collections.Counter(sample.id.split("-")[1] for sample in good)
    assert tasks == {"gen": 5, "multimodal": 4, "understanding": 4} and not bad
    assert [len(s.images) for s in good] == [1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    last = text_of(good[-1])
    before = "".join(f"step {k} .<Img><ImageHere></Img>" for k in range(4))
    assert f"###Human:{before}\n " in last[0] and last[1] == "step 4 . ###"
    assert len(samples_of(opened(path, "vist_test"))[0]) == 5


def test_wording_follows_seed_and_epoch(tmp_path):
    path = made.vist(tmp_path, *made.five_steps())
    made.pictures(tmp_path, *(f"val_images/{k}.jpg" for k in range(5)))
    config = data_of(path, "vist")
    found = pipeline.open_sources(config, sources.kinds())
    chat = Chat(made.Words(), "vokens")

    def texts(seed, epochs=3):
        order = OrderConfig(seed=seed, epochs=epochs)
        changed = DataConfig(sources=config.sources, row=config.row, order=order)
        stream = pipeline.make_stream(changed, spec_of(), chat, found)
        return [sorted(stream.sample(n).turns[0][1] for n in range(13 * e, 13 * e + 13))
                for e in range(epochs)]  # fmt: skip

    assert texts(1) == texts(1)
    first, second, third = texts(1)
    assert first != second != third and texts(2) != texts(1)


def test_hostile_stories(tmp_path):
    steps, mapping = made.five_steps()
    stories = steps | {
        "no list": 5,
        "empty": [],
        "no caption": [{"image_id": "1", "sequence_index": 0}],
        "no order": [{"caption": "a", "image_id": "1", "sequence_index": "0"}],
        "no path": [{"caption": "a", "image_id": "unknown", "sequence_index": 0}],
        "outside": [{"caption": "a", "image_id": "out", "sequence_index": 0}],
        "no text": [{"caption": " ", "image_id": "1", "sequence_index": 0}],
        "braces": [{"caption": "{text} {story} {", "image_id": "1", "sequence_index": 0}],
    }
    path = made.vist(tmp_path, stories, mapping | {"out": "../../etc/passwd"})
    made.pictures(tmp_path, *(f"val_images/{k}.jpg" for k in range(4)))
    source = opened(path, "vist")
    good, bad = samples_of(source)
    assert bad == {"bad_record": 5, "no_text": 1} and len(good) == 15
    assert "{text} {story} {" in good[-1].turns[0][1]
    stream = stream_of(path, "vist")
    found = [stream[k] for k in range(len(source))]
    assert sum(item.get("bad") == "missing" for item in found) == 1 + 3  # 4.jpg, in three samples
    details = [item["detail"] for item in found if item.get("bad") == "missing"]
    assert any("unknown (not in the table of images)" in detail for detail in details)
    with pytest.raises(FileError, match="none of VIST's files"):
        opened(made.mmdialog(tmp_path, []), "vist")


# ---- dialogues


def test_hostile_dialogues(tmp_path):
    made.pictures(tmp_path, "-12.jpg", "7.jpg", "8.jpg")
    turn = made.turn
    path = made.mmdialog(tmp_path, [
        [turn("a", "-12", "7"), turn("b")],
        "not JSON",
        '{"conversation": 5}',
        [turn("alone")],
        [turn("a"), turn(""), turn("b")],
        [turn("a"), turn("12.jpg"), turn("b")],
        [turn("a"), turn("b", "gone"), turn("c"), turn("d"), turn("e"), turn("f")],
        [turn("a"), turn("b", "../../etc/passwd")],
        [turn("a"), turn("b", "8")],
        [turn("a"), {"turn": [{"__MEDIA__": "7"}]}],
        [turn("a"), {"turn": "text"}],
        [turn("a"), turn("b", 7)],
        [turn(f"see {IMAGE}"), turn("b")],
    ])  # fmt: skip
    (tmp_path / "blocked.txt").write_text("8.jpg\n\n")
    source = opened(path, "mmdialog_test", blocked=str(tmp_path / "blocked.txt"))
    good, bad = samples_of(source)
    assert [len(sample.images) for sample in good] == [1]
    assert bad == {
        "bad_json": 1, "bad_record": 3, "short_dialogue": 1, "no_text": 3, "text_is_image": 2,
        "missing": 5, "path_outside_root": 1, "blocked_image": 1, "marker_mismatch": 1,
    }  # fmt: skip
    with pytest.raises(BadSample, match=r"conversations.json line 5 turn 1, id '4_1'.*turn 1 has"):
        source.sample(4, np.random.default_rng(0))


def test_training_and_tests_share_no_cut(tmp_path):
    """What is kept beside a file is how many turns it has, before any of them is cut."""
    long = " ".join("x" * 51)
    path = made.mmdialog(tmp_path, [[made.turn("a"), made.turn(long), made.turn("b")]])
    chat = Chat(made.Words(), "vokens")
    for kind, count in (("mmdialog_test", 2), ("mmdialog", 0), ("mmdialog_test", 2)):
        assert len(samples_of(opened(path, kind, chat))[0]) == count
    assert samples_of(opened(path, "mmdialog", chat))[1] == {"long_turn": 2}


# ---- one's own


def test_own_conversations(tmp_path):
    """Images of questions are read, those of answers drawn, several in one sample."""
    made.pictures(tmp_path, "a.png", "b.png", "c.png")
    turns = conversation(f"{IMAGE} like this?", f"One: {IMAGE} two: {IMAGE}", "thanks", "welcome")
    write_jsonl(tmp_path / "own.jsonl", [
        {"id": "1", "image": ["a.png", "b.png", "c.png"], "conversations": turns,
         "captions": ["", "a kite", ""]},
        {"id": "2", "image": "a.png", "conversations": conversation("draw", IMAGE), "caption": "x"},
        {"id": "3", "conversations": conversation("hi", "hello")},
        {"id": "4", "image": "a.png", "conversations": conversation("a", IMAGE), "caption": [1]},
        {"id": "5", "image": ["a.png"] * 5, "conversations": conversation("a", IMAGE * 5)},
        {"id": "6", "image": "../a.png", "conversations": conversation("a", IMAGE)},
    ])  # fmt: skip

    class Captions:
        def __call__(self, text, truncation, max_length):
            return {"input_ids": [*[58, *map(ord, text)][: max_length - 1], 59]}

    spec = spec_of(caption=CaptionIds(Captions(), 5), caption_length=5)
    stream = stream_of(tmp_path / "own.jsonl", "auto", spec=spec)
    first, second, third, *bad = (stream[k] for k in range(6))
    assert [item["bad"] for item in bad] == ["bad_record", "too_many_drawings", "path_outside_root"]
    assert len(first["view_starts"]) == 1 and len(first["drawings"]) == 2
    starts = first["drawing_starts"]
    assert (first["tokens"][starts + 1] == made.VOKENS).all() and starts[1] > starts[0] + 8
    learnt = first["text_targets"][starts[0] : starts[0] + 9]
    assert learnt[0] == made.VOKENS and (learnt[1:7] == -1).all()
    assert learnt[7] == made.VOKENS + 7 and learnt[8] >= 0
    assert first["captions"].tolist() == [[58, 97, 32, 107, 59], [-1] * 5]
    assert second["captions"].tolist() == [[58, 120, 59, 0, 0]]
    assert "drawings" not in third and (third["text_targets"] >= 0).sum() == 2


def test_mirrored_by_chance(tmp_path):
    """Each image on its own, read or drawn, again in every epoch; the pixels follow."""
    steps, mapping = made.five_steps()
    path = made.vist(tmp_path, steps, mapping)
    made.pictures(tmp_path, *mapping.values())
    source = opened(path, "vist", images=ImageConfig(mirror=0.5))
    flags = [tuple(ref.mirror for ref in s.images) for s in drawn(source, 12)]
    share = np.mean(flags, axis=0)
    assert share.shape == (5,) and (abs(share - 0.5) < 0.2).all() and len({*flags}) > 20
    assert not any(ref.mirror for s in drawn(opened(path, "vist"), 12) for ref in s.images)
    with pytest.raises(ValueError, match="images.mirror is 2"):
        ImageConfig(mirror=2)
    always = stream_of(path, "vist", images=ImageConfig(mirror=1.0))
    plain, mirrored = stream_of(path, "vist")[0]["drawings"], always[0]["drawings"]
    whole = Image.open(tmp_path / mapping["0"])
    wanted = spec_of().drawings.preprocess(whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    np.testing.assert_array_equal(mirrored[0], wanted)
    assert (plain != mirrored).any()


def test_batches_resume(tmp_path):
    """A whole pipeline of stories: batches come again after their state is restored."""
    steps, mapping = made.five_steps()
    path = made.vist(tmp_path, steps, mapping)
    made.pictures(tmp_path, *mapping.values())
    chat, found = Chat(made.Words(), "vokens"), None
    config = DataConfig(
        sources=(SourceConfig(path, kind="vist"),), row=RowConfig("vokens", length=256, images=8),
        images=ImageConfig(mirror=0.5),
    )  # fmt: skip
    found = pipeline.open_sources(config, sources.kinds())
    batches = pipeline.make_pipeline(config, spec_of(), chat, found, Shard(1))
    next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    wanted = [next(batches) for _ in range(4)]
    batches.set_state(state)
    for batch in wanted:
        again = next(batches)
        np.testing.assert_array_equal(batch.tokens, again.tokens)
        np.testing.assert_array_equal(batch.drawings.pixels, again.drawings.pixels)
        np.testing.assert_array_equal(batch.images.pixels, again.images.pixels)
    assert batch.drawings.valid.any() and batch.drawings.pixels.shape == (1, 4, 8, 8, 3)


def test_stories_of_other_layouts(tmp_path):
    """The published files, and those with a folder of annotations, whose images `root` has."""
    story_sets.vist(tmp_path)
    good, bad = samples_of(opened(tmp_path / "test.story-in-sequence.json", "vist"))
    assert len(good) == 13 * 3 + 10 and not bad
    assert good[0].images[0].path.startswith(f"{tmp_path}/test/")
    story_sets.formatted(tmp_path / "other")
    (path,) = (tmp_path / "other/annotations").iterdir()
    config = dataclasses.replace(data_of(path, "vist"), sources=(
        SourceConfig(str(path), kind="vist", root=str(tmp_path / "other")),))  # fmt: skip
    (source,) = pipeline.open_sources(config, sources.kinds())
    good, bad = samples_of(source)
    assert good and not bad and all(ref.path.startswith(f"{tmp_path}/other/images/")
                                    for sample in good for ref in sample.images)  # fmt: skip


def test_answers_one_by_one(tmp_path):
    """Each is learnt from what came before it, written as dialogues are; what an earlier one has
    drawn is read."""
    made.pictures(tmp_path, "a.png", "b.png", "c.png")
    turns = conversation(f"{IMAGE} redder", f"So: {IMAGE}", "and blue?", IMAGE)
    write_jsonl(tmp_path / "own.jsonl", [
        {"image": ["a.png", "b.png", "c.png"], "conversations": turns, "captions": ["", "r", "b"]},
        {"conversations": conversation("q"), "system": "S"},
        {"conversations": conversation("q", "a"), "system": "S"},
        {"conversations": 7},
        {"image": ["a.png", "b.png"], "conversations": turns},
    ])  # fmt: skip
    good, bad = samples_of(opened(tmp_path / "own.jsonl", "answers"))
    assert bad == {"bad_record": 2, "marker_mismatch": 2}
    told, tag = wordings.DIALOGUE_SYSTEM, "<Img><ImageHere></Img>"
    first = f"{told} ###Human: {tag} redder ###Assistant:"
    assert [text_of(sample) for sample in good] == [
        (first, f"So: {V8} ###"),
        (f"{first} So: {tag} ###Human: and blue? ###Assistant:", f"{V8} ###"),
        ("S ###Human: q ###Assistant:", "a ###"),
    ]
    assert [[ref.caption for ref in sample.images] for sample in good] == [
        ["", "r"], ["", "r", "b"], []
    ]  # fmt: skip
    chat = Chat(made.Words(), "vokens")
    whole = chat.conversation([("user", f"{IMAGE} redder"), ("assistant", f"So: {IMAGE}")])
    alone = chat.conversation(good[0].turns)
    assert whole.ids.tolist() == alone.ids.tolist()
    assert whole.labels.tolist() == alone.labels.tolist()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_legacy.json"])
def test_a_chat_goes_on_with_the_ids_of_a_dialogue(file, golden_root):
    """What was read and written, and the next question, are what a prompt of all of it holds."""
    from transformers import PreTrainedTokenizerFast

    path = str(golden_root / "llava/tokenizer" / file)
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    chat = Chat(PreTrainedTokenizerFast(tokenizer_file=path, **names), "vokens")
    turns = [("user", f"{IMAGE} hello"), ("assistant", f"nice {IMAGE}"), ("user", "and now?")]
    encoded = chat.conversation(turns[:2])
    written = encoded.ids[encoded.labels != -100].tolist()
    assert chat.is_closed(np.array(written))
    read = [*chat.prompt(turns[:1]).tolist(), *written, *chat.next_prompt(turns[2][1], True)]
    assert read == chat.prompt(turns).tolist()
