"""Stories: what the model reads, in which order frames are drawn, and what they score."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data.sets import stories as sets
from metamorph_jax.errors import ConfigError
from metamorph_jax.eval import tasks
from metamorph_jax.eval.images import features, statistics
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.eval.tasks.base import AnswerImage

from ...data.sets import made
from .painter import INCEPTION, Clip, Painter, run


@pytest.fixture
def vist(tmp_path):
    return made.vist(tmp_path / "vist")


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(features, "open_inception", lambda path: INCEPTION)
    monkeypatch.setattr(features, "open_clip", lambda spec: Clip())


@pytest.mark.parametrize(
    "context, prompt, images",
    [
        ("all", "[male] saw 100 .<image>[male] saw 101 .<image>[male] saw 102 .", 2),
        ("images", "<image><image>[male] saw 102 .", 2),
        ("text", "[male] saw 100 . [male] saw 101 . [male] saw 102 .", 0),
        ("current", "[male] saw 102 .", 0),
    ],
)
def test_contexts(vist, context, prompt, images):
    task = tasks.make(f"vist:frames=3,context={context}", root=str(vist))
    question = next(iter(task.questions()))
    assert question.prompt == prompt
    assert [pathlib.Path(path).name for path in question.images] == ["100.jpg", "101.jpg"][:images]
    assert question.more["real"].endswith("102.jpg") and question.unit == "1"


@pytest.mark.golden
def test_prompts_of_minigpt5(golden_root):
    """Those that the published weights have seen, with the first of its two wordings."""
    case = json.loads((golden_root / "minigpt5" / "datasets.json").read_text())["vist"]
    task = tasks.make("vist:protocol=minigpt-5")
    wanted = {item["task_name"]: item["source"] for item in case["train_items"]}
    assert case["stories"]
    compared = 0
    for id, rows in case["stories"].items():
        frames = tuple(sets.Frame(row["caption"], "x.jpg") for row in rows)
        for k in range(len(frames)):
            ours = task._question(sets.Story(id, frames), k)
            assert ours.literal and len(ours.images) == k
            source = wanted[f"{id}_{k}-gen"]
            other = "Generate an image with the scene description" not in source
            compared += not other
            if not other:
                assert ours.prompt.replace("<image>", "<ImageHere>") == source
    assert compared


@pytest.mark.parametrize(
    "context, history, images",
    [
        ("all", "[male] saw 100 .(<image>)[male] saw 101 .(<image>)\n", 2),
        ("images", "(<image>)(<image>)\n", 2),
        ("text", "[male] saw 100 . [male] saw 101 .\n", 0),
        ("current", "", 0),
    ],
)
def test_history_and_caption(vist, context, history, images):
    spec = f"vist:frames=3,context={context},mark=(<image>),prompt={{history}} Draw: {{caption}}"
    question = next(iter(tasks.make(spec, root=str(vist)).questions()))
    assert question.prompt == f"{history} Draw: [male] saw 102 ." and len(question.images) == images
    with pytest.raises(ConfigError, match="mark must have one <image>"):
        tasks.make("vist:mark=<image><image>", root=str(vist))


def test_prompts_must_show_the_frames_of_the_context(vist):
    task = tasks.make("vist:prompt={caption}", root=str(vist))
    with pytest.raises(ConfigError, match="shows 0 of 4 frames"):
        list(task.questions())


def test_distances_of_single_stories(vist, stand_ins, tmp_path, capsys):
    spec = "vist:frames=2+3+4,history=true,inception=x,fid_size=8,fid_whole=true,story_fid=true"
    result = run(spec, vist, tmp_path, Painter(fails={"2/3"}))
    name = "mean FID of single stories (8 px, not cut)"
    each = []
    for story in ("1", "2"):
        own = [r for r in result.records if r["unit"] == story and r.get("drawn")]
        pair = [tuple(r["drawn"][0] for r in own), tuple(r["more"]["real"] for r in own)]
        sets_ = [INCEPTION.features(ImageSet(paths, 8, True)).values for paths in pair]
        each.append(statistics.frechet_distance(*map(statistics.Gaussian.of, sets_)))
    assert result.scores[name] == pytest.approx(np.mean(each), rel=1e-5)
    assert result.scores["FID (8 px, not cut)"] != pytest.approx(np.mean(each), rel=1e-2)
    assert "of 2 stories" in capsys.readouterr().err
    run("vist:frames=3,inception=x,story_fid=true", vist, tmp_path, Painter())
    assert "2 with fewer than two images are left out" in capsys.readouterr().err


def test_which_frames(vist):
    for frames, expected in (("last", [5]), ("all", [1, 2, 3, 4, 5]), ("next", [2, 3, 4, 5]),
                             ("4+2", [2, 4])):  # fmt: skip
        task = tasks.make(f"vist:frames={frames}", root=str(vist))
        assert [q.more["frame"] for q in task.questions() if q.unit == "1"] == expected
    for wrong in ("6", "2-3", ""):
        with pytest.raises(ConfigError, match="expected last, all, next, or numbers from 1 to 5"):
            tasks.make("vist", root=str(vist), frames=wrong)
    with pytest.raises(ConfigError, match=r"prompt must have \{story\} or \{caption\}"):
        tasks.make("vist:prompt=draw", root=str(vist))


def test_drawn_frames_stand_in_later_prompts(vist, stand_ins, tmp_path, capsys):
    painter, out = Painter(), tmp_path / "out"
    spec = "vist:frames=3+5,inception=x,clip=y,fid_64=true"
    result = run(spec, vist, out, painter)
    assert "2 stories are left out" in capsys.readouterr().err
    assert [request.id for request in painter.asked] == ["1/3", "2/3", "1/5", "2/5"]
    names = [pathlib.Path(path).name for path in painter.asked[2].images]
    third = result.records[0]["drawn"][0]
    assert names == ["100.jpg", "101.jpg", pathlib.Path(third).name, "103.jpg"]

    drawn = tuple(record["drawn"][0] for record in result.records)
    real = tuple(record["more"]["real"] for record in result.records)
    for size, name in ((256, "FID (256 px)"), (64, "FID (64 px, as MM-Interleaved)")):
        pair = [INCEPTION.features(ImageSet(paths, size)).values for paths in (drawn, real)]
        expected = statistics.frechet_distance(*map(statistics.Gaussian.of, pair))
        assert result.scores[name] == pytest.approx(expected, abs=1e-3)
    pair = [Clip().features(ImageSet(paths)).values for paths in (drawn, real)]
    cosine = 100 * statistics.cosines(*pair).mean()
    assert result.scores["100 x CLIP, image-image"] == pytest.approx(cosine, abs=1e-3)

    rows = json.loads((out / "vist-frames=3-5,inception=x,clip=y,fid_64=true").joinpath(
        "official", "stories.json").read_text())  # fmt: skip
    assert rows[1] == {"story": "1", "frame": 5, "caption": "[male] saw 104 .", "real": real[1],
                       "drawn": drawn[1]}  # fmt: skip
    (html,) = (path for path in result.files if path.name == "stories.html")
    text = html.read_text()
    assert text.count("data:image/png") == 2 * (5 + 2) and "[male] saw 102 ." in text


def test_what_was_answered_is_not_asked_again(vist, tmp_path):
    run("vist:frames=2+3", vist, tmp_path, Painter())
    again = Painter()
    run("vist:frames=2+3", vist, tmp_path, again)
    assert not again.asked
    # A frame whose file is gone is drawn again, and with it the frame that was drawn from it.
    drawn = sorted(tmp_path.rglob("*_drawn0.png"))
    assert len(drawn) == 4
    drawn[0].unlink()
    run("vist:frames=2+3", vist, tmp_path, again)
    assert len({request.id.partition("/")[0] for request in again.asked}) == 1


def test_a_frame_whose_predecessor_was_not_drawn_counts_as_failure(vist, stand_ins, tmp_path):
    result = run("vist:frames=2+3,clip=x", vist, tmp_path, Painter(fails={"1/2"}))
    assert list(result.failures) == ["1/3"]
    assert "no image was drawn for question 1/2" in result.failures["1/3"]
    assert result.unparsed == 1 and result.answered == 3 and len(result.records) == 4
    assert [record["id"] for record in result.records if record.get("missed")] == ["1/3"]
    for name in ("100 x CLIP, image-image", "100 x CLIP, image-text"):
        drawn, whole = result.scores[name], result.scores[f"{name}, failures as 0"]
        assert whole == pytest.approx(drawn / 2)  # two of four were drawn
        low, high = result.intervals[f"{name}, failures as 0"]
        assert low <= whole <= high


def test_true_frames_as_history(vist):
    task = tasks.make("vist:frames=all,history=true", root=str(vist))
    assert not any(isinstance(p, AnswerImage) for q in task.questions() for p in q.images)


@pytest.mark.parametrize("name", ["pororo", "flintstones"])
def test_clips(name, stand_ins, tmp_path):
    root, painter = getattr(made, name)(tmp_path / name), Painter()
    result = run(f"{name}:clip=x", root, tmp_path / "out", painter)
    task = tasks.make(name, root=str(root))
    (first, *_) = painter.asked
    assert len(first.images) == 4 and first.prompt.count("<image>") == 4
    with Image.open(first.images[0]) as image:
        seen = np.asarray(image)
    story = getattr(sets, name)(str(root), "test").found[0]
    path = story.frames[0].image
    assert (seen == np.asarray(sets.frame_of(path, task.number_in(path)))).all()
    real = result.records[0]["more"]["real"]
    with Image.open(real) as image:  # the frame that FID and CLIP compare with
        last = story.frames[4].image
        assert (np.asarray(image) == np.asarray(sets.frame_of(last, task.number_in(last)))).all()
    assert result.task.main in result.scores
    other = tasks.make(f"{name}:seed=1", root=str(root))
    paths = [frame.image for frame in story.frames]
    assert [*map(task.number_in, paths)] != [*map(other.number_in, paths)]
