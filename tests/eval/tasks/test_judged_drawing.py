"""GenEval, DPG-Bench and the check of judges as tasks, with a painter whose images are known."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import cli
from metamorph_jax.errors import ConfigError, FileError, MissingFile, UserError
from metamorph_jax.eval import bench, tasks
from metamorph_jax.eval.images import contents, geneval
from metamorph_jax.eval.images.contents import holds
from metamorph_jax.eval.images.geneval import checks_of
from metamorph_jax.eval.images.judging import asked
from metamorph_jax.eval.tasks import judged_drawing, made_images
from metamorph_jax.eval.tasks.base import Answer, by_group
from metamorph_jax.models.diffusion.samplers import SamplingConfig
from metamorph_jax.sampling.likelihood import Likelihood
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.results import ImagePart, Reply

from ..images.test_dpg import CSV
from ..images.test_geneval import IMAGES, ROWS


class Painter:
    """Draws image k of a prompt for its sample k, nothing for a sample that has none, and knows
    what it drew."""

    def __init__(self, images):
        self.images, self.known = images, {}

    def replies(self, requests, options, failed, stream=None, draw=True):
        for request in requests:
            sample, drawn = int(request.id.rpartition("-")[2]), {}
            if sample < len(self.images[request.prompt]):
                things, _ = self.images[request.prompt][sample]
                pixels = np.asarray(contents.draw(things))
                self.known[pixels.tobytes()] = things
                drawn = {3.0: pixels}
            yield request, Reply((ImagePart(np.zeros((1, 1)), bool(drawn), drawn),), True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("geneval")
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (root / "evaluation_metadata.jsonl").write_text("".join(lines))
    return root


@pytest.fixture
def painter(monkeypatch):
    painter = Painter({f"Draw {ROWS[i]['prompt']}.": images for i, images in IMAGES.items()})
    checks = {check.question: check for row in ROWS for check in checks_of(row)}

    def judge(images, questions):
        seen = [painter.known[np.asarray(Image.open(path)).tobytes()] for path in images]
        return np.array([holds(checks[q], own) for own, q in zip(seen, questions, strict=True)])

    monkeypatch.setattr(judged_drawing, "open_judge", lambda spec, config: judge)
    monkeypatch.setattr(judged_drawing, "check_judge", lambda spec: None)
    return painter


def run(spec, root, folder, model):
    task = tasks.make(spec, root=str(root))
    return bench.run_task(task, model, folder, bench.Settings(Options(), resamples=50))


def test_geneval_is_drawn_judged_and_written(root, painter, tmp_path):
    spec = "geneval:samples=3,judged_by=exact,prompt=Draw {prompt}."
    result = run(spec, root, tmp_path, painter)
    assert result.questions == 18 and result.unparsed == 3  # three prompts have two images
    assert result.scores["overall"] == pytest.approx(17 / 36) and result.scores["prompts"] == 1
    assert list(result.scores)[0] == result.task.main
    low, high = result.intervals["overall"]
    assert low < 17 / 36 < high
    assert result.settings["task"]["judged_by"] == "exact"
    folder = result.files[0].parent
    found = geneval.find_images(folder, ROWS)
    assert [index for index, _ in found] == [i for i, images in IMAGES.items() for _ in images]
    assert json.loads((folder / "00002" / "metadata.jsonl").read_text()) == ROWS[2]
    lines = [json.loads(line) for line in result.files[0].read_text().splitlines()]
    assert geneval.summary(lines)["overall"] == pytest.approx(17 / 36)
    assert lines[1]["reason"] == "no: Does the image show a circle?"
    assert json.loads(lines[1]["metadata"]) == ROWS[0]


def test_without_a_judge_images_are_written_for_the_official_evaluator(root, painter, tmp_path):
    result = run("geneval:samples=2,prompt=Draw {prompt}.", root, tmp_path, painter)
    assert result.scores == {} and not result.files
    (folder,) = tmp_path.glob("*/official")
    assert len(geneval.find_images(folder, ROWS)) == 12


def test_dpg_is_drawn_judged_and_written(tmp_path, monkeypatch):
    """Of each prompt a big image and a small one; the judge says no to much about the small."""
    (tmp_path / "dpg_bench.csv").write_text(CSV)
    (tmp_path / "prompts").mkdir()
    for name in ("cup", "sky", "foreign"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"Long text on a {name}.\n")
    big, small = (
        ([contents.Thing("square", color, 112, 112, size)], "")
        for color, size in (("red", 90), ("blue", 30))
    )
    asked_for = "Generate an image of the following: Long text on a {}."
    images = {asked_for.format(name): [big, small] for name in ("cup", "sky", "foreign")}

    def judge(paths, questions):
        wide = [np.asarray(Image.open(p))[112, 80, 0] == 220 for p in paths]
        pairs = zip(wide, questions, strict=True)
        return np.array([big or question.startswith("Is there") for big, question in pairs])

    monkeypatch.setattr(judged_drawing, "open_judge", lambda spec, config: judge)
    monkeypatch.setattr(judged_drawing, "check_judge", lambda spec: None)
    result = run("dpg:samples=2,judged_by=x,resolution=64", tmp_path, tmp_path / "out",
                 Painter(images))  # fmt: skip
    # Of the small one: cup 1 of 4, sky 2 of 3.
    assert result.scores["DPG"] == pytest.approx(100 * ((1 + 1 / 4) / 2 + (1 + 2 / 3) / 2) / 2)
    assert result.scores["relation"] == 50 and result.scores["entity"] == 100
    scores = {record["id"]: record["score"] for record in result.records}
    assert scores["cup-0"] == 1 and scores["cup-1"] == 0.25 and scores["foreign-0"] is None
    assert "DPG" in result.intervals
    (worst,) = (record for record in result.records if record["id"] == "sky-1")
    assert worst["reply"] == "no: Is the bird in the sky?"
    folder = result.files[0].parent
    assert Image.open(folder / "cup.png").size == (128, 128)
    lines = result.files[0].read_text().splitlines()
    assert lines[0] == "cup.png, 1.0, 0.25, 0.625" and len(lines) == 2
    detail = result.files[1].read_text().splitlines()
    assert len(detail) == 14 and detail[5] == "cup.png, 1, Is the cup red?, no"


def test_results_name_how_images_were_drawn(root, painter, tmp_path, monkeypatch, capsys):
    """Sampler, steps and guidance of the image decoder, also where no option states them."""
    painter.image_decoder = types.SimpleNamespace(sampling=SamplingConfig("ddim", 20, 3.5))
    painter.images = {f"Generate an image of the following: {ROWS[i]['prompt']}": images
                      for i, images in IMAGES.items()}  # fmt: skip
    monkeypatch.setattr("metamorph_jax.sampling.generate.load", lambda args: painter)
    monkeypatch.setattr("metamorph_jax.sampling.generate.check_model", lambda args: None)
    words = ["eval", "--workdir", root, "--decoder", root, "--out", tmp_path / "out", "--tasks",
             f"geneval:samples=1,judged_by=x,root={root}", "--bench-root", root]  # fmt: skip
    assert cli.main(list(map(str, words))) == 0
    (saved,) = json.loads((tmp_path / "out" / "scores.json").read_text()).values()
    drawing = {"sampler": "ddim", "steps": 20, "guidance": 3.5}
    assert saved["settings"]["model"]["drawing"] == drawing and saved["scores"]["overall"] == 1
    assert cli.main(["eval", "--endpoint", "m", *map(str, words[3:])]) == 2
    assert "drawing needs a model of ours, not an endpoint" in capsys.readouterr().err
    painter.image_decoder = None
    assert cli.main(list(map(str, words))) == 2
    assert "drawing needs --decoder: this model has no image" in capsys.readouterr().err


def test_what_can_t_be_asked_for(root, tmp_path):
    for spec, message in (
        ("geneval:prompt=draw", "prompt must have {prompt}"),
        ("geneval:samples=0", "expected 1 to 1000"),
        ("dpg:samples=5", "samples=5, expected one of 1, 2, 3, 4"),
        ("dpg:mode=kind", "mode=kind, expected one of strict, official"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.make(spec, root=str(root))
    with pytest.raises(MissingFile, match="no evaluation_metadata.jsonl"):
        list(tasks.make("geneval", root=str(tmp_path)).questions())
    (tmp_path / "prompts").mkdir()
    (tmp_path / "dpg_bench.csv").write_text(CSV)
    with pytest.raises(FileError, match="has no prompts"):
        list(tasks.make("dpg", root=str(tmp_path)).questions())


def test_a_judge_that_is_not_there_is_found_before_anything_is_drawn(root, tmp_path):
    with pytest.raises(UserError, match="gone"):
        next(iter(tasks.make(f"geneval:judged_by={tmp_path}/gone", root=str(root)).questions()))


# ---- the check of judges


def test_made_images_are_half_true_and_right():
    task = tasks.make("made_images:count=10")
    questions = list(task.questions())
    assert len(questions) == 40
    for kind, own in by_group([{"groups": q.groups, "q": q} for q in questions], "kind").items():
        assert sum(one["q"].gold == "Yes" for one in own) == 5, kind
    for kind in made_images.KINDS:
        for number in range(20):
            rng = np.random.default_rng(number)
            check, things = made_images.make(kind, number % 2 == 0, rng, 224)
            assert holds(check, things) == (number % 2 == 0) and check.kind == kind
    assert questions[0].images[0]() == questions[0].images[0]()  # the same whenever it is made


def test_a_judge_is_measured(tmp_path):
    """One that says yes is right in half of the cases, whatever the kind."""

    class Agreeing:
        def likelihoods(self, requests, answers, failed, batch_size=8):
            for request in requests:
                assert request.prompt.endswith(asked("")) and Image.open(request.images[0]).size
                yield request, [Likelihood(-1, 1), Likelihood(-2, 1)]

    result = run("made_images:count=4,side=64", tmp_path, tmp_path / "out", Agreeing())
    assert result.scores == {"accuracy": 50, "object": 50, "count": 50, "color": 50,
                             "position": 50, "answers that are yes": 100}  # fmt: skip
    right = result.task.record(next(iter(result.task.questions())), Answer("Yes", 0))
    assert right == {"score": 1.0}
