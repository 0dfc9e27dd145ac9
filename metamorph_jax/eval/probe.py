"""Judges of what was generated: a linear probe for visual tokens, a small classifier for images.

Both are trained here on real training data and report their own accuracy on real held-out data,
so that a reader of the report knows what a verdict is worth. Neither is used to train the model.
scikit-learn's Ridge solves the same equations, but its penalty is absolute, not relative to the
scale of the features, and nothing else here needs scikit-learn.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Ridge regression from standardised visual tokens to one-hot labels, one head per property."""

    mean: np.ndarray  # [P*C]
    weight: np.ndarray  # [P*C, sum of classes]
    bias: np.ndarray  # [sum of classes]
    sizes: tuple[int, ...]  # classes of each property

    def scores(self, features: np.ndarray) -> list[np.ndarray]:
        """One float[N, classes] per property. features: float[N, P, C]"""
        flat = np.asarray(features, np.float32).reshape(len(features), -1) - self.mean
        return np.split(flat @ self.weight + self.bias, np.cumsum(self.sizes)[:-1], axis=1)

    def predict(self, features: np.ndarray) -> list[np.ndarray]:
        """One int[N] per property. features: float[N, P, C]"""
        return [scores.argmax(1) for scores in self.scores(features)]


def fit_probe(features: np.ndarray, labels: list[np.ndarray], ridge: float = 1e-2) -> LinearProbe:
    """Closed form. features: float[N, P, C]; labels: one int[N] per property.

    `ridge` is relative to the mean eigenvalue of the N x N Gram matrix, so the scale of the
    features doesn't matter. Solved in the dual when that is smaller."""
    x = np.asarray(features, np.float32).reshape(len(features), -1)
    mean = x.mean(0)
    x = x - mean
    sizes = tuple(int(np.max(label)) + 1 for label in labels)
    onehot = [np.eye(n, dtype=np.float32)[y] for n, y in zip(sizes, labels, strict=True)]
    y = np.concatenate(onehot, 1)
    bias = y.mean(0)
    N, M = x.shape
    if N <= M:
        gram = x @ x.T
        scaled = ridge * np.trace(gram) / N
        alpha = np.linalg.solve(gram + scaled * np.eye(N, dtype=x.dtype), y - bias)
        weight = x.T @ alpha
    else:
        gram = x.T @ x
        scaled = ridge * np.trace(gram) / N
        weight = np.linalg.solve(gram + scaled * np.eye(M, dtype=x.dtype), x.T @ (y - bias))
    return LinearProbe(mean, weight.astype(np.float32), bias, sizes)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """A convolutional net that reads the properties of a small image."""

    widths: tuple[int, ...] = (16, 32, 64, 96)  # each a 3x3 convolution of stride 2
    hidden: int = 128
    steps: int = 800
    batch: int = 48
    lr: float = 3e-3
    noise: float = 0.03  # largest std of pixel noise in training, in units of [0, 1]


