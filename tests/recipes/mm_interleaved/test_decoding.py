"""What rows write and draw, by the loop that all recipes share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.recipes import mm_interleaved as recipe
from metamorph_jax.recipes.mm_interleaved.decoding import DrawingPolicy, Memory
from metamorph_jax.sampling.conversation import Conversation
from metamorph_jax.sampling.generator import Options
from metamorph_jax.sampling.policy import TextPolicy
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import ImagePart, TextPart
from metamorph_jax.types import Images
from tests.recipes.mm_interleaved.tiny import SIDE, TINY, P, fast, make

DATA = DataConfig(row=RowConfig(template="document", length=64, images=4))


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def generator(model):
    copy = nnx.merge(*nnx.split(model))
    return recipe.generator(copy, TINY, DATA)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "a.png"
    Image.radial_gradient("L").resize((40, 40)).convert("RGB").save(file)
    return str(file)


def kinds(reply):
    return ["image" if isinstance(part, ImagePart) else "text" for part in reply.segments]


def test_modes(generator, image):
    requests = [
        Request("free", "A kite"),
        Request("draw", "A kite", mode="image"),
        Request("draw too", "<image>A red kite", (image,), mode="image"),
        Request("write", "<image>A kite", (image,), mode="text"),
        Request("story", "Once", mode="both", rounds=4),
    ]
    replies = dict(
        zip([r.id for r in requests], generator.generate(requests, Options(24)), strict=True)
    )
    for name in ("draw", "draw too"):
        (part,) = replies[name].segments
        assert part.complete and replies[name].ended and len(part.drawn) == 1
        (drawn,) = part.drawn.values()
        assert drawn.shape == (8, 8, 3) and drawn.std() > 0
    assert kinds(replies["write"]) in (["text"], [])
    print({k: (kinds(r), r.ended) for k, r in replies.items()})
