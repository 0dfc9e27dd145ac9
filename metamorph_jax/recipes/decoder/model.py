"""Projector and statistics around a diffusion decoder, its loss, and what each stage trains."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import flops
from metamorph_jax.flops import Work
from metamorph_jax.models import lora
from metamorph_jax.models.diffusion import decoder as diffusion
from metamorph_jax.models.diffusion.decoder import DiffusionDecoder, Statistics
from metamorph_jax.models.diffusion.projector import make_projector, pad_context
from metamorph_jax.models.vision.encoder import VisionEncoder
from metamorph_jax.recipes.decoder.config import Config
from metamorph_jax.types import Conditioning, DecoderBatch

STAGES = {
    "projector": lambda cfg: lora.restrict(r"projector\..*", cfg.lora),
    "decoder": lambda cfg: lora.restrict(r"(projector|decoder\.denoiser)\..*", cfg.lora),
}


class Decoder(nnx.Module):
    """Vision encoder (or None), projector and diffusion decoder."""

    loss_weights = {"diffusion": 1.0}

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.vision = VisionEncoder(cfg.vision, rngs=rngs) if cfg.with_tower else None
        self.projector = make_projector(cfg.projector, rngs)
        self.decoder = DiffusionDecoder(cfg.decoder, rngs=rngs)
        # Unit-norm features share a large mean: they are standardised. This start changes nothing.
        self.feature_mean = Statistics(jnp.zeros((cfg.projector.input_dim,)))
        self.feature_scale = Statistics(jnp.ones((cfg.projector.input_dim,)))

    def set_statistics(self, features: np.ndarray, images: np.ndarray | None = None) -> None:
        """Measures the standardisation on a sample of the data, in place.

        Args:
            features: float[..., C].
            images: uint8[..., 3], or None to leave that of the pixels as it is.
        """
        flat = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
        self.feature_mean[...] = jnp.asarray(flat.mean(0), jnp.float32)
        self.feature_scale[...] = jnp.asarray(1 / np.maximum(flat.std(0), 1e-6), jnp.float32)
        if images is not None:
            self.decoder.set_statistics(images)

    # ---- from visual tokens to images

    def conditioning(self, features, noise=0.0) -> Conditioning:
        """What the diffusion decoder takes, of features: float[B, P, C].

        noise: like features, added after they are standardised.
        """
        x = (features - self.feature_mean[...]) * self.feature_scale[...] + noise
        context = self.projector(x.astype(jnp.float32))
        return Conditioning(pad_context(context, self.cfg.context_length))

    def draw(self, features, noise, sampler, *, steps: int, guidance: float):
        """float32[B, h, w, 3] images in [0, 1]; arguments as in `DiffusionDecoder.sample`.

        features: float[B, P, C].
        """
        condition = self.conditioning(features)
        return self.decoder.sample(
            condition,
            diffusion.zeros_like(condition),
            sampler,
            steps=steps,
            guidance=guidance,
            noise=noise,
        )

    # ---- training

    def features(self, batch: DecoderBatch):
        """float[B, P, C] visual tokens of a batch, given or from its pixels.

        Raises:
            ValueError: there are neither.
        """
        if batch.features is not None:
            return batch.features
        if self.vision is None:
            raise ValueError("no features in the batch, and the decoder was built without a tower")
        return jax.lax.stop_gradient(self.vision(batch.pixels))

    def loss_counts(self, batch: DecoderBatch) -> dict[str, jax.Array]:
        """Number of images."""
        return {"diffusion": _valid(batch).sum()}

    def loss_sums(self, batch: DecoderBatch, key):
        """Sum over images of the (weighted) mean squared error, and the plain error as metric."""
        cfg, model = self.cfg, self
        # `DiffusionDecoder.losses` splits the same key into the first five of these.
        *_, strength_key, noise_key = jax.random.split(key, 7)
        if cfg.lora is not None and cfg.lora.dropout:
            model = lora.with_dropout(self, jax.random.fold_in(key, 7))
        features, noise = self.features(batch), 0.0
        if cfg.feature_noise:
            shape = (len(features), 1, 1)
            strength = jax.random.uniform(strength_key, shape, maxval=cfg.feature_noise)
            noise = strength * jax.random.normal(noise_key, features.shape)
        condition = model.conditioning(features, noise)
        loss, error = model.decoder.losses(
            batch.image, condition, key, null=diffusion.zeros_like(condition), drop=cfg.drop_context
        )
        valid = _valid(batch)
        return {"diffusion": (loss * valid).sum()}, {"mse": ((error * valid).sum(), valid.sum())}

    def param_group(self, path: tuple[str, ...]) -> str:
        """Part that a parameter belongs to: projector, denoiser, vae, vision, lora …"""
        path = tuple(map(str, path))
        if lora.is_adapter(path):
            return "lora"
        return path[1] if path[0] == "decoder" else path[0]

    def work(self, batch: DecoderBatch) -> tuple[Work, ...]:
        """The matrix products of a training step on a batch (shapes are enough)."""
        rows, found = len(batch.image), []

        def one(x):
            return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)

        def add(part, weights, function, *inputs):
            forward = rows * flops.of_function(self, function, *inputs)
            found.append(Work(part, forward, weights, int(weights != "")))
            return nnx.eval_shape(function, self, *inputs)

        if self.cfg.decoder.vae:
            encode = lambda m, x: m.decoder.vae.encode(x.astype(jnp.float32)).mean  # noqa: E731
            add("autoencoder", "", encode, one(batch.image))
        if batch.features is not None:
            features = one(batch.features)
        else:
            features = add("tower", "", lambda m, x: m.vision(x), one(batch.pixels))
        condition = add("projector", "projector", lambda m, x: m.conditioning(x), features)
        x = jax.ShapeDtypeStruct((1, *self.cfg.decoder.sample_shape), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.int32)
        denoise = lambda m, *a: m.decoder.denoise(*a)  # noqa: E731
        add("denoiser", "decoder.denoiser", denoise, x, t, condition)
        return tuple(found)


def _valid(batch: DecoderBatch):
    """float32[B], 0 where a short batch was filled up."""
    if batch.valid is None:
        return jnp.ones((batch.image.shape[0],), jnp.float32)
    return jnp.asarray(batch.valid, jnp.float32)


def create(cfg: Config, rngs: nnx.Rngs) -> Decoder:
    """A model with random weights; works under `nnx.eval_shape`.

    Raises:
        ValueError: `lora.target` names parts that no stage trains.
    """
    model = Decoder(cfg, rngs=rngs)
    if cfg.lora is not None:
        names = lora.add(model, cfg.lora, rngs=rngs)
        odd = [name for name in names if not name.startswith(("projector.", "decoder.denoiser."))]
        if odd:
            raise ValueError(f"lora.target names what no stage trains: {', '.join(odd[:8])}")
    return model
