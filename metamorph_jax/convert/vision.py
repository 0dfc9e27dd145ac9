"""Vision encoders with the weights that their config names, and the preprocessing of these weights.

Published weights come with a preprocessor_config.json, which is followed: how an image becomes
square (stretched, padded, or cut out of a larger one), the resampling, mean and deviation. Its size
is not: that of the tower counts, which a config may have changed. What the config states itself
wins: mean and std in `tower_options`, and all of `config.data.images`.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.convert import agree, specs, vit
from metamorph_jax.convert.vit import load_vit
from metamorph_jax.data.config import ImageConfig, InputSpec
from metamorph_jax.data.images import Preprocess, preprocess_from_hf
from metamorph_jax.data.views import Single
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.build import build
from metamorph_jax.models.vision.encoder import VisionConfig, VisionEncoder

# Of `Preprocess`: what decides about the pixels that a tower gets.
PIXELS = ("size", "mode", "resize", "resample", "mean", "std")


def load_vision(encoder: VisionEncoder, cfg: VisionConfig) -> None:
    """Fills the tower of an encoder in place from `cfg.weights`; "random" leaves it as it is.

    The tower takes mean and deviation of pixels from the weights' own preprocessing, too.

    Raises:
        ConfigError: the config beside the weights says other things than the tower's.
        ValueError: with a list of all that doesn't fit.
    """
    if encoder.tower is not None and cfg.weights != specs.RANDOM:
        if specs.has_fields(cfg.weights):
            agree.require(
                cfg.weights,
                lambda: vit.disagreements(cfg.vit, specs.tower_fields(cfg.weights)),
                advice="config.model.vision.tower and its tower_options must say the same",
            )
        load_vit(encoder.tower, specs.tower_tensors(cfg.weights))
        found = preprocessing(cfg)
        changes = {"mean": found.mean, "std": found.std}
        encoder.tower.cfg = dataclasses.replace(encoder.tower.cfg, **changes)


def feature_function(cfg: VisionConfig, load: Callable = load_vision) -> Callable:
    """pixels uint8[N, h, w, 3] -> float32[N, P, C], compiled, for filling feature caches.

    It runs on the first device of this process.

    Args:
        load: (encoder, cfg) fills the tower, in place, from `cfg.weights`.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    make = lambda rngs: VisionEncoder(cfg, rngs=rngs)  # noqa: E731
    encoder = build(make, mesh, 0, fill=lambda encoder: load(encoder, cfg))
    graph, weights = nnx.split(encoder)
    compute = jax.jit(lambda weights, pixels: nnx.merge(graph, weights)(pixels))
    return lambda pixels: compute(weights, pixels)


# ---- preprocessing


def preprocessing(cfg: VisionConfig) -> Preprocess:
    """How images are prepared for the tower of a config; see the module docstring.

    Without a preprocessor_config.json, images are stretched to a square, and mean and deviation are
    the tower's. So they are where the file asks for steps that we don't have, and that is printed.
    """
    tower = cfg.vit
    own = Preprocess(tower.size, mean=tuple(tower.mean), std=tuple(tower.std))
    fields = specs.processor_fields(cfg.weights)
    if fields is None:
        return own
    try:
        found = preprocess_from_hf(fields)
    except ValueError as error:
        _say(f"{cfg.weights}: {error}; images are stretched to a square")
        return own
    if found.size != tower.size:
        resize = found.resize and round(found.resize * tower.size / found.size)
        found = dataclasses.replace(found, size=tower.size, resize=resize)
    stated = {n: tuple(cfg.tower_options[n]) for n in ("mean", "std") if n in cfg.tower_options}
    for name, value in stated.items():
        if value != getattr(found, name):
            _say(f"config.model.vision.tower_options.{name} {value} takes the place of "
                 f"{getattr(found, name)} in {cfg.weights}")  # fmt: skip
    return dataclasses.replace(found, **stated)


def check_cache(folder: str, trained: bool) -> None:
    """Raises ConfigError if features of a tower that is trained are to be cached.

    Args:
        folder: of the feature cache, "" for none.
        trained: whether the tower is.
    """
    if folder and trained:
        raise ConfigError(
            "config.model.train_tower has no use for config.data.cache.features, which holds what "
            'a frozen tower gives: set the folder to ""'
        )


def pixel_differences(ours: Preprocess, fields: Mapping, names=PIXELS) -> list[str]:
    """Where a preprocessor_config.json asks for other pixels than a whole checkpoint's tower gets.

    Args:
        ours: how images are prepared for the tower.
        fields: of the file.
        names: of the fields of `Preprocess` that are compared.

    Raises:
        ValueError: the file asks for steps that we don't have.
    """
    return agree.differences(ours, preprocess_from_hf(fields), names, "tower.")


def report_changes(images: ImageConfig, cfg: VisionConfig) -> None:
    """Prints where a data config asks for other preprocessing than the tower's weights."""
    if cfg.vit is None or specs.processor_fields(cfg.weights) is None:
        return
    found = preprocessing(cfg)
    asked = images.change(Single(1, found)).preprocess
    for field, new in vars(asked).items():
        if new != getattr(found, field):
            _say(f"config.data.images.{field} {new!r} takes the place of "
                 f"{getattr(found, field)!r} in {cfg.weights}")  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def input_spec(cfg: VisionConfig, read: bool = True) -> InputSpec:
    """What the encoder decides about its input: one view per image, features and their identity.

    Args:
        read: follow the preprocessing of the weights, which must be at hand; without it, that of
            the tower alone, which has the same shapes.
    """
    tower, (tokens, width) = cfg.vit, cfg.feature_shape
    if tower is None:
        return InputSpec(Single(tokens), width)
    if not read:
        cfg = dataclasses.replace(cfg, weights=specs.RANDOM)
    process = preprocessing(cfg)
    if (process.mean, process.std) != (tuple(tower.mean), tuple(tower.std)):
        options = cfg.tower_options | {"mean": process.mean, "std": process.std}
        cfg = dataclasses.replace(cfg, tower_options=options)
    return InputSpec(Single(tokens, process), width, cfg.identity)
