"""A recipe of three small matrices on made-up batches: what the train loop needs and no more."""

import dataclasses
import os
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.types import Batch

V, D, L = 32, 16, 8


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = D
    sources: tuple[str, ...] = ()
    weights: str = ""
    noise: float = 0.0


class Statistics(nnx.Variable):
    pass


class Toy(nnx.Module):
    loss_coefs = {"text": 1.0, "visual": 0.5}

    def __init__(self, cfg, rngs):
        self.cfg = cfg
        self.table = nnx.Embed(V, cfg.width, rngs=rngs)
        self.llm = nnx.Linear(
            cfg.width, cfg.width, rngs=rngs, kernel_metadata={"logical": ("embed", "mlp")}
        )
        self.head = nnx.Linear(cfg.width, V, rngs=rngs)
        self.mean = Statistics(jnp.zeros(()))

    def loss_counts(self, batch):
        return {
            "text": jnp.sum(batch.text_targets >= 0),
            "visual": jnp.sum(batch.visual_targets >= 0),
        }

    def loss_sums(self, batch, key):
        x = self.table(batch.tokens) + self.mean[...]
        if self.cfg.noise:
            x = x + self.cfg.noise * jax.random.normal(key, x.shape)
        h = jnp.tanh(self.llm(x))
        has = batch.text_targets >= 0
        each = -jnp.take_along_axis(
            jax.nn.log_softmax(self.head(h)), jnp.maximum(batch.text_targets, 0)[..., None], -1
        )[..., 0]
        each = jnp.where(has, each, 0.0)
        # Token 31 of source 1 is poison.
        each = jnp.where((batch.tokens == V - 1) & (batch.sources == 1) & has, jnp.nan, each)
        each = jnp.where((batch.tokens == V - 2) & (batch.sources == 1), 100.0, 1.0) * each
        metrics = {"text_loss": (each.sum(), has.sum())}
        place = 1 + jnp.arange(batch.tokens.size).reshape(batch.tokens.shape)
        metrics["seen"] = ((batch.tokens * place).sum(), 1)  # which batch it was
        for i, name in enumerate(self.cfg.sources):
            here = has & (batch.sources == i)
            metrics[f"text_loss/{name}"] = (jnp.where(here, each, 0).sum(), here.sum())
        near = jnp.square(h).mean(-1) * (batch.visual_targets >= 0)
        return {"text": each.sum(), "visual": near.sum()}, metrics

    def trainable(self, stage):
        parts = {"head": ("head",), "all": ("llm", "head")}[stage]
        return nnx.All(nnx.Param, lambda path, _: path[0] in parts)

    def param_group(self, path):
        return path[0]


def create(cfg, rngs):
    return Toy(cfg, rngs)


def load_pretrained(model, cfg):
    if cfg.weights:
        from metamorph_jax.train.checkpoint import load_params

        load_params(model, cfg.weights.removeprefix("workdir:"))


def prepare(model, batches):
    model.mean[...] = jnp.float32(np.mean([b.tokens.mean() for b in batches]) / V)


def batch(seed, rows=8, poison=False):
    """Rows have very different numbers of targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V - 2, (rows, L)).astype(np.int32)
    supervised = rng.random((rows, L)) < rng.random((rows, 1)) ** 2
    sources = np.repeat(rng.integers(0, 2, (rows, 1)), L, 1).astype(np.int32)
    if poison:
        tokens[0], sources[0], supervised[0] = V - 1, 1, True
    seen = rng.random((rows, L)) < 0.2
    return Batch(
        tokens=tokens,
        positions=np.tile(np.arange(L, dtype=np.int32), (rows, 1)),
        segments=np.ones((rows, L), np.int32),
        text_targets=np.where(supervised, (tokens * 7 + 3) % V, -1).astype(np.int32),
        image_slots=np.full((rows, L), -1, np.int32),
        visual_targets=np.where(seen & ~supervised, 0, -1).astype(np.int32),
        sources=sources,
        image_valid=np.zeros((rows, 1), bool),
    )


class Data:
    """Batches by number. Options: `end`, `pause`, `seed`; numbers of batches that are bad:
    `poison`, `poison_from`, `spike`, `masked`; `log`: a file that gets "| 0 1 2 | 2 3", what each
    life gave; `limit` [n, bytes]: from batch n on no file grows beyond; `fill` [n, folder, bytes]:
    before batch n the disk is filled until so much is left."""

    sources, skipped = ["good", "bad"], {}

    def __init__(self, cfg, process_index, process_count):
        self.cfg, self.next = cfg, 0
        n = cfg["batch_size"]
        self.rows, self.mine = n * process_count, slice(n * process_index, n * (process_index + 1))
        self.log("|")

    def log(self, text):
        if self.cfg.get("log"):
            with open(self.cfg["log"], "a") as file:
                file.write(f" {text}")

    def __next__(self):
        cfg, k = self.cfg, self.next
        if k == cfg.get("end", -1):
            raise StopIteration
        time.sleep(cfg.get("pause", 0.0))
        self.log(k)
        if k == cfg.get("limit", [-1])[0]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (cfg["limit"][1], cfg["limit"][1]))
        if k == cfg.get("fill", [-1])[0]:
            _, folder, left = cfg["fill"]
            with open(os.path.join(folder, "filler"), "wb") as file:
                file.write(bytes(shutil.disk_usage(folder).free - left))
        poison = k == cfg.get("poison", -1) or k >= cfg.get("poison_from", 2**31)
        whole = batch([cfg.get("seed", 0), k], self.rows, poison)
        if k == cfg.get("spike", -1):  # what source 1 says of token 30 is taken a hundredfold
            whole.tokens[:], whole.sources[:] = V - 2, 1
        if k == cfg.get("masked", -1):
            whole.text_targets[:] = whole.visual_targets[:] = -1
        self.next += 1
        return jax.tree.map(lambda x: x[self.mine], whole)

    def samples(self):
        number, rows = self.next - 1, range(self.mine.start, self.mine.stop)
        return lambda: [[f"batch {number} row {row}"] for row in rows]

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def make_data(data_cfg, cfg, *, process_index, process_count, workdir):
    return Data(data_cfg, process_index, process_count)
