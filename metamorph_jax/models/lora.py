"""Low-rank adapters for any linear layer (LoRA, Hu et al. 2021, arXiv 2106.09685).

    y = x W + b + s · dropout(x) A B        A: [in, rank] random, B: [rank, out] zeros
    s = alpha / rank, or alpha / sqrt(rank) (rank-stabilised, Kalajdzievski 2023, arXiv 2312.03732)

`add` gives adapters to the linears whose dotted name a pattern matches; the kernel keeps its name,
so checkpoints of the model still fit. A and B are `Adapter` variables, not `nnx.Param`: readers
and writers of published weights, which ask for `nnx.Param`, skip them. Linears of stacked,
scanned layers have stacked adapters, one per layer. `merged` folds all adapters into the kernels.

Dropout needs a key in every adapter: `with_dropout` returns the model with keys, the model itself
is deterministic.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.nn import quantized
from metamorph_jax.nn.linear import flat_dot_general

LEAVES = ("lora_a", "lora_b")


class Adapter(nnx.Variable):
    """A or B of an adapter."""


class DropoutKey(nnx.Variable):
    """Random key of one forward pass, keys[] or keys[layers]."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which linears get adapters, and what is trained beside them.

    Attributes:
        target: regular expression; a linear gets an adapter if all of its dotted name matches.
            Names of stacked layers have no number: "llm.layers.self_attn.q_proj".
        rank, alpha: see the module docstring.
        dropout: share of the adapter's inputs that are set to 0 in training.
        rslora: scale by alpha / sqrt(rank).
        train: regular expression; a parameter that the stage trains stays trained in full if all
            of its dotted name matches. "" trains adapters only.
        weights: folder or "hf:OWNER/NAME" with adapters of the llm in PEFT's format to start from;
            they must belong to the linears that `target` names.
    """

    target: str = r"llm\.layers\..*_proj"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    train: str = r"(connector|vision\.reducer|head)\..*|newline|.*\.added"
    weights: str = ""

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        for name in ("target", "train"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(f"{name} is not a regular expression: {error}") from error

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nnx.Module):
    """A linear (`nnx.Linear` or `quantized.Linear`) with an adapter; its parts keep their names."""

    def __init__(self, linear, cfg: LoraConfig, *, rngs: nnx.Rngs):
        self.kind = type(linear)
        quantized.take_over(self, linear)
        lead, logical = quantized.describe(linear)
        bound = linear.in_features**-0.5  # as torch's Linear starts, and so PEFT's A
        shape = (*lead, linear.in_features, cfg.rank)
        a = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        b = jnp.zeros((*lead, cfg.rank, linear.out_features))
        # The rank is small and never sharded; the other dimension is sharded as the kernel's is.
        names = ({}, {}) if logical is None else (
            {"logical": (logical[0], None)}, {"logical": (None, logical[1])}
        )  # fmt: skip
        self.lora_a, self.lora_b = Adapter(a, **names[0]), Adapter(b, **names[1])
        self.adapter = cfg
        self.key = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., out] of x: float[..., in]."""
        y = self.kind.__call__(self, x)
        x = x.astype(y.dtype)
        if self.key is not None:
            stays = 1 - self.adapter.dropout
            x = jnp.where(jax.random.bernoulli(self.key[...], stays, x.shape), x / stays, 0)
        last = (((x.ndim - 1,), (0,)), ((), ()))
        low = flat_dot_general(x, self.lora_a[...].astype(y.dtype), last)
        high = flat_dot_general(low, self.lora_b[...].astype(y.dtype), last)
        return y + self.adapter.scale * high


