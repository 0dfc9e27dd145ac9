"""The decoder recipe: visual tokens -> picture, by diffusion.

MetaMorph's visualiser (spec 7) and its small relative for the quick start:

    features [B, P, C] -> standardise -> projector -> zeros up to `context_length` -> context
    image -> latent of the frozen autoencoder, or the standardised pixels (vae None) -> x0
    loss = mean square of denoiser(noised x0, t, context) against noise, velocity or x0

A sample whose condition is dropped sees zeros in place of the whole context; the same zeros are
the unconditional context when sampling. `Conditioning` made elsewhere can be given in place of
features.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import flops
from metamorph_jax.data.config import InputConfig
from metamorph_jax.errors import ConfigError
from metamorph_jax.flops import Work
from metamorph_jax.models import lora
from metamorph_jax.models.build import is_open
from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.dit import DiT, DiTConfig, depth_to_space, space_to_depth
from metamorph_jax.models.diffusion.projector import ProjectorConfig, make_projector, pad_context
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig
from metamorph_jax.models.diffusion.vae import AutoencoderKL, VAEConfig
from metamorph_jax.models.vision.encoder import VisionConfig, VisionEncoder
from metamorph_jax.recipe import Shard
from metamorph_jax.types import DecoderBatch

STAGES = {
    "projector": lambda cfg: lora.restrict(r"projector\..*", cfg.lora),
    "decoder": lambda cfg: lora.restrict(r"(projector|denoiser)\..*", cfg.lora),
}
FAMILIES = ()
KINDS = {}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What the decoder is made of and how it learns.

    Attributes:
        vae: None to work on pixels.
        context_length: zero tokens are appended up to this length; 0 for none.
        patch: space-to-depth factor around the denoiser (for a UNet on pixels).
        drop_context: probability that a sample is trained without its condition.
        noise_offset: strength of a constant per sample and channel that joins the noise.
        min_snr: gamma of the min-SNR loss weight; 0 weighs all steps alike.
        feature_noise: standardised features are trained with normal noise of a strength drawn from
            0 up to this: what a language model predicts is never exactly a tower's feature.
        velocity_cap: for x0 prediction, weigh a step by SNR + 1 up to this number; 0 for none.
    """

    projector: ProjectorConfig = ProjectorConfig()
    denoiser: UNetConfig | DiTConfig = UNetConfig()
    vae: VAEConfig | None = VAEConfig()
    schedule: Schedule = Schedule()
    context_length: int = 77
    patch: int = 1
    drop_context: float = 0.1
    noise_offset: float = 0.0
    min_snr: float = 0.0
    feature_noise: float = 0.0
    velocity_cap: float = 0.0

    def __post_init__(self):
        if self.projector.output_dim != self.denoiser.cross_attention_dim:
            raise ValueError(
                f"projector.output_dim={self.projector.output_dim} must equal"
                f" denoiser.cross_attention_dim={self.denoiser.cross_attention_dim}"
            )
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
    def image_side(self) -> int:
        return self.sample_side * (self.vae.shrink if self.vae else 1)

    @classmethod
    def metamorph(cls, **kw):
        """The paper's visualiser: SigLIP tokens, Stable Diffusion 1.5 at 512 pixels."""
        return cls(**kw)

    @classmethod
    def pixels(cls, features: int, tokens: int, side: int = 64, width: int = 256, **kw):
        """A transformer on `side` x `side` pixels: for small pictures and the quick start.

        Velocity prediction with a terminal SNR of zero: sampling starts from what training saw at
        the last step, so nearly white pictures come out white.
        """
        denoiser = DiTConfig(
            sample_size=side, patch=max(side // 8, 1), width=width, depth=6, num_heads=width // 64,
            cross_attention_dim=width, num_context=tokens,
        )  # fmt: skip
        projector = ProjectorConfig(input_dim=features, hidden_dim=width, output_dim=width)
        schedule = Schedule(prediction_type="v_prediction", zero_snr=True)
        parts = dict(projector=projector, denoiser=denoiser, schedule=schedule)
        return cls(**(parts | dict(vae=None, context_length=0) | kw))


class Statistics(nnx.Variable):
    """Fixed numbers of the data, part of the state but never trained."""


@dataclasses.dataclass(frozen=True)
class DecoderLora(lora.LoraConfig):
    """Adapters of the denoiser, see `LoraConfig`; the projector stays trained in full.

    `weights` are PEFT's of a UNet.
    """

    target: str = r"denoiser\..*attn[12]\.(to_[qkv]|to_out\.0)"
    train: str = r"projector\..*"


class DecoderRecipe(nnx.Module):
    """Projector, denoiser and (frozen) autoencoder; see the module docstring.

    Args:
        vision: frozen, for batches that have pixels in place of features; or None.
        adapters: a stage then trains, of all that it would train, the adapters and what
            `adapters.train` names.
    """

    loss_weights = {"diffusion": 1.0}

    def __init__(
        self,
        cfg: DecoderConfig,
        rngs: nnx.Rngs,
        vision: VisionEncoder | None = None,
        adapters: DecoderLora | None = None,
    ):
        self.cfg, self.adapters = cfg, adapters
        self.projector = make_projector(cfg.projector, rngs)
        kind = DiT if isinstance(cfg.denoiser, DiTConfig) else UNet
        self.denoiser = kind(cfg.denoiser, rngs)
        if cfg.vae:
            self.vae = AutoencoderKL(cfg.vae, rngs)
        self.vision = vision
        # Unit-norm features share a large mean, and pictures may be nearly white: both are
        # standardised with these. As they stand here they change nothing.
        self.feature_mean = Statistics(jnp.zeros((cfg.projector.input_dim,)))
        self.feature_scale = Statistics(jnp.ones((cfg.projector.input_dim,)))
        self.pixel_mean = Statistics(jnp.zeros((3,)))
        self.pixel_scale = Statistics(jnp.ones((3,)))
        if adapters is not None:
            names = lora.add(self, adapters, rngs=rngs)
            odd = [name for name in names if name.split(".")[0] not in ("projector", "denoiser")]
            if odd:
                raise ValueError(f"lora.target names what no stage trains: {', '.join(odd[:8])}")

    def set_statistics(self, features: np.ndarray, images: np.ndarray | None = None) -> None:
        """Measures the standardisation on a sample of the data.

        Args:
            features: float[..., C].
            images: uint8[..., 3]; left alone with an autoencoder, whose latents are scaled already.
        """
        flat = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
        self.feature_mean[...] = jnp.asarray(flat.mean(0), jnp.float32)
        self.feature_scale[...] = jnp.asarray(1 / np.maximum(flat.std(0), 1e-6), jnp.float32)
        if images is not None and not self.cfg.vae:
            pixels = np.asarray(images).reshape(-1, 3) / 127.5 - 1
            self.pixel_mean[...] = jnp.asarray(pixels.mean(0), jnp.float32)
            self.pixel_scale[...] = jnp.asarray(1 / np.maximum(pixels.std(0), 1e-2), jnp.float32)

    def context(self, features, noise=0.0):
        """What the denoiser attends to, float[B, P', D].

        features: float[B, P, C]; noise: like features, added once they are standardised.
        """
        x = (features - self.feature_mean[...]) * self.feature_scale[...] + noise
        return pad_context(self.projector(x.astype(jnp.float32)), self.cfg.context_length)

    def latents(self, image, key):
        """image: uint8[B, h, w, 3]; returns float32[B, h', w', c], without gradient."""
        x = image.astype(jnp.float32) / 127.5 - 1.0
        if not self.cfg.vae:
            return (x - self.pixel_mean[...]) * self.pixel_scale[...]
        posterior = self.vae.encode(x)
        z = posterior.sample(jax.random.normal(key, posterior.mean.shape))
        return jax.lax.stop_gradient(z * self.cfg.vae.scaling_factor)

    def picture(self, x):
        """The inverse of `latents`: float32[B, h, w, 3] in [0, 1]."""
        if self.cfg.vae:
            x = self.vae.decode(x / self.cfg.vae.scaling_factor)
        else:
            x = x / self.pixel_scale[...] + self.pixel_mean[...]
        return jnp.clip(x / 2 + 0.5, 0.0, 1.0)

    def limits(self):
        """(darkest, brightest) values of pixels in `latents`, [3] each; None with a VAE."""
        if self.cfg.vae:
            return None
        return tuple((v - self.pixel_mean[...]) * self.pixel_scale[...] for v in (-1.0, 1.0))

    def prepare(self, context):
        """What `denoise` needs of a context and is the same in all steps of sampling."""
        return self.denoiser.keys_values(context) if isinstance(self.denoiser, UNet) else context

    def denoise(self, x, t, context):
        """The network's prediction.

        Args:
            x: float32[B, h, w, c].
            t: [B].
            context: float[B, P', D], or what `prepare` made of it.
        """
        if self.cfg.patch == 1:
            return self.denoiser(x, t, context)
        y = self.denoiser(space_to_depth(x, self.cfg.patch), t, context)
        return depth_to_space(y, self.cfg.patch)

    def features(self, batch: DecoderBatch):
        if batch.features is not None:
            return batch.features
        if self.vision is None:
            raise ValueError("no features in the batch, and the decoder was built without a tower")
        return jax.lax.stop_gradient(self.vision(batch.pixels))

    def loss_counts(self, batch: DecoderBatch) -> dict[str, jax.Array]:
        """Number of pictures."""
        return {"diffusion": _valid(batch).sum()}

    def loss_sums(self, batch: DecoderBatch, key):
        """Sum over pictures of the (weighted) mean squared error, and the plain error as metric."""
        cfg, model = self.cfg, self
        keys = jax.random.split(key, 7)
        if self.adapters is not None and self.adapters.dropout:
            model = lora.with_dropout(self, jax.random.fold_in(key, len(keys)))
        B = batch.image.shape[0]
        x0 = self.latents(batch.image, keys[0])
        t = jax.random.randint(keys[1], (B,), 0, cfg.schedule.num_train_timesteps)
        noise = jax.random.normal(keys[2], x0.shape)
        if cfg.noise_offset:
            constant = jax.random.normal(keys[3], (B, 1, 1, x0.shape[-1]))
            noise = noise + cfg.noise_offset * constant
        features, spread = self.features(batch), 0.0
        if cfg.feature_noise:
            strength = jax.random.uniform(keys[5], (B, 1, 1), maxval=cfg.feature_noise)
            spread = strength * jax.random.normal(keys[6], features.shape)
        context = model.context(features, spread)
        keep = jax.random.uniform(keys[4], (B, 1, 1)) >= cfg.drop_context
        context = jnp.where(keep, context, 0.0)
        prediction = model.denoise(sch.add_noise(cfg.schedule, x0, noise, t), t, context)
        wanted = sch.target(cfg.schedule, x0, noise, t)
        error = jnp.square(prediction - wanted).mean((1, 2, 3))
        valid = _valid(batch)
        weight = sch.min_snr_weight(cfg.schedule, t, cfg.min_snr) if cfg.min_snr else 1.0
        if cfg.velocity_cap:
            weight = weight * sch.velocity_weight(cfg.schedule, t, cfg.velocity_cap)
        plain = (error * valid).sum()
        return {"diffusion": (weight * error * valid).sum()}, {"mse": (plain, valid.sum())}

    def param_group(self, path: tuple[str, ...]) -> str:
        """Part that a parameter belongs to: projector, denoiser, vae, tower or lora."""
        return "lora" if lora.is_adapter(path) else str(path[0])

    def work(self, batch: DecoderBatch) -> tuple[Work, ...]:
        """The matrix products of a training step on a batch (shapes are enough)."""
        cfg, rows, found = self.cfg, batch.image.shape[0], []

        def one(x):
            return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)

        if cfg.vae:
            encode = lambda m, x: m.vae.encode(x.astype(jnp.float32)).mean  # noqa: E731
            forward = rows * flops.of_function(self, encode, one(batch.image))
            found.append(Work("autoencoder", forward, "", 0))
        features = batch.features
        if features is None:
            forward = rows * flops.of_function(self, lambda m, x: m.vision(x), one(batch.pixels))
            found.append(Work("tower", forward, "", 0))
            features = nnx.eval_shape(lambda m, x: m.vision(x), self, one(batch.pixels))
        project = lambda m, x: m.context(x)  # noqa: E731
        forward = rows * flops.of_function(self, project, one(features))
        found.append(Work("projector", forward, "projector"))
        context = nnx.eval_shape(project, self, one(features))
        side = cfg.sample_side
        x = jax.ShapeDtypeStruct((1, side, side, cfg.sample_channels), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.int32)
        forward = rows * flops.of_function(self, lambda m, *a: m.denoise(*a), x, t, context)
        again = forward if getattr(cfg.denoiser, "remat", False) else 0.0
        found.append(Work("denoiser", forward, "denoiser", 1, again))
        return tuple(found)


