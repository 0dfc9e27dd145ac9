"""Our models behind lmms-eval's interface, with its base class or, without it, a stand-in.

The last test runs lmms-eval itself on tasks of three kinds. It needs the extra `lmms`, in an
environment of its own: bash launch/test_lmms_eval.sh
"""

import copy
import dataclasses
import importlib.util
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from metamorph_jax import api
from metamorph_jax.errors import ConfigError
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.trained import load_generator

REAL = importlib.util.find_spec("lmms_eval") is not None
SKIPPED = "needs lmms-eval in an environment of its own: bash launch/test_lmms_eval.sh"


@dataclasses.dataclass(frozen=True)
class DrawsFirst:
    """Another policy, each of whose replies begins with an image."""

    inner: object

    width = property(lambda self: self.inner.width)
    extra_steps = property(lambda self: self.inner.extra_steps)

    def init(self, *args):
        return self.inner.init(*args)

    def emit(self, memory, hidden, step, model):
        forced = jnp.where(step.count == 0, self.inner.parts.start, step.forced)
        return self.inner.emit(memory, hidden, dataclasses.replace(step, forced=forced), model)

    def read(self, *args):
        return self.inner.read(*args)


class Painter:
    sampling = types.SimpleNamespace(guidance=2.0)

    def draw(self, features, guidance, seed):
        return np.full((8, 8, 3), 90, np.uint8)


def that_draws(generator):
    generator = copy.copy(generator)
    policy = generator.policy
    generator.policy = lambda text: DrawsFirst(policy(text))
    generator.image_decoder = Painter()
    return generator


@pytest.fixture
def adapter(monkeypatch):
    """metamorph_jax.eval.lmms_eval, over lmms-eval's base class or a stand-in for it."""
    if not REAL:
        base = types.ModuleType("lmms_eval.api.model")

        class lmms:
            def __init__(self):
                self.task_dict = {}

        base.lmms = lmms
        for name in ("lmms_eval", "lmms_eval.api"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "lmms_eval.api.model", base)
    monkeypatch.delitem(sys.modules, "metamorph_jax.eval.lmms_eval", raising=False)
    yield importlib.import_module("metamorph_jax.eval.lmms_eval")
    sys.modules.pop("metamorph_jax.eval.lmms_eval", None)


def asked(docs, **options):
    """Instances as lmms-eval makes them: (text, options, its images, id, task, split)."""
    images = lambda doc: doc["images"]  # noqa: E731
    return [
        types.SimpleNamespace(args=(doc["text"], dict(options), images, k, "A task", "test"))
        for k, doc in enumerate(docs)
    ]


def make(adapter, generator, docs, tmp_path, **options):
    model = adapter.MetamorphJax(
        generator=generator, out=str(tmp_path / "drawn"), batch_size=2, device="cpu", **options
    )
    model.task_dict = {"A task": {"test": docs}}
    return model


def test_text_and_images_come_back_as_lmms_eval_wants_them(
    adapter, generator, tmp_path, image_files, capsys
):
    noise = Image.effect_noise((30, 20), 90)
    docs = [
        {"text": "Is it?", "images": [noise]},
        {"text": "Why?", "images": []},
        {"text": "And this?", "images": [str(image_files / "c.png")]},
        {"text": "[GEN_PROMPT]Draw.[/GEN_PROMPT][QUESTION]Is it?[/QUESTION]", "images": [noise]},
    ]
    model = make(adapter, generator, docs, tmp_path)
    warm = dict(max_new_tokens=6, temperature=2.0)  # greedily, random weights write white space
    texts = model.generate_until(asked(docs, **warm))
    (reply,) = generator.generate([Request("1", "Why?")], Options(6, 2.0))
    assert texts[1] == reply.text.strip() != "" and texts[2] == ""
    assert not (tmp_path / "drawn").exists()
    err = capsys.readouterr().err
    assert "c.png" in err and "1 of 4 requests were not answered" in err
    stop = texts[1][-1]
    cut = model.generate_until(asked(docs[:2], **warm, until=stop))[1]
    assert cut == texts[1].split(stop)[0]
    cold = [dict(do_sample=False, temperature=2.0), dict(temperature=0)]
    assert len({model._options(options) for options in cold}) == 1

    drawing = that_draws(generator)
    model = make(adapter, drawing, docs, tmp_path)
    replies = [json.loads(r) for r in model.generate_until(asked(docs[:2], max_new_tokens=9))]
    assert [set(r) for r in replies] == [{"text", "images"}] * 2
    files = [file for r in replies for file in r["images"]]
    assert len(set(files)) == 2 and all(Image.open(f).size == (8, 8) for f in files)
    (again,) = model.generate_until(asked(docs[:1], max_new_tokens=9))
    assert not {*files} & {*json.loads(again)["images"]}  # nothing is overwritten

    seen = []
    drawing.replies = lambda made, *rest: (
        seen.extend(made) or type(drawing).replies(drawing, made, *rest)
    )
    (thought,) = model.generate_visual_cot(asked(docs[3:], max_new_tokens=9))
    assert seen[0].think and seen[0].prompt == "Is it?"
    assert not thought.startswith("{") and len(list((tmp_path / "drawn").glob("*.png"))) == 4


