"""A trained decoder that draws images from visual tokens."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.convert import load
from metamorph_jax.errors import UserError, WeightError
from metamorph_jax.models import build
from metamorph_jax.models.diffusion.decoder import DiffusionConfig, DiffusionDecoder
from metamorph_jax.models.diffusion.samplers import Sampler, SamplingConfig, make_sampler
from metamorph_jax.sampling.trained import load_published, load_trained
from metamorph_jax.train import checkpoint


@runtime_checkable
class DrawingModel(Protocol):
    """A trained model that draws visual tokens.

    Attributes:
        decoder: the diffusion decoder it draws with.
        cfg: its config; `cfg.sampling` is a `SamplingConfig`.
    """

    decoder: DiffusionDecoder
    cfg: Any

    def draw(self, features, noise, sampler, *, steps: int, guidance: float):
        """float32[n, h, w, 3] images in [0, 1] of features: float[n, P, C]."""
        ...


class ImageDecoder:
    """A drawing model, compiled once for each guidance, number of steps and number of images.

    Args:
        steps: of the sampler; None: as the model's config says.

    Attributes:
        sampling: how it draws where nothing else is asked for.
        weights: of the model.

    Raises:
        UserError: the sampler can't make so many steps.
    """

    def __init__(self, model: DrawingModel, steps: int | None = None):
        self.sampling: SamplingConfig = model.cfg.sampling
        self._decoder: DiffusionConfig = model.decoder.cfg
        sampler = self.set_steps(self.sampling.steps if steps is None else steps)
        graph, self.weights = nnx.split(model)

        def draw(weights, features, noise, steps, guidance):
            model = nnx.merge(graph, weights)
            images = model.draw(features, noise, sampler, steps=steps, guidance=guidance)
            return sharding.constrain(images, None, None, None, None)

        def draw_each(weights, features, seeds, steps, guidance):
            features = sharding.constrain(features, "act_batch", None, None)
            shape = self._decoder.sample_shape
            noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)
            return draw(weights, features, noise, steps, guidance)

        self._draw, self._draw_each = (
            jax.jit(one, static_argnames=("steps", "guidance")) for one in (draw, draw_each)
        )

    def set_steps(self, steps: int) -> Sampler:
        """The sampler, which draws in so many steps from now on; see `with_steps`."""
        self.sampling, sampler = with_steps(self.sampling, self._decoder, steps)
        return sampler

    def draw(self, features: np.ndarray, guidance: float | None, seed: int) -> np.ndarray:
        """uint8[h, w, 3] of float[P, C]."""
        return self.draw_each(features[None], guidance, [seed])[0]

    def draw_many(self, features: np.ndarray, guidance: float | None, seed: int) -> np.ndarray:
        """uint8[n, h, w, 3] of float[n, P, C]; guidance None: as the model's config says.

        Raises:
            WeightError: an image would have values that are not finite.
        """
        shape = self._decoder.sample_shape
        noise = jax.random.normal(jax.random.key(seed), (len(features), *shape))
        return self._run(self._draw, features, noise, guidance)

    def draw_each(
        self, features: np.ndarray, guidance: float | None, seeds: Sequence[int]
    ) -> np.ndarray:
        """As `draw_many`, but each image has a seed of its own, whatever is drawn beside it.

        Compiled at numbers of images that are powers of two.
        """
        n = len(features)
        more = (1 << max(n - 1, 0).bit_length()) - n
        filled = np.concatenate([features, *[features[:1]] * more])
        seeds = np.array([*seeds, *[0] * more], np.uint32)
        return self._run(self._draw_each, filled, seeds, guidance)[:n]

    def _run(self, draw, features: np.ndarray, chance, guidance: float | None) -> np.ndarray:
        """uint8[n, h, w, 3], of a compiled function and what it draws noise from."""
        guidance = float(self.sampling.guidance if guidance is None else guidance)
        if not np.isfinite(features).all():
            raise WeightError("the visual tokens of an image are not finite, so it is not drawn")
        with jax.set_mesh(sharding.mesh_of(self.weights)):
            images = draw(self.weights, features, chance, self.sampling.steps, guidance)
        images = np.asarray(images)
        if not np.isfinite(images).all():
            raise WeightError(
                f"an image came out with values that are not finite (guidance {guidance:g}) and is "
                "not kept: the decoder's weights are damaged, or the guidance is too high"
            )
        return np.round(images * 255).astype(np.uint8)


def with_steps(
    sampling: SamplingConfig, decoder: DiffusionConfig, steps: int
) -> tuple[SamplingConfig, Sampler]:
    """(how a drawing model draws in so many steps, its sampler).

    Raises:
        UserError: it can't make so many steps of the schedule that the model was trained with.
    """
    try:
        sampler = make_sampler(sampling.sampler, decoder.from_pure_noise)
        sampler.checked_table(decoder.schedule, steps)
    except ValueError as error:
        raise UserError(f"--steps (or config.model.sampling.steps): {error}") from error
    return dataclasses.replace(sampling, steps=steps), sampler


def check_run(workdir: str, steps: int | None) -> None:
    """Raises where `load_image_decoder` would, as far as can be told without reading weights."""
    recipe, cfg, _ = load.open_run(workdir)
    model = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    _check_draws(workdir, model)
    sampling = model.cfg.sampling
    with_steps(sampling, model.decoder.cfg, sampling.steps if steps is None else steps)
    checkpoint.export_shapes(workdir)


def _check_draws(workdir: str, model) -> None:
    if not isinstance(model, DrawingModel):
        raise UserError(f"{workdir} holds a {type(model).__name__}, which draws no images")


def load_image_decoder(workdir: str, steps: int | None = None) -> ImageDecoder:
    """The model that draws, from the workdir of its training or the folder ("hf:…" too) of a public
    implementation's files.

    Raises:
        UserError: the model in there does not draw, or not in so many steps.
    """
    if (pathlib.Path(workdir) / "config.json").is_file():
        check_run(workdir, steps)
    model = load_published(workdir) or load_trained(workdir)[2]
    _check_draws(workdir, model)
    return ImageDecoder(model, steps)
