"""A recipe of a language model and nothing else, to be compared with peers in `plan.py`."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax import losses
from metamorph_jax.models.llm import llama
from metamorph_jax.nn.attention import row_mask
from metamorph_jax.types import Batch, Images


@dataclasses.dataclass(frozen=True)
class Config:
    """A name in `llama.SIZES`, and fields of it to change."""

    llm: str = "llama3.1-8b"
    llm_options: dict = dataclasses.field(default_factory=dict)
    remat: str = "full"
    dtype: str = "bfloat16"


class Text(nnx.Module):
    """Next-token prediction at every position of packed rows."""

    loss_weights = {"text": 1.0}

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        options = {"dtype": cfg.dtype, "remat": cfg.remat, **cfg.llm_options}
        self.llm = llama.Llama(dataclasses.replace(llama.SIZES[cfg.llm], **options), rngs=rngs)

    def param_group(self, path):
        return str(path[0])

    def work(self, batch: Batch):
        return llama.work(self.llm.cfg, *batch.tokens.shape)

    def loss_counts(self, batch: Batch):
        return {"text": jnp.sum(batch.text_targets >= 0)}

    def loss_sums(self, batch: Batch, key=None):
        embeds = self.llm.embed_tokens(batch.tokens)
        hidden = self.llm(embeds, batch.positions, row_mask(batch.segments))
        total, _, _ = losses.text_loss(hidden, *self.llm.head_tables(), batch.text_targets)
        return {"text": total}, {}


@dataclasses.dataclass(frozen=True)
class Data:
    length: int = 4096


STAGES = {"all": lambda cfg: ".*"}
FAMILIES = ()
KINDS = {}
create = Text


def load_pretrained(model, cfg: Config) -> None:
    """Weights stay random."""


def initialize(model, batches) -> None:
    """Nothing to adapt."""


def open_data(data: Data, cfg: Config, shard):
    raise NotImplementedError("this recipe is only planned")


def batch_spec(data: Data, cfg: Config, rows: int) -> Batch:
    line = jax.ShapeDtypeStruct((rows, data.length), jnp.int32)
    none = Images(jax.ShapeDtypeStruct((rows, 0), bool), jax.ShapeDtypeStruct((rows, 0), jnp.int32))
    return Batch(*7 * (line,), images=none)


def generator(model, cfg: Config, data: Data, **options):
    """None: this recipe is only planned."""


def get_config(llm: str = "llama3.1-8b"):
    """The config of a full training on rows of 4096."""
    from ml_collections import ConfigDict

    return ConfigDict(
        dict(
            recipe="benchmarks.llm_only",
            stage="all",
            steps=1000,
            batch_size=64,
            model=dict(llm=llm, llm_options={}, remat="full"),
            data=dict(length=4096),
            optim=dict(learning_rate=3e-5, momentum_dtype="float32"),
            mesh=dict(slice=1, data=1, fsdp=-1, tensor=1, context=1),
        )
    )
