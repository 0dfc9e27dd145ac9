"""The diffusion decoder: draws images from a `Conditioning`, whichever model made it.

    image -> latent of the frozen autoencoder, or the standardised pixels (vae None) -> x0
    loss  = mean square of denoiser(noised x0, t, condition) against noise, velocity or x0
    image <- sampler, steps and guidance <- noise

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) needs a null condition. The caller
gives it (zeros, a learned one, one computed from zeros), in training, where it takes the place of
some conditions, and in sampling, as `null + guidance * (condition - null)`. A null condition
without feature maps leaves those of the condition in place: only the context is dropped, and both
halves of guidance look at the same images (MM-Interleaved).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.dit import DiT, DiTConfig, depth_to_space, space_to_depth
from metamorph_jax.models.diffusion.samplers import Sampler
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig
from metamorph_jax.models.diffusion.unet_mmfs import UNetMMFS, UNetMMFSConfig
from metamorph_jax.models.diffusion.vae import AutoencoderKL, Posterior, VAEConfig
from metamorph_jax.types import Batch, Conditioning


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """What a diffusion decoder is made of, and its loss.

    Attributes:
        vae: None to work on pixels.
        patch: space-to-depth factor around the denoiser (for a UNet on pixels).
        noise_offset: strength of a constant per image and channel that joins the noise.
        min_snr: gamma of the min-SNR loss weight; 0 weighs all steps alike.
        velocity_cap: for x0 prediction, weigh a step by SNR + 1 up to this number; 0 for none.
        noise_draws: timesteps and noises that an image is trained with in one step; the loss is the
            mean over them. Where conditions cost more than the denoiser, as with a language model
            and small images, more of them make better use of a condition.

    Raises:
        ValueError: the denoiser's channels are not those of the autoencoder and patch.
    """

    denoiser: UNetConfig | DiTConfig | UNetMMFSConfig = UNetConfig()
    vae: VAEConfig | None = VAEConfig()
    schedule: Schedule = Schedule()
    patch: int = 1
    noise_offset: float = 0.0
    min_snr: float = 0.0
    velocity_cap: float = 0.0
    noise_draws: int = 1

    def __post_init__(self):
        if self.noise_draws < 1:
            raise ValueError(f"noise_draws must be at least 1, not {self.noise_draws}")
        expected = self.sample_channels * self.patch**2
        if not self.denoiser.in_channels == self.denoiser.out_channels == expected:
            raise ValueError(
                f"denoiser channels {self.denoiser.in_channels} in, {self.denoiser.out_channels}"
                f" out; expected {expected} for this autoencoder and patch"
            )

    @property
    def sample_channels(self) -> int:
        return self.vae.latent_channels if self.vae else 3

    @property
    def sample_side(self) -> int:
        """Side of what is diffused: latents or pixels."""
        return self.denoiser.sample_size * self.patch

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of what is diffused."""
        return self.sample_side, self.sample_side, self.sample_channels

    @property
    def image_side(self) -> int:
        return self.sample_side * (self.vae.shrink if self.vae else 1)

    @property
    def from_pure_noise(self) -> bool:
        """Whether sampling must start at the very last step of the schedule: pixels are not scaled
        as latents are, and a zero terminal SNR was trained to start from noise alone."""
        return self.schedule.zero_snr or self.vae is None


_DENOISERS = {UNetConfig: UNet, DiTConfig: DiT, UNetMMFSConfig: UNetMMFS}


# Four images of 512 x 512: at its first levels, an autoencoder takes half a gigabyte for one.
_PIXELS_AT_ONCE = 2**20


