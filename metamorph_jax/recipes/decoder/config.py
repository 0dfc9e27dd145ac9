"""Options of a decoder, and of the data it trains on."""

import dataclasses

from metamorph_jax.data.config import InputConfig
from metamorph_jax.models import lora
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.dit import DiTConfig
from metamorph_jax.models.diffusion.projector import ProjectorConfig
from metamorph_jax.models.diffusion.samplers import SamplingConfig
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.vision.encoder import VisionConfig


@dataclasses.dataclass(frozen=True)
class DecoderLora(lora.LoraConfig):
    """Adapters of the denoiser, see `LoraConfig`; the projector stays trained in full.

    `weights` are PEFT's of a UNet.
    """

    target: str = r"decoder\.denoiser\..*attn[12]\.(to_[qkv]|to_out\.0)"
    train: str = r"projector\..*"


@dataclasses.dataclass(frozen=True)
class Config:
    """The model part of a decoder config.

    Attributes:
        vision: what makes the visual tokens.
        projector: from visual tokens to the denoiser's context.
        decoder: denoiser, autoencoder, schedule and loss.
        sampling: how images are drawn unless asked otherwise.
        context_length: zero tokens are appended to the context up to this length; 0 for none.
        drop_context: probability that an image is trained without its condition.
        feature_noise: standardised features are trained with normal noise of a strength drawn from
            0 up to this: what a language model predicts is never exactly a tower's feature.
        sd_weights: folder or "hf:OWNER/NAME" with unet/ and vae/ of Stable Diffusion, or "random".
        unet_from_scratch: take only the autoencoder from there.
        weights: "workdir:PATH" of an earlier decoder stage; or a folder with the files of
            MetaMorph's public decoder, which take the place of the UNet in `sd_weights`; "" for
            none.
        with_tower: run the tower on pixels; else features come from the cache.
        lora: adapters in place of the whole denoiser, see `DecoderLora`; None: no adapters.

    Raises:
        ValueError: sizes of vision, projector and denoiser don't match.
    """

    vision: VisionConfig = VisionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    decoder: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    context_length: int = 77
    drop_context: float = 0.1
    feature_noise: float = 0.0
    sd_weights: str = "random"
    unet_from_scratch: bool = False
    weights: str = ""
    with_tower: bool = False
    lora: DecoderLora | None = None

    def __post_init__(self):
        width = self.vision.feature_shape[1]
        if width != self.projector.input_dim:
            raise ValueError(
                f"projector.input_dim is {self.projector.input_dim}, the visual tokens of vision "
                f"are {width} wide"
            )
        if self.projector.output_dim != self.decoder.denoiser.cross_attention_dim:
            raise ValueError(
                f"projector.output_dim={self.projector.output_dim} must equal"
                f" decoder.denoiser.cross_attention_dim={self.decoder.denoiser.cross_attention_dim}"
            )


def pixels(features: int, tokens: int, side: int = 64, width: int = 256, **changes) -> Config:
    """A transformer on `side` x `side` pixels: for small images and the quick start.

    Velocity prediction with a terminal SNR of zero: sampling starts from what training saw at
    the last step, so nearly white images come out white.

    Args:
        features, tokens: C and P of the visual tokens, which come from a cache.
        changes: other fields of `Config`.
    """
    denoiser = DiTConfig(
        sample_size=side, patch=max(side // 8, 1), width=width, depth=6, num_heads=width // 64,
        cross_attention_dim=width, num_context=tokens,
    )  # fmt: skip
    schedule = Schedule(prediction_type="v_prediction", zero_snr=True)
    parts = dict(
        vision=VisionConfig("none", feature_width=features, tokens=tokens),
        projector=ProjectorConfig(input_dim=features, hidden_dim=width, output_dim=width),
        decoder=DiffusionConfig(denoiser, None, schedule),
        context_length=0,
    )
    return Config(**(parts | changes))


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