def _valid(batch: DecoderBatch):
    """float32[B], 0 where a short batch was filled up."""
    if batch.valid is None:
        return jnp.ones((batch.image.shape[0],), jnp.float32)
    return jnp.asarray(batch.valid, jnp.float32)


# ---- the stage, as the train loop wants it


@dataclasses.dataclass(frozen=True)
class Config:
    """The model part of a decoder config.

    Attributes:
        decoder: structure and loss.
        vision: what makes the visual tokens.
        sd_weights: folder or "hf:OWNER/NAME" with unet/ and vae/ of Stable Diffusion, or "random".
        unet_from_scratch: take only the autoencoder from there.
        weights: "workdir:PATH" of an earlier decoder stage, "" for none.
        with_tower: run the tower on pixels; else features come from the cache.
        lora: adapters in place of the whole denoiser, see `DecoderLora`; None: no adapters.
    """

    decoder: DecoderConfig = DecoderConfig()
    vision: VisionConfig = VisionConfig()
    sd_weights: str = "random"
    unet_from_scratch: bool = False
    weights: str = ""
    with_tower: bool = False
    lora: DecoderLora | None = None


@dataclasses.dataclass(frozen=True)
class Data(InputConfig):
    """Input of the decoder stage: all images of some LLaVA files, shuffled without end.

    Attributes:
        predicted: file of visual tokens that a language model predicted (`data/predicted.py`), ""
            for none.
        predicted_share: share of the images for which those are used, where there are some.
        memory_gib: decoded images are kept in memory if they fit into this.
    """

    predicted: str = ""
    predicted_share: float = 0.5
    memory_gib: float = 2.0


