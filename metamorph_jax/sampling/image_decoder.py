"""A trained decoder that draws images from visual tokens."""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from metamorph_jax.errors import UserError
from metamorph_jax.models.diffusion.decoder import DiffusionDecoder
from metamorph_jax.models.diffusion.samplers import SamplingConfig, make_sampler
from metamorph_jax.sampling.trained import load_published, load_trained


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
    """A drawing model, compiled once for each guidance and number of images.

    Args:
        steps: of the sampler; None: as the model's config says.

    Attributes:
        sampling: how it draws where nothing else is asked for.
    """

    def __init__(self, model: DrawingModel, steps: int | None = None):
        self.sampling: SamplingConfig = model.cfg.sampling
        self._shape = model.decoder.cfg.sample_shape
        sampler = make_sampler(self.sampling.sampler, model.decoder.cfg.from_pure_noise)
        steps = steps or self.sampling.steps
        graph, self._weights = nnx.split(model)

        def draw(weights, features, noise, guidance):
            model = nnx.merge(graph, weights)
            return model.draw(features, noise, sampler, steps=steps, guidance=guidance)

        self._draw = jax.jit(draw, static_argnames="guidance")

    def draw(self, features: np.ndarray, guidance: float | None, seed: int) -> np.ndarray:
        """uint8[h, w, 3] of float[P, C]."""
        return self.draw_many(features[None], guidance, seed)[0]

    def draw_many(self, features: np.ndarray, guidance: float | None, seed: int) -> np.ndarray:
        """uint8[n, h, w, 3] of float[n, P, C]; guidance None: as the model's config says."""
        guidance = float(self.sampling.guidance if guidance is None else guidance)
        noise = jax.random.normal(jax.random.key(seed), (len(features), *self._shape))
        images = np.asarray(self._draw(self._weights, features, noise, guidance=guidance))
        return np.round(images * 255).astype(np.uint8)


def load_image_decoder(workdir: str, steps: int | None = None) -> ImageDecoder:
    """The model that draws, from the workdir of its training or the folder ("hf:…" too) of a public
    implementation's files.

    Raises:
        UserError: the model in there does not draw.
    """
    model = load_published(workdir) or load_trained(workdir)[2]
    if not isinstance(model, DrawingModel):
        raise UserError(f"{workdir} holds a {type(model).__name__}, which draws no images")
    return ImageDecoder(model, steps)
