"""Prompts equal training rows; batches and replies; a model without a head."""

import json

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import sharding
from metamorph_jax.convert import load
from metamorph_jax.data.interleave import build_row, read_place
from metamorph_jax.errors import UserError
from metamorph_jax.sampling.generator import Options
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.trained import load_generator
from metamorph_jax.types import Batch, Images


def test_marker_and_prefix_change_the_prompt(generator, image_files):
    def length(**kw):
        return len(generator.prompt(Request("0", **kw), 8)[0])

    image = (str(image_files / "a.png"),)
    front = length(prompt="x <image>", images=image)
    default = length(prompt="x", images=image)
    assert length(prompt="x") + generator.feature_shape[0] + 2 <= default <= front
    assert length(prompt="x", think=True) > length(prompt="x")


def test_prompt_equals_the_training_row(generator, workdir, image_files):
    """Reading a prompt gives what the model's `embed` makes of the same batch."""
    recipe, cfg, _ = load.open_run(workdir)
    model = load.load_model(recipe, cfg, sharding.mesh_of(generator.loop.weights), workdir=workdir)
    path, prompts = image_files / "b.jpg", generator.prompts
    got, ids_read = generator.prompt(Request("0", "What?", (str(path),)), 8)
    ids, P = prompts.chat.question("What?", 1), prompts.views.tokens
    row = build_row(ids, None, [read_place(*prompts.views.plan(None))], P, prompts.length)
    pixels = prompts.views.pixels(Image.open(path).convert("RGB"))
    one = lambda x: np.asarray(x)[None]  # noqa: E731
    batch = Batch(
        one(row.tokens), one(row.positions), one(np.ones_like(row.tokens)), one(row.text_targets),
        one(row.image_slots), one(row.visual_targets), one(row.tokens),
        Images(np.ones((1, 1), bool), one(row.view_starts), pixels[None]),
    )  # fmt: skip
    np.testing.assert_allclose(got, np.asarray(model.embed(batch)[0][0]), atol=1e-5)
    np.testing.assert_array_equal(ids_read[row.image_slots < 0], row.tokens[row.image_slots < 0])
    assert (ids_read[row.image_slots >= 0] == -1).all()


def test_replies_are_those_of_each_request_alone(generator, image_files):
    image = (str(image_files / "a.png"),)
    requests = [Request("a", "Hello"), Request("b", "What is it?", image), Request("c", "x " * 40)]
    options = Options(6, batch_size=2)
    together = generator.generate(requests, options)
    for request, reply in zip(requests, together, strict=True):
        (alone,) = generator.generate([request], options)
        assert alone.text == reply.text and alone.ended == reply.ended


def test_a_penalty_keeps_ids_from_coming_again(generator):
    """With a huge penalty, no id of prompt or reply comes a second time."""
    request = Request("0", "Hello there")
    options = Options(12, repetition_penalty=1e6, min_new_tokens=12)
    (reply,) = generator.generate([request], options)
    ids = [i for part in reply.segments for i in getattr(part, "ids", ())]
    _, prompt = generator.prompt(request, 12)
    assert len(set(ids)) == len(ids) and not set(ids) & set(prompt.tolist())


def test_a_model_without_a_head_writes_text(workdir, tmp_path):
    values = json.loads((workdir / "config.json").read_text())
    values["model"] |= {"head": "none"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    from orbax.checkpoint import v1 as ocp

    kept = ocp.load(workdir / "final")
    kept = {name: x for name, x in kept.items() if not name.startswith("head.")}
    ocp.save(tmp_path / "final", kept)
    generator = load_generator(str(tmp_path))
    (reply,) = generator.generate([Request("0", "Hello")], Options(5))
    assert not reply.image_parts and isinstance(reply.text, str)


def test_what_does_not_generate_says_so(workdir, tmp_path):
    with pytest.raises(UserError, match="has no option surprise"):
        load_generator(str(workdir), surprise=True)