def _turns(images: int, pixels: int) -> int:
    """In how many turns images of so many pixels each are encoded; it divides those of a device."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[a] for a in sharding.BATCH_AXES)
    own = images // shards if images % shards == 0 else images
    most = max(_PIXELS_AT_ONCE // pixels, 1)
    return next(n for n in range(-(-own // most), own + 1) if own % n == 0) if own > most else 1


class Statistics(nnx.Variable):
    """Constants measured on the data: part of the state, but never trained."""


class DiffusionDecoder(nnx.Module):
    """Denoiser, frozen autoencoder (or None) and schedule."""

    def __init__(self, cfg: DiffusionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.denoiser = _DENOISERS[type(cfg.denoiser)](cfg.denoiser, rngs)
        self.vae = AutoencoderKL(cfg.vae, rngs) if cfg.vae else None
        # Images may be nearly white, so pixels are standardised; at first, by the identity.
        self.pixel_mean = Statistics(jnp.zeros((3,)))
        self.pixel_scale = Statistics(jnp.ones((3,)))

    def set_statistics(self, images: np.ndarray) -> None:
        """Measures the standardisation of pixels on images uint8[..., 3], in place.

        Does nothing with an autoencoder: its latents are scaled already.
        """
        if not self.cfg.vae:
            pixels = np.asarray(images).reshape(-1, 3) / 127.5 - 1
            self.pixel_mean[...] = jnp.asarray(pixels.mean(0), jnp.float32)
            self.pixel_scale[...] = jnp.asarray(1 / np.maximum(pixels.std(0), 1e-2), jnp.float32)

    def set_statistics_of(self, batches: Sequence[Batch]) -> None:
        """The same, on the images that batches have drawn, if there are any."""
        drawn = [b.drawings for b in batches if b.drawings is not None]
        images = [np.asarray(d.pixels)[np.asarray(d.valid)] for d in drawn if d.pixels is not None]
        if any(map(len, images)):
            self.set_statistics(np.concatenate(images))

    # ---- images and what is diffused

    def encode(self, images, key):
        """x0, float32[B, h', w', c] without gradient, of images: uint8[B, h, w, 3]."""
        x = images.astype(jnp.float32) / 127.5 - 1.0
        if self.vae is None:
            return (x - self.pixel_mean[...]) * self.pixel_scale[...]
        posterior = self._posterior(x)
        z = posterior.sample(jax.random.normal(key, posterior.mean.shape))
        return jax.lax.stop_gradient(z * self.cfg.vae.scaling_factor)

    def _posterior(self, x) -> Posterior:
        """`vae.encode` of all images, of which a device has `_PIXELS_AT_ONCE` in work at a time."""
        n = _turns(len(x), math.prod(x.shape[1:3]))
        if n == 1:
            return self.vae.encode(x)
        graph, state = nnx.split(self.vae)
        # Image k has turn k % n, so that every device keeps its own.
        turns = jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0)
        turns = sharding.constrain(turns, None, "act_batch", None, None, None)

        def one(x):
            posterior = nnx.merge(graph, state).encode(x)
            return posterior.mean, posterior.logvar

        parts = jax.lax.map(one, turns)
        return Posterior(*(jnp.moveaxis(y, 0, 1).reshape(len(x), *y.shape[2:]) for y in parts))

    def decode(self, x):
        """The inverse of `encode`: float32[B, h, w, 3] in [0, 1]."""
        if self.vae is not None:
            x = self.vae.decode(x / self.cfg.vae.scaling_factor)
        else:
            x = x / self.pixel_scale[...] + self.pixel_mean[...]
        return jnp.clip(x / 2 + 0.5, 0.0, 1.0)

    def limits(self):
        """(darkest, brightest) x0 of pixels, [3] each; None with an autoencoder."""
        if self.vae is not None:
            return None
        return tuple((v - self.pixel_mean[...]) * self.pixel_scale[...] for v in (-1.0, 1.0))

    def denoise(self, x, t, condition: Conditioning):
        """The network's prediction, like x: float32[B, h, w, c]; t: [B].

        condition: one row for each row of x; or what `denoiser.prepare` made of it.
        """
        if self.cfg.patch == 1:
            return self.denoiser(x, t, condition)
        y = self.denoiser(space_to_depth(x, self.cfg.patch), t, condition)
        return depth_to_space(y, self.cfg.patch)

    # ---- training

    def losses(
        self,
        images,
        condition: Conditioning,
        key,
        *,
        null: Conditioning | None = None,
        drop: float = 0.0,
    ):
        """(weighted loss float32[B], plain mean squared error float32[B]) of every image.

        Args:
            images: uint8[B, h, w, 3]; or float32[B, h', w', c], what `encode` made of them.
            condition: of B rows.
            key: for timesteps, noise, latents and which conditions are dropped.
            null: takes the place of dropped conditions; of B rows or one. See `choose`.
            drop: probability that an image is trained without its condition.

        Raises:
            ValueError: conditions are to be dropped and there is no null condition.
        """
        cfg, B = self.cfg, len(images)
        keys = jax.random.split(key, 5)
        encoded = jnp.issubdtype(images.dtype, jnp.floating)
        x0 = images if encoded else self.encode(images, keys[0])
        if cfg.noise_draws > 1:
            B *= cfg.noise_draws
            x0, condition = jnp.tile(x0, (cfg.noise_draws, 1, 1, 1)), _tiled(condition, B)
        t = jax.random.randint(keys[1], (B,), 0, cfg.schedule.num_train_timesteps)
        noise = jax.random.normal(keys[2], x0.shape)
        if cfg.noise_offset:
            constant = jax.random.normal(keys[3], (B, 1, 1, x0.shape[-1]))
            noise = noise + cfg.noise_offset * constant
        if drop:
            if null is None:
                raise ValueError("conditions are dropped in training, so a null one must be given")
            kept = jax.random.uniform(keys[4], (B,)) >= drop
            condition = choose(kept, condition, null)
        found = self.losses_at(x0, noise, t, condition)
        return tuple(x.reshape(cfg.noise_draws, -1).mean(0) for x in found)

    def losses_at(self, x0, noise, t, condition: Conditioning):
        """`losses` of given x0 and noise: float32[B, h, w, c] and timesteps t: int[B]."""
        s = self.cfg.schedule
        prediction = self.denoise(sch.add_noise(s, x0, noise, t), t, condition)
        error = jnp.square(prediction - sch.target(s, x0, noise, t)).mean((1, 2, 3))
        return error * self._weights(t), error

    def _weights(self, t):
        """Of the timesteps in the loss: float32[B], or 1."""
        cfg = self.cfg
        weight = sch.min_snr_weight(cfg.schedule, t, cfg.min_snr) if cfg.min_snr else 1.0
        if cfg.velocity_cap:
            weight = weight * sch.velocity_weight(cfg.schedule, t, cfg.velocity_cap)
        return weight

    # ---- sampling

    def noise(self, key, count: int):
        """float32[count, h, w, c] standard normal, of the shape that is diffused."""
        return jax.random.normal(key, (count, *self.cfg.sample_shape))

    def sample(
        self,
        condition: Conditioning,
        null: Conditioning | None,
        sampler: Sampler,
        *,
        steps: int,
        guidance: float,
        noise,
    ):
        """Images from noise: float32[B, h, w, 3] in [0, 1].

        Args:
            condition: of B rows.
            null: of B rows or one; None only where guidance is 1. Without maps, it has those of the
                condition.
            sampler, steps: how x0 is reached.
            guidance: scale of classifier-free guidance, a Python number; 1 is none.
            noise: float32[B, h', w', c] standard normal, see `noise`.
        """
        predict = guided(self.denoise, condition, null, guidance, self.denoiser.prepare)
        x = sampler.integrate(predict, noise, self.cfg.schedule, steps, clip=self.limits())
        return self.decode(x)


# ---- conditions


def zeros_like(condition: Conditioning) -> Conditioning:
    """A null condition: zeros in place of context and maps; masks stay."""
    return dataclasses.replace(
        condition,
        context=jnp.zeros_like(condition.context),
        maps=tuple(jnp.zeros_like(m) for m in condition.maps),
    )


def _tiled(condition: Conditioning, rows: int) -> Conditioning:
    """The condition again and again, up to so many rows; its maps stay as they are."""
    repeats = rows // len(condition.context)
    mask = None if condition.mask is None else jnp.tile(condition.mask, (repeats, 1))
    context = jnp.tile(condition.context, (repeats, 1, 1))
    return dataclasses.replace(condition, context=context, mask=mask)


def choose(kept, condition: Conditioning, null: Conditioning) -> Conditioning:
    """The condition where kept: bool[B], else the null one.

    Where only the condition has maps, they stay, with their mask.
    """
    if condition.maps and not null.maps:
        chosen = choose(kept, _without_maps(condition), null)
        return dataclasses.replace(chosen, maps=condition.maps, maps_mask=condition.maps_mask)
    condition, null = alike(condition, null)

    def pick(a, b):
        return jnp.where(kept.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, condition, null)


def _without_maps(condition: Conditioning) -> Conditioning:
    return dataclasses.replace(condition, maps=(), maps_mask=None)


def alike(condition: Conditioning, null: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Both with the same arrays: a single row is repeated, missing masks are filled with True.

    Raises:
        ValueError: contexts or maps have other shapes.
    """
    B = max(len(condition.context), len(null.context))
    for name, a, b in (
        ("context", (condition.context,), (null.context,)),
        ("maps", condition.maps, null.maps),
    ):
        shapes = [[x.shape[1:] for x in xs] for xs in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} of the condition {shapes[0]}, of the null one {shapes[1]}")
    filled = []
    for one, other in ((condition, null), (null, condition)):
        changes = {}
        for name in ("mask", "maps_mask"):
            if getattr(one, name) is None and getattr(other, name) is not None:
                changes[name] = jnp.ones(getattr(other, name).shape, bool)
        one = dataclasses.replace(one, **changes)
        filled.append(jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape[1:])), one))
    return filled[0], filled[1]