def adapters(model: nnx.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(dotted name, linear) of everything that has an adapter."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoraLinear):
            yield ".".join(map(str, path)), module


def add(model: nnx.Module, cfg: LoraConfig, *, rngs: nnx.Rngs) -> list[str]:
    """Gives adapters to the linears that `cfg.target` names, in place.

    Returns:
        Their dotted names.

    Raises:
        ValueError: if no linear matches, or one has an adapter already.
    """
    linears = list(quantized.linears(model))
    chosen = [(n, m) for n, m in linears if re.fullmatch(cfg.target, n)]
    taken = [n for n, _ in adapters(model) if re.fullmatch(cfg.target, n)]
    if taken:
        raise ValueError(f"these have adapters already: {', '.join(taken)}")
    if not chosen:
        known = ", ".join(sorted({n for n, _ in linears})[:12])
        raise ValueError(f"lora.target {cfg.target!r} matches no linear; there are {known} …")
    for name, linear in chosen:
        quantized.put(model, name, LoraLinear(linear, cfg, rngs=rngs))
    return [name for name, _ in chosen]


def adapt(
    model: nnx.Module, cfg: LoraConfig | None, packed: str, trains_tower: bool, *, rngs: nnx.Rngs
) -> None:
    """Packs the kernels of the language model's layers and adds adapters, in place.

    Args:
        model: with a language model `llm` and an encoder `vision`.
        cfg: of the adapters; None adds none.
        packed: "none", or how the kernels are packed (`nn/quantized.py`), but for those that
            `cfg.train` names.
        trains_tower: whether the tower is trained; else it has no use for adapters.

    Raises:
        ValueError: adapters are asked for in a tower that is not trained; see also `add`.
    """
    if packed != "none":
        full = "" if cfg is None else cfg.train
        quantized.quantize(model, packed, r"llm\.layers\..*", leave=full)
    if cfg is not None:
        names = add(model, cfg, rngs=rngs)
        if not trains_tower and any(name.startswith("vision.tower.") for name in names):
            raise ValueError("lora.target names linears of the tower: set train_tower, too")


def is_adapter(path) -> bool:
    """Whether a leaf's path is that of A or B."""
    return str(path[-1]) in LEAVES


def restrict(pattern: str, cfg: LoraConfig | None) -> str:
    """Of a stage's pattern of trained parameters, what is trained where there are adapters.

    Both are regular expressions that all of a dotted name must match.
    """
    if cfg is None:
        return pattern
    return rf"(?=(?:{pattern})\Z)(?:.*\.lora_[ab]|{cfg.train})"


def with_dropout(model: nnx.Module, key: jax.Array) -> nnx.Module:
    """A copy (of the structure; arrays are shared) whose adapters drop inputs at random."""
    model = nnx.merge(*nnx.split(model))
    for i, (_, linear) in enumerate(adapters(model)):
        if linear.adapter.dropout:
            one = jax.random.fold_in(key, i)
            lead = linear.lora_a.shape[:-2]
            linear.key = DropoutKey(jax.random.split(one, lead) if lead else one)
    return model


def delta(linear: LoraLinear) -> jax.Array:
    """float32[..., in, out]: what the adapter adds to the kernel."""
    a, b = (v[...].astype(jnp.float32) for v in (linear.lora_a, linear.lora_b))
    return linear.adapter.scale * jnp.matmul(a, b, precision="highest")


def kernel_of(linear: nnx.Module) -> jax.Array:
    """float[in, out] of a linear: unpacked, with its adapter added."""
    if isinstance(linear, nnx.Linear):
        return linear.kernel[...]
    kernel = quantized.plain(linear).kernel[...]
    if isinstance(linear, LoraLinear):
        kernel = (kernel + delta(linear)).astype(kernel.dtype)
    return kernel


def is_plain(model: nnx.Module) -> bool:
    """Whether no linear has an adapter or a packed kernel."""
    return next(adapters(model), None) is None and not quantized.any_packed(model)


def merged(model: nnx.Module) -> nnx.Module:
    """A model of plain linears that computes the same: adapters are added to the kernels,
    quantised kernels are unpacked. The model itself, if there is nothing to do."""
    if is_plain(model):
        return model
    model = nnx.merge(*nnx.split(model))
    for name, linear in list(adapters(model)):
        new = quantized.plain(linear)
        kernel = new.kernel[...]
        new.kernel = new.kernel.replace((kernel + delta(linear)).astype(kernel.dtype))
        quantized.put(model, name, new)
    for name, linear in list(quantized.linears(model)):
        if quantized.is_packed(linear):
            quantized.put(model, name, quantized.plain(linear))
    return model


# ---- adapters of an earlier run


def scales(model: nnx.Module) -> dict[str, float]:
    """Dotted name of every linear with an adapter -> what scales its product A B."""
    return {name: linear.adapter.scale for name, linear in adapters(model)}


def same(model: nnx.Module, other: nnx.Module) -> bool:
    """Whether two models have the same adapters: names, shapes and scales."""

    def described(model):
        return {
            name: (linear.lora_a.shape, linear.lora_b.shape, linear.adapter.scale)
            for name, linear in adapters(model)
        }

    return described(model) == described(other)


def fold(model: nnx.Module, leaves: Mapping[str, jax.Array], scales: Mapping[str, float]) -> None:
    """Adds adapters that the model does not have to its kernels, in place.

    Args:
        leaves: "module.lora_a" and "module.lora_b" -> array.
        scales: module -> what scales the product of the two.

    Raises:
        ValueError: the model has no such kernel.
    """
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    for name in sorted(scales):
        if name not in modules or "kernel" not in vars(modules[name]):
            raise ValueError(f"the model has no kernel {name} that an adapter could be added to")
        param = modules[name].kernel
        change = scales[name] * jnp.matmul(
            leaves[f"{name}.lora_a"], leaves[f"{name}.lora_b"], precision="highest"
        )
        param[...] = (param[...] + change).astype(param[...].dtype)


def replicated(model: nnx.Module):
    """The sharding of whole arrays on all devices of the model."""
    where = jax.tree.leaves(nnx.state(model, nnx.Param))[0].sharding
    if isinstance(where, jax.sharding.NamedSharding):
        return sharding.replicated(where.mesh)
    return where
