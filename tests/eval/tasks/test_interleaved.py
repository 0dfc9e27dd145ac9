"""Documents of text and images: neighbours, their cosines, and a judge's number."""

import json

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.errors import ConfigError, FileError
from metamorph_jax.eval import tasks
from metamorph_jax.eval.images import features, statistics
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.eval.tasks import interleaved
from metamorph_jax.eval.tasks.interleaved import Part
from metamorph_jax.sampling.results import Reply, TextPart

from ...data.sets import made
from .painter import Clip, Painter, run


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "interleaved"
    folder.mkdir()
    Image.fromarray(np.full((8, 8, 3), (200, 40, 10), np.uint8)).save(folder / "1.png")
    rows = [{"id": "sea", "prompt": "A day at the sea.", "images": ["1.png"]},
            {"id": "hill", "prompt": "A hill."}]  # fmt: skip
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def vist(tmp_path):
    return made.vist(tmp_path / "vist")


def test_neighbours():
    a, b, c = (Part(image=name, made=name != "a") for name in "abc")
    given, text = Part("given", made=False), Part("text")
    document = [a, given, b, text, c]
    assert list(interleaved.pairs(document)) == [(b, given), (b, text), (b, a), (c, text), (c, b)]
    assert list(interleaved.pairs([a, given, Part(image="d", made=False)])) == []


def test_cosines_of_what_was_written(root, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "open_clip", lambda spec: Clip())
    painter = Painter(text="waves", images=2)
    result = run("interleaved:clip=x", root, tmp_path / "out", painter)
    assert painter.asked[0].prompt == "<image>A day at the sea."
    sea, hill = result.records
    assert sea["document"] == "waves<image> waves 0<image> waves 1"
    assert [part.text or "image" for part in interleaved.parts(sea)] == [
        "image", "A day at the sea.", "waves", "image", "waves 0", "image", "waves 1"
    ]  # fmt: skip
    images = Clip().features(ImageSet((str(root / "1.png"), *sea["drawn"]))).values
    texts, _ = Clip().texts(["waves", "waves 0", "waves 1"])
    pairs = statistics.cosines(images[[1, 1, 2, 2]], texts[[0, 1, 1, 2]])
    assert sea["text_image"] == pytest.approx(pairs.mean(), abs=1e-5)
    between = statistics.cosines(images[[1, 2]], images[[0, 1]])
    assert sea["image_image"] == pytest.approx(between.mean(), abs=1e-5)
    mean = 50 * (sea["text_image"] + hill["text_image"])
    assert result.scores[result.task.main] == pytest.approx(mean)
    assert result.scores["images of a document"] == 2
    # Answered before: the document is still known.
    assert run("interleaved:clip=x", root, tmp_path / "out", Painter()).records[0] == sea


def test_a_model_that_has_to_be_told_is_told(root, vist, tmp_path):
    told = Painter(modes=("text", "image", "both"))
    run("interleaved:turns=4", root, tmp_path / "a", told)
    run("vist", vist, tmp_path / "b", told)
    assert [(r.mode, r.rounds) for r in told.asked] == 2 * [("both", 4)] + 2 * [("image", 0)]
    free = Painter()
    run("interleaved:turns=4", root, tmp_path / "c", free)
    assert {(r.mode, r.rounds) for r in free.asked} == {("", 0)}
    with pytest.raises(ConfigError, match="turns=-1, expected 0 to"):
        tasks.make("interleaved:turns=-1", root=str(root))


class Reader:
    """A judge that sees how many images a document has."""

    def __init__(self, *_):
        self.asked = []

    def replies(self, requests, options, failed, stream=None, draw=False):
        for request in requests:
            self.asked.append(request)
            said = f"I say {len(request.images)}." if request.id == "sea" else "Nice!"
            yield request, Reply((TextPart(said, (1,)),), True)


def test_a_judge_reads_the_whole_document(root, tmp_path, monkeypatch):
    reader = Reader()
    monkeypatch.setattr(interleaved, "Endpoint", lambda: None)
    monkeypatch.setattr(interleaved, "check_judge", lambda spec: None)
    monkeypatch.setattr(interleaved, "EndpointModel", lambda *_: reader)
    spec, out = "interleaved:judged_by=endpoint:reader", tmp_path / "out"
    result = run(spec, root, out, Painter(text="waves", images=2))
    assert result.scores["coherence, 1 to 10"] == 3  # of the one that has a number
    assert [record["coherence"] for record in result.records] == [3, None]
    assert result.records[0]["score"] == pytest.approx(2 / 9)
    (request,) = (r for r in reader.asked if r.id == "sea")
    assert request.prompt.endswith("<image>A day at the sea. waves<image> waves 0<image> waves 1")
    run(spec, root, out, Painter())
    assert len(reader.asked) == 2  # what was said is kept


@pytest.mark.parametrize("reply, mark", [("8", 8), (" 7.5/10", 7.5), ("11", None), ("none", None)])
def test_marks(reply, mark):
    assert interleaved.mark_in(reply) == mark


def test_prompts_that_are_wrong(root):
    (root / "prompts.jsonl").write_text('{"prompt": "<image> a", "images": []}\n')
    with pytest.raises(FileError, match="prompts.jsonl, line 1: 1 markers, 0 images"):
        list(tasks.make("interleaved", root=str(root)).questions())
    (root / "prompts.jsonl").write_text('{"prompt": "a", "images": "x.png"}\n')
    with pytest.raises(FileError, match="line 1, images: 'x.png', expected a list of texts"):
        list(tasks.make("interleaved", root=str(root)).questions())