class ConvNet(nnx.Module):
    """Convolutions of stride 2, then two linear layers."""

    def __init__(self, cfg: ClassifierConfig, shape: tuple[int, int, int], classes: int, *, rngs):
        he = nnx.initializers.he_normal()
        h, w, channels = shape
        convolutions = []
        for width in cfg.widths:
            convolutions.append(
                nnx.Conv(channels, width, (3, 3), strides=2, kernel_init=he, rngs=rngs)
            )
            channels, h, w = width, -(-h // 2), -(-w // 2)
        self.convolutions = nnx.List(convolutions)
        self.hidden = nnx.Linear(h * w * channels, cfg.hidden, kernel_init=he, rngs=rngs)
        self.out = nnx.Linear(cfg.hidden, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[N, classes] logits of x: float[N, h, w, 3] in [0, 1]."""
        x = (x - 0.9) / 0.2  # the images are nearly white
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.out(jax.nn.relu(self.hidden(x.reshape(len(x), -1))))


@dataclasses.dataclass(frozen=True)
class ImageClassifier:
    """A trained network; `predict` takes uint8 images."""

    graph: nnx.GraphDef
    params: nnx.State
    sizes: tuple[int, ...]  # classes of each property

    def predict(self, pixels: np.ndarray, batch: int = 256) -> list[np.ndarray]:
        """One int[N] per property. pixels: uint8[N, h, w, 3]"""
        logits_of = jax.jit(lambda params, x: nnx.merge(self.graph, params)(x))
        out = []
        for i in range(0, len(pixels), batch):
            part = np.asarray(pixels[i : i + batch])
            pad = np.zeros((batch - len(part), *part.shape[1:]), part.dtype)
            logits = logits_of(self.params, np.concatenate([part, pad]) / np.float32(255))
            out.append(np.asarray(logits)[: len(part)])
        scores = np.split(np.concatenate(out), np.cumsum(self.sizes)[:-1], axis=1)
        return [s.argmax(1) for s in scores]


def train_classifier(pixels: np.ndarray, labels: list[np.ndarray], seed: int = 0,
                     cfg: ClassifierConfig | None = None) -> ImageClassifier:  # fmt: skip
    """A classifier trained with Adam for `cfg.steps` steps. pixels: uint8[N, h, w, 3]

    Training images are mirrored, moved by up to four pixels and given mild noise, so that the
    verdict on a drawing doesn't depend on its exact place or on a little grain."""
    cfg = cfg or ClassifierConfig()
    sizes = tuple(int(np.max(label)) + 1 for label in labels)
    targets = np.stack(labels, 1).astype(np.int32)
    images = np.asarray(pixels)
    net = ConvNet(cfg, images.shape[1:], sum(sizes), rngs=nnx.Rngs(seed))
    graph, params = nnx.split(net)
    optimizer = optax.adam(optax.cosine_decay_schedule(cfg.lr, cfg.steps))
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y, key):
        def loss_of(params):
            seen = _augment(key, x.astype(jnp.float32) / 255, cfg.noise)
            parts = jnp.split(nnx.merge(graph, params)(seen), np.cumsum(sizes)[:-1], axis=1)
            losses = [optax.softmax_cross_entropy_with_integer_labels(p, y[:, i])
                      for i, p in enumerate(parts)]  # fmt: skip
            return sum(losses).mean()

        updates, state = optimizer.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    key = jax.random.key(seed + 1)
    for i in range(cfg.steps):
        take = rng.integers(0, len(images), cfg.batch)
        params, state = step(params, state, images[take], targets[take], jax.random.fold_in(key, i))
    return ImageClassifier(graph, params, sizes)


def agreement(predicted: list[np.ndarray], labels: list[np.ndarray],
              names=("color", "shape")) -> dict:  # fmt: skip
    """Share of right answers per property; "both" is the share that is right in every property."""
    right = [np.asarray(p) == np.asarray(y) for p, y in zip(predicted, labels, strict=True)]
    out = {name: float(r.mean()) for name, r in zip(names, right, strict=True)}
    return out | {"both": float(np.logical_and.reduce(right).mean())}


def _augment(key, x: jax.Array, noise: float) -> jax.Array:
    """Mirrored, shifted (the edge repeats) and noisy images. x: float[N, h, w, 3] in [0, 1]"""
    N, h, w, _ = x.shape
    mirror, place, level, grain = jax.random.split(key, 4)
    x = jnp.where(jax.random.bernoulli(mirror, 0.5, (N, 1, 1, 1)), x[:, :, ::-1], x)
    padded = jnp.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    corner = jax.random.randint(place, (N, 2), 0, 9)
    crop = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (h, w, 3)))
    x = crop(padded, corner)
    std = noise * jax.random.uniform(level, (N, 1, 1, 1))
    return x + std * jax.random.normal(grain, x.shape)
