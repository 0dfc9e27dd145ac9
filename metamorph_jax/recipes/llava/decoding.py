"""How a LLaVA model answers: text only."""

import functools

import numpy as np
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.convert.export import listed_eos
from metamorph_jax.recipe import Shown
from metamorph_jax.recipes.llava.input import input_spec, make_chat
from metamorph_jax.recipes.llava.model import Llava
from metamorph_jax.recipes.llava.published import generation_fields
from metamorph_jax.recipes.llava.sources import KINDS
from metamorph_jax.sampling import samples
from metamorph_jax.sampling.generator import Generator
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop
from metamorph_jax.sampling.policy import stopping
from metamorph_jax.sampling.prompt_reader import PromptReader
from metamorph_jax.sampling.prompts import Prompts


def make_loop(model: Llava, weights: str = "auto") -> Loop:
    """The decoding loop over a model, whose language model it takes over (see `take_over`)."""
    mesh = sharding.mesh_of(nnx.state(model))
    llm, kept = take_over(model.llm, weights, mesh)
    return Loop(llm, kept, None, mesh)


def generator(model: Llava, cfg, data, *, weights: str = "auto") -> Generator:
    """A generator over this model, whose language model it takes over.

    Args:
        weights: how those of the language model are kept, see `take_over`.
    """
    encoder = nnx.merge(*nnx.split(model))  # the same arrays, another module
    del encoder.llm
    newline = np.asarray(model.newline[...], np.float32) if model.cfg.newline else None
    loop = make_loop(model, weights)
    views = data.images.change(input_spec(cfg).views)
    ends = tuple(listed_eos(generation_fields(cfg)))
    chat = make_chat(cfg, data)
    prompts = Prompts(chat, views, data.images, data.row.length,
                      frames=data.frames, ends=ends)  # fmt: skip
    reads = None if model.vision.tower is None else encoder
    reader = PromptReader(loop, reads, model.vision.feature_shape[1], newline)
    policy = functools.partial(stopping, stops=chat.stops)
    return Generator(loop, policy, prompts, reader)


def show(model: Llava, cfg, data, count: int) -> list[Shown]:
    """Answers to the first questions of the data."""
    return samples.ask(generator(model, cfg, data), data, KINDS, count)
