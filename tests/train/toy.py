"""A recipe of three small matrices on made-up batches: what the train loop needs and no more."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.flops import Work
from metamorph_jax.recipe import Shown
from metamorph_jax.types import Batch, Images

V, D, L = 32, 16, 8


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = D
    weights: str = ""
    noise: float = 0.0


class Statistics(nnx.Variable):
    pass


class Toy(nnx.Module):
    loss_weights = {"text": 1.0, "visual": 0.5}

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
        for i, name in enumerate(batch.source_names):
            here = has & (batch.sources == i)
            metrics[f"text_loss/{name}"] = (jnp.where(here, each, 0).sum(), here.sum())
        near = jnp.square(h).mean(-1) * (batch.visual_targets >= 0)
        return {"text": each.sum(), "visual": near.sum()}, metrics

    def param_group(self, path):
        return path[0]

    def work(self, batch):
        return (Work("llm", 2.0 * self.cfg.width**2 * batch.tokens.size, "llm"),)


STAGES = {"head": lambda cfg: r"head\..*", "all": lambda cfg: r"(llm|head)\..*"}
FAMILIES = ()
KINDS = {}


def create(cfg, rngs):
    return Toy(cfg, rngs)


def load_pretrained(model, cfg):
    if cfg.weights:
        from metamorph_jax.convert.load import load_workdir

        load_workdir(model, cfg.weights.removeprefix("workdir:"))


def initialize(model, batches):
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
        images=Images(np.zeros((rows, 1), bool), np.zeros((rows, 1), np.int32)),
        source_names=("good", "bad"),
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """Numbers of batches that are bad: `poison`, `poison_from`, `spike`, `masked`; `end`: how many
    there are; `pause`: seconds before each; `log`: a file that gets "| 0 1 2 | 2 3", what each life
    gave; `limit` [n, bytes]: from batch n on no file grows beyond; `fill` [n, folder, bytes]:
    before batch n the disk is filled until so much is left."""

    seed: int = 0
    end: int = -1
    pause: float = 0.0
    log: str = ""
    poison: int = -1
    poison_from: int = 2**31
    spike: int = -1
    masked: int = -1
    limit: list = dataclasses.field(default_factory=lambda: [-1, 0])
    fill: list = dataclasses.field(default_factory=lambda: [-1, "", 0])


class Stream:
    """Batches by number."""

    sources, skipped = ["good", "bad"], {}

    def __init__(self, data, shard):
        self.data, self.next = data, 0
        n = shard.rows
        self.rows, self.mine = n * shard.count, slice(n * shard.index, n * (shard.index + 1))
        self.log("|")

    def log(self, text):
        if self.data.log:
            with open(self.data.log, "a") as file:
                file.write(f" {text}")

    def __next__(self):
        data, k = self.data, self.next
        if k == data.end:
            raise StopIteration
        time.sleep(data.pause)
        self.log(k)
        if k == data.limit[0]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (data.limit[1], data.limit[1]))
        if k == data.fill[0]:
            _, folder, left = data.fill
            with open(os.path.join(folder, "filler"), "wb") as file:
                file.write(bytes(shutil.disk_usage(folder).free - left))
        whole = batch([data.seed, k], self.rows, k == data.poison or k >= data.poison_from)
        if k == data.spike:  # what source 1 says of token 30 is taken a hundredfold
            whole.tokens[:], whole.sources[:] = V - 2, 1
        if k == data.masked:
            whole.text_targets[:] = whole.visual_targets[:] = -1
        self.next += 1
        return jax.tree.map(lambda x: x[self.mine], whole)

    def sample_names(self):
        number, rows = self.next - 1, range(self.mine.start, self.mine.stop)
        return lambda: [[f"batch {number} row {row}"] for row in rows]

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]

    def close(self):
        pass


def open_data(data, cfg, shard):
    return Stream(data, shard)


def batch_spec(data, cfg, rows):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch(0, rows))


class Generator:
    """The decoding of this recipe: the likeliest next token."""

    def __init__(self, model):
        self.model = model

    def next_tokens(self, tokens):
        model = self.model
        x = jnp.tanh(model.llm(model.table(tokens) + model.mean[...]))
        return jnp.argmax(model.head(x), -1)


def show(model, cfg, data, count):
    image = np.full((4, 6, 3), 200, np.uint8)
    return [Shown(f"made {k}", {"answer": f"<b>{k}</b>"}, {"drawn": image}) for k in range(count)]


def generator(model, cfg, data, **options):
    return Generator(model)


class RightTokens:
    """A task: the share of tokens that the model gets right."""

    def __init__(self, seed):
        self.batch = batch(seed)

    def run(self, generator):
        wanted = self.batch.text_targets
        right = (generator.next_tokens(self.batch.tokens) == wanted) & (wanted >= 0)
        return {"right": float(right.sum() / (wanted >= 0).sum())}


class Scripted:
    """A task with made-up values: step -> value. Which step it is, it reads in metrics.jsonl."""

    def __init__(self, workdir, values):
        self.file, self.values = pathlib.Path(workdir) / "metrics.jsonl", values

    def run(self, generator):
        last = self.file.read_text().splitlines()[-1]
        return {"value": self.values[str(json.loads(last)["step"])]}
