"""The model that draws pictures from visual tokens."""

import jax
import numpy as np
from flax import nnx

from metamorph_jax.errors import UserError
from metamorph_jax.sampling import diffusion
from metamorph_jax.sampling.trained import load_trained


class Artist:
    """A trained decoder that draws visual tokens."""

    def __init__(self, model, steps: int):
        self.cfg = model.cfg
        # Pixels, and a schedule that ends in pure noise, have to be sampled from its very end.
        if model.cfg.schedule.zero_snr or model.cfg.vae is None:
            sampler = diffusion.DDIM(spacing="trailing", to_one=True)
        else:
            sampler = diffusion.DPMSolverPP()
        graph, self._weights = nnx.split(model)

        def paint(weights, features, noise, scale):
            recipe = nnx.merge(graph, weights)
            return diffusion.draw(recipe, features, noise, sampler, steps=steps, scale=scale)

        self._paint = jax.jit(paint, static_argnames="scale")

    def draw(self, features: np.ndarray, scale: float, seed: int) -> np.ndarray:
        """uint8[h, w, 3] of float[P, C]."""
        return self.draw_many(features[None], scale, seed)[0]

    def draw_many(self, features: np.ndarray, scale: float, seed: int) -> np.ndarray:
        """uint8[n, h, w, 3] of float[n, P, C]."""
        side, channels = self.cfg.sample_side, self.cfg.sample_channels
        noise = jax.random.normal(jax.random.key(seed), (len(features), side, side, channels))
        images = np.asarray(self._paint(self._weights, features, noise, scale=float(scale)))
        return np.round(images * 255).astype(np.uint8)


def load_artist(workdir: str, steps: int) -> Artist:
    """The model that draws, from the workdir of a decoder stage."""
    model = load_trained(workdir)[2]
    if not hasattr(model, "denoise"):
        raise UserError(f"{workdir} holds no decoder")
    return Artist(model, steps)