def create(cfg: Config, rngs: nnx.Rngs) -> DecoderRecipe:
    """A model with random weights; works under `nnx.eval_shape`."""
    width = cfg.vision.feature_shape[1]
    if width != cfg.decoder.projector.input_dim:
        raise ConfigError(
            f"config.model.decoder.projector.input_dim is {cfg.decoder.projector.input_dim}, the "
            f"visual tokens of config.model.vision are {width} wide"
        )
    vision = VisionEncoder(cfg.vision, rngs=rngs) if cfg.with_tower else None
    return DecoderRecipe(cfg.decoder, rngs, vision, cfg.lora)


def load_pretrained(model: DecoderRecipe, cfg: Config) -> None:
    """Fills the model in place as the weight specs of the config say."""
    _fill(model, cfg)
    if cfg.lora is not None and cfg.lora.weights:
        from metamorph_jax.convert.peft import load_peft

        load_peft(model.denoiser, cfg.lora.weights)


def _fill(model: DecoderRecipe, cfg: Config) -> None:
    from metamorph_jax.convert import load
    from metamorph_jax.convert.vision import load_vision

    if cfg.weights.startswith(load.WORKDIR):
        load.load_workdir(model, cfg.weights.removeprefix(load.WORKDIR))
        if cfg.with_tower and is_open(model.vision):
            load_vision(model.vision, cfg.vision)  # the earlier stage had its features cached
        return
    if cfg.with_tower:
        load_vision(model.vision, cfg.vision)
    if cfg.sd_weights == "random":
        return
    from metamorph_jax.convert import diffusion, hf

    folder = hf.find(cfg.sd_weights)
    if not cfg.unet_from_scratch:
        _same(cfg.decoder.denoiser, folder / "unet", diffusion.unet_from_hf, "denoiser")
        diffusion.load_unet(model.denoiser, hf.Tensors(folder / "unet"))
    if cfg.decoder.vae:
        _same(cfg.decoder.vae, folder / "vae", diffusion.vae_from_hf, "vae")
        diffusion.load_vae(model.vae, hf.Tensors(folder / "vae"))


