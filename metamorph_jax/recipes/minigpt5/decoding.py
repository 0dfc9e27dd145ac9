"""How a MiniGPT-5 model writes."""

from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.convert import specs
from metamorph_jax.convert.export import listed_eos
from metamorph_jax.data.chat import Chat
from metamorph_jax.recipe import Shown
from metamorph_jax.recipes.minigpt5.input import input_spec, load_tokenizer
from metamorph_jax.recipes.minigpt5.model import MiniGPT5
from metamorph_jax.recipes.minigpt5.published import base
from metamorph_jax.recipes.minigpt5.sources import KINDS
from metamorph_jax.sampling import samples
from metamorph_jax.sampling.generator import Generator, Prompts
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop


def generator(model: MiniGPT5, cfg, data, *, weights: str = "auto") -> Generator:
    """A generator over this model, whose language model it takes over.

    Args:
        weights: how those of the language model are kept, see `take_over`.
    """
    parts = nnx.merge(*nnx.split(model))  # the same arrays, another module
    del parts.llm
    mesh = sharding.mesh_of(nnx.state(model))
    llm, kept = take_over(model.llm, weights, mesh)
    views = data.images.change(input_spec(cfg).views)
    chat = Chat.of(load_tokenizer(cfg), data.row)
    ends = tuple(listed_eos(specs.generation_fields(base(cfg))))
    prompts = Prompts(chat, views, data.images, data.row.length, None, data.frames, ends)
    width = cfg.qformer.resampler.width
    return Generator(Loop(llm, kept, None, mesh), lambda text: text, prompts, parts, width)


def show(model: MiniGPT5, cfg, data, count: int) -> list[Shown]:
    """Answers to the first questions of the data."""
    return samples.ask(generator(model, cfg, data), data, KINDS, count)