def test_what_it_can_t_do_is_said(adapter, generator, tmp_path):
    with pytest.raises(ConfigError, match="has no worrkdir"):
        adapter.MetamorphJax(worrkdir="x")
    with pytest.raises(ConfigError, match="either workdir=… or checkpoint="):
        adapter.MetamorphJax()
    with pytest.raises(ConfigError, match="config.json"):
        adapter.MetamorphJax(checkpoint=str(tmp_path))
    untaught = copy.copy(generator)
    untaught.prompts = dataclasses.replace(generator.prompts, think=None)
    model = make(adapter, untaught, [], tmp_path)
    with pytest.raises(NotImplementedError, match="not trained to draw"):
        model.generate_visual_cot([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])
    with pytest.raises(NotImplementedError, match="rate given answers"):
        model.loglikelihood([])


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.images
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs:
  max_new_tokens: 20
  do_sample: true
  temperature: 2.0
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
UTILS = """
import json, os
from PIL import Image

def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    reply = results[0]
    drawn = json.loads(reply)["images"] if reply.startswith("{") else []
    return {
        "answered": float(bool(reply) and not drawn),
        "drawn": float(bool(drawn) and all(Image.open(f).size == (8, 8) for f in drawn)),
    }
"""


@pytest.mark.skipif(not REAL, reason=SKIPPED)
def test_lmms_eval_runs_tasks_of_three_kinds(workdir, image_files, tmp_path, monkeypatch):
    """By its entry point and from files alone: understanding, drawing, thinking in images."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks, questions = tmp_path / "tasks", tmp_path / "questions.jsonl"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    rows = [
        {"question": f"What is number {k}?", "image": str(image_files / "a.png"), "answer": "x"}
        for k in range(3)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {"reads": ("generate_until", "answered"), "draws": ("generate_until", "drawn"),
             "thinks": ("generate_visual_cot", "answered")}  # fmt: skip
    for name, (kind, metric) in kinds.items():
        filled = TASK.format(name=f"mmjax_{name}", file=questions, kind=kind, metric=metric)
        (tasks / f"mmjax_{name}.yaml").write_text(filled)

    def load(where, decoder, **options):  # random weights don't draw by themselves
        generator = load_generator(where)
        return api.Model(that_draws(generator) if decoder else generator)

    monkeypatch.setattr(api, "load", load)
    manager = TaskManager(include_path=str(tasks))
    for name, (_, metric) in kinds.items():
        out = tmp_path / f"images_{name}"
        drawing = "" if name == "reads" else ",decoder=painter"
        found = simple_evaluate(
            model="metamorph_jax", model_args=f"workdir={workdir},out={out}{drawing}",
            tasks=[f"mmjax_{name}"], task_manager=manager, batch_size=2, bootstrap_iters=0,
        )  # fmt: skip
        scores = found["results"][f"mmjax_{name}"]
        assert scores[f"{metric},none"] == 1.0, scores
        assert len(list(out.glob("*.png"))) == (0 if name == "reads" else 3)
        print(name, scores)