def _same(ours, folder, read, part: str) -> None:
    """Weights of another number of heads or groups would fit, and draw nonsense: an error."""
    from metamorph_jax.convert import hf

    theirs = vars(read(hf.read_config(folder)))
    free = ("dtype", "sample_size", "upcast_attention")
    wrong = [
        f"{name} is {value!r}, in {folder / 'config.json'} {theirs[name]!r}"
        for name, value in vars(ours).items()
        if name not in free and value != theirs.get(name)
    ]
    if wrong:
        raise ConfigError(f"config.model.decoder.{part}: " + "; ".join(wrong))


def initialize(model: DecoderRecipe, batches: list[DecoderBatch]) -> None:
    """Measures the standardisation of features and pictures before the first step."""
    features = np.concatenate([np.asarray(model.features(b)) for b in batches])
    model.set_statistics(features, np.concatenate([np.asarray(b.image) for b in batches]))


def open_data(data: Data, cfg: Config, shard: Shard):
    """An iterator of `DecoderBatch`; a feature cache is filled first with what is missing in it."""
    from metamorph_jax.convert.vision import feature_function, input_spec
    from metamorph_jax.data import images, pipeline
    from metamorph_jax.data.decoder_pairs import DecoderPairs
    from metamorph_jax.data.predicted import Predicted

    cached = bool(data.cache.features)
    if not (cfg.with_tower or cached):
        raise ConfigError("without config.model.with_tower, config.data.cache.features must be set")
    spec, sources = input_spec(cfg.vision), pipeline.open_sources(data, KINDS)
    if cached and spec.tower:
        tower = functools.partial(feature_function, cfg.vision)
        pipeline.fill_feature_cache(data, spec, sources, tower)
    side = cfg.decoder.image_side
    pairs = DecoderPairs(
        list(pipeline.all_refs(data, sources)),
        images.Preprocess(side, "crop", side, "bilinear"),
        shard,
        data.order.seed,
        pipeline.open_cache(data, spec) if cached else None,
        None if cached else data.images.change(spec.views).preprocess,
        int(data.memory_gib * 2**30),
        data.reading.threads,
        predicted=Predicted(data.predicted) if data.predicted else None,
        predicted_share=data.predicted_share,
    )
    pairs.sources, pairs.skipped = pipeline.source_names(data), pairs.counts
    return pairs


def batch_spec(data: Data, cfg: Config, rows: int) -> DecoderBatch:
    """Shapes of a batch of so many images, from the configs alone."""
    from metamorph_jax.convert.vision import input_spec

    spec, cached = input_spec(cfg.vision), bool(data.cache.features)
    side, seen = cfg.decoder.image_side, data.images.change(spec.views).preprocess.size
    return DecoderBatch(
        jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8),
        jax.ShapeDtypeStruct((rows, *spec.feature_shape), jnp.float32) if cached else None,
        None if cached else jax.ShapeDtypeStruct((rows, seen, seen, 3), jnp.uint8),
        jax.ShapeDtypeStruct((rows,), bool),
    )


def generator(model, cfg, data, **options):
    """None: it draws what other recipes' generators predict."""
    return None
