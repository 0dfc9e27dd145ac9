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


@dataclasses.dataclass(frozen=True)
class ImageClassifier:
    """Trained weights; `predict` takes uint8 images."""

    params: dict
    sizes: tuple[int, ...]

    def predict(self, pixels: np.ndarray, batch: int = 256) -> list[np.ndarray]:
        """One int[N] per property. pixels: uint8[N, h, w, 3]"""
        out = []
        for i in range(0, len(pixels), batch):
            part = np.asarray(pixels[i : i + batch])
            pad = np.zeros((batch - len(part), *part.shape[1:]), part.dtype)
            logits = _logits_jit(self.params, np.concatenate([part, pad]) / np.float32(255))
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
    params = _init(jax.random.key(seed), cfg, images.shape[1:], sum(sizes))
    optimizer = optax.adam(optax.cosine_decay_schedule(cfg.lr, cfg.steps))
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y, key):
        def loss_of(params):
            logits = _logits(params, _augment(key, x.astype(jnp.float32) / 255, cfg.noise))
            parts = jnp.split(logits, np.cumsum(sizes)[:-1], axis=1)
            losses = [optax.softmax_cross_entropy_with_integer_labels(p, y[:, i])
                      for i, p in enumerate(parts)]  # fmt: skip
            return sum(losses).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng(seed)
    key = jax.random.key(seed + 1)
    for i in range(cfg.steps):
        take = rng.integers(0, len(images), cfg.batch)
        key_i = jax.random.fold_in(key, i)
        params, state, _ = step(params, state, images[take], targets[take], key_i)
    return ImageClassifier(jax.device_get(params), sizes)


def agreement(predicted: list[np.ndarray], labels: list[np.ndarray],
              names=("color", "shape")) -> dict:  # fmt: skip
    """Share of right answers per property; "both" is the share that is right in every property."""
    right = [np.asarray(p) == np.asarray(y) for p, y in zip(predicted, labels, strict=True)]
    out = {name: float(r.mean()) for name, r in zip(names, right, strict=True)}
    return out | {"both": float(np.logical_and.reduce(right).mean())}


def _init(key, cfg: ClassifierConfig, shape, classes: int) -> dict:
    h, w, channels = shape
    params, keys = {}, jax.random.split(key, len(cfg.widths) + 2)
    for i, width in enumerate(cfg.widths):
        scale = (2 / (9 * channels)) ** 0.5
        params[f"conv{i}"] = scale * jax.random.normal(keys[i], (3, 3, channels, width))
        params[f"shift{i}"] = jnp.zeros(width)
        channels, h, w = width, -(-h // 2), -(-w // 2)
    flat = h * w * channels
    params["hidden"] = (2 / flat) ** 0.5 * jax.random.normal(keys[-2], (flat, cfg.hidden))
    params["hidden_bias"] = jnp.zeros(cfg.hidden)
    params["out"] = (1 / cfg.hidden) ** 0.5 * jax.random.normal(keys[-1], (cfg.hidden, classes))
    params["out_bias"] = jnp.zeros(classes)
    return params


def _logits(params: dict, x: jax.Array) -> jax.Array:
    """x: float[N, h, w, 3] in [0, 1]"""
    x = (x - 0.9) / 0.2  # the images are nearly white
    for i in range(sum(name.startswith("conv") for name in params)):
        x = jax.lax.conv_general_dilated(
            x, params[f"conv{i}"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[f"shift{i}"])
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["hidden"] + params["hidden_bias"])
    return x @ params["out"] + params["out_bias"]


_logits_jit = jax.jit(_logits)


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