def guided(
    denoise: Callable,
    condition: Conditioning,
    null: Conditioning | None,
    scale: float,
    prepare: Callable = lambda condition: condition,
) -> Callable:
    """(x, t) -> null + scale * (condition - null), both predictions in one doubled batch.

    Args:
        denoise: (x [B, h, w, c], t [B], condition) -> prediction.
        condition, null: of B rows; the null one may have one row. If only the condition has maps,
            `prepare` receives them once, of B rows, beside 2 B rows of contexts.
        scale: 1 means no guidance and no doubled batch. A Python number.
        prepare: computes once for all steps, from a condition, what `denoise` takes in its place.

    Raises:
        ValueError: there is no null condition, and the scale is not 1.
    """
    if scale == 1:
        ready = prepare(condition)
        return lambda x, t: denoise(x, jnp.broadcast_to(t, x.shape[:1]), ready)
    if null is None:
        raise ValueError(f"guidance {scale} needs a null condition")
    maps = {}
    if condition.maps and not null.maps:
        maps = dict(maps=condition.maps, maps_mask=condition.maps_mask)
        condition = _without_maps(condition)
    condition, null = alike(condition, null)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), null, condition)
    both = prepare(dataclasses.replace(both, **maps))

    def predict(x, t):
        x = jnp.concatenate([x, x])
        without, with_condition = jnp.split(denoise(x, jnp.broadcast_to(t, x.shape[:1]), both), 2)
        return without + scale * (with_condition - without)

    return predict
