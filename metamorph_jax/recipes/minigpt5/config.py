"""Options of a MiniGPT-5 model, and the sizes of its parts that follow from them."""

import dataclasses

from metamorph_jax.config import check_known
from metamorph_jax.convert import specs
from metamorph_jax.models.connectors.qformer import QFormerConfig
from metamorph_jax.models.diffusion.clip_text import CLIPTextConfig
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.samplers import SamplingConfig
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.models.heads.mapper import MapperConfig
from metamorph_jax.models.llm import llama
from metamorph_jax.models.lora import LoraConfig
from metamorph_jax.models.prefix import PrefixConfig
from metamorph_jax.models.vision.encoder import DTYPES, VisionConfig

PLACEHOLDER = "<ImageHere>"  # stands for an image that is read; the last of the added rows

SD21 = DiffusionConfig(UNetConfig.sd21(), VAEConfig.sd21(), min_snr=5.0)
# The adapters of the stage "mls": of queries and values, in all layers.
LORA = LoraConfig(r"llm\.layers\.self_attn\.[qv]_proj", rank=8, alpha=16.0, dropout=0.05, train="")


@dataclasses.dataclass(frozen=True)
class Config:
    """The model part of a MiniGPT-5 config; the defaults are those of the 7B model in stage "uas".

    Attributes:
        llm: a name in `llama.SIZES`, or "auto": as the config beside `llm_weights` says.
        llm_options: fields of LlamaConfig to change.
        llm_weights: "random", "pkg:NAME", "hf:OWNER/NAME", or a folder.
        vision: tower of the images that are read; all of its tokens are kept.
        qformer: from the tower's tokens to visual tokens.
        qformer_weights: files, folders or "hf:OWNER/NAME" with the Q-Former and the norm before it
            (BLIP-2's `blip2_pretrained_flant5xxl.pth`) and the projection (MiniGPT-4's
            `prerained_minigpt4_7b.pth`, the published spelling), separated by a comma; or "random".
        mapper: from the states of vokens to the context of the image decoder.
        decoder: denoiser, autoencoder, schedule and loss.
        text_encoder: of the captions, for the caption loss; None for a model without.
        sampling: how images are drawn unless asked otherwise.
        weights: the whole model from a checkpoint ("hf:…" or a folder) or from an earlier stage
            ("workdir:PATH"); "" for none. Takes the place of the parts' weights. A file of what was
            trained (`…ckpt`) does not: it is read over them, see below.
        stage1_weights: a file of what stage 1 trained (`stage1_cc3m.ckpt`, or added rows and mapper
            alone), over all weights above; "" for none. One on the hub is "hf:OWNER/NAME/FILE".
        stage2_weights: a file of what stage 2 trained, over that of `stage1_weights`, without which
            a published one is not complete; it needs the same `lora`; "" for none.
        sd_weights: folder or "hf:OWNER/NAME" with unet/, vae/ and text_encoder/ of Stable
            Diffusion, or "random".
        tokenizer: "" is the one that belongs to `llm_weights`.
        caption_tokenizer: of the text encoder; "" is the one beside `sd_weights`.
        caption_pad: id that captions are padded with: 0 in Stable Diffusion 2, in 1 the end id.
        old_rows_shrink: what both tables of the language model are multiplied with, but for the
            added rows, where its own weights are loaded. The reference's weight decay acts on rows
            that it does not train: in stage 1 on CC3M, some 118,000 steps at 1e-5 on average with a
            decay of 0.01, they shrink to 0.988. 1 leaves them as they are.
        unsupervised_tail: vokens that are not learnt as text, those after the first. The reference
            learns the first and the last of its eight; 7 leaves the first alone.
        text_coef, image_coef, caption_coef: weights of the losses; with 0, one is not computed.
        drop_condition: probability that an image is trained with the null condition.
        max_drawings: J, images of a row that are drawn; a sample of more is skipped.
        text_chunk: positions multiplied with the output table at a time.
        train_fc: the stage "mls" trains all of the mapper, as it must where there was no stage
            "uas" before it.
        train_connector, train_denoiser: all stages train the Q-Former and its projection, or the
            denoiser, too, as they must where these are not pretrained.
        lora, prefix: what the stage "mls" adapts the language model with: adapters, or keys and
            values before all others; None: nothing.
        dtype: that language model and Q-Former compute in.
        frozen_dtype: that the matrices which no stage trains are kept in; "auto": `dtype`.
        remat: of the language model, see `llama.REMAT`.
    """

    llm: str = "vicuna-7b"
    llm_options: dict = dataclasses.field(
        default_factory=lambda: {"norm_eps": 1e-6, "max_positions": 2048}
    )
    llm_weights: str = "random"
    vision: VisionConfig = VisionConfig("eva-g-224", tokens=257, normalize=False)
    qformer: QFormerConfig = QFormerConfig()
    qformer_weights: str = "random"
    mapper: MapperConfig = MapperConfig()
    decoder: DiffusionConfig = SD21
    text_encoder: CLIPTextConfig | None = CLIPTextConfig.sd21(eos_token_id=49407)
    sampling: SamplingConfig = SamplingConfig("pndm", 50, 7.5)
    weights: str = ""
    stage1_weights: str = ""
    stage2_weights: str = ""
    sd_weights: str = "random"
    tokenizer: str = ""
    caption_tokenizer: str = ""
    caption_pad: int = 0
    old_rows_shrink: float = 1.0
    unsupervised_tail: int = 6
    text_coef: float = 0.01
    image_coef: float = 1.0
    caption_coef: float = 0.1
    drop_condition: float = 0.1
    max_drawings: int = 4
    text_chunk: int = 512
    train_fc: bool = False
    train_connector: bool = False
    train_denoiser: bool = False
    lora: LoraConfig | None = None
    prefix: PrefixConfig | None = None
    dtype: str = "float32"
    frozen_dtype: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        check_known("llm", self.llm, ("auto", *llama.SIZES))
        check_known("dtype", self.dtype, DTYPES)
        check_known("frozen_dtype", self.frozen_dtype, ("auto", *DTYPES))
        check_known("remat", self.remat, llama.REMAT)
        for name in ("max_drawings", "text_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("text_coef", "image_coef", "caption_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 < self.old_rows_shrink <= 1:
            raise ValueError(f"old_rows_shrink {self.old_rows_shrink} is not between 0 and 1")
        if not 0 <= self.drop_condition <= 1:
            raise ValueError(f"drop_condition {self.drop_condition} is not between 0 and 1")
        if not 0 <= self.unsupervised_tail < self.vokens:
            raise ValueError(
                f"unsupervised_tail is {self.unsupervised_tail}, but after the first there are "
                f"{self.vokens - 1} vokens"
            )
        self._check_widths()

    def _check_widths(self) -> None:
        """Raises ValueError where neighbouring parts don't fit together."""
        if self.vision.vit is None or self.vision.reduce.reduces or self.vision.normalize:
            raise ValueError(
                "vision must keep all of the tower's tokens as they are: set vision.tokens to "
                f"{'their number' if self.vision.vit is None else self.vision.vit.tokens} and "
                "vision.normalize to False"
            )
        context = self.decoder.denoiser.cross_attention_dim
        fitting = [
            ("qformer.resampler.key_width", self.qformer.resampler.key_width,
             "the width of vision.tower", self.vision.vit.width),
            ("mapper.inner", self.mapper.inner, "decoder.denoiser.cross_attention_dim", context),
        ]  # fmt: skip
        if self.llm != "auto":
            width = llm_config(self).width  # raises for wrong llm_options
            fitting.append(("mapper.width", self.mapper.width, "the width of llm", width))
        if self.learns_captions:
            text = self.text_encoder
            fitting += [
                ("text_encoder.hidden_size", text.hidden_size, "mapper.inner", self.mapper.inner),
                ("text_encoder.max_position_embeddings", text.max_position_embeddings,
                 "mapper.queries", self.mapper.queries),
            ]  # fmt: skip
        for name, found, other, wanted in fitting:
            if found != wanted:
                raise ValueError(f"{name} is {found}, {other} is {wanted}")

    @property
    def vokens(self) -> int:
        """Added tokens that one image is drawn from."""
        return self.mapper.vokens

    @property
    def learns_captions(self) -> bool:
        """Whether there is a caption loss, and a text encoder for it."""
        return self.text_encoder is not None and self.caption_coef > 0


def llm_config(cfg: Config) -> llama.LlamaConfig:
    """The structure of the language model, with rows for the vokens and the placeholder."""
    changes = {"added_tokens": cfg.vokens + 1, "dtype": cfg.dtype, "remat": cfg.remat}
    return specs.llm_config(cfg.llm, cfg.llm_weights, changes | cfg.llm_options)


def voken_ids(cfg: Config) -> tuple[int, ...]:
    """Ids of the vokens, in order."""
    first = llm_config(cfg).vocab_size
    return tuple(range(first, first + cfg.vokens))


def added_names(cfg: Config) -> list[str]:
    """Names in the tokenizer of the rows that are added to the token tables."""
    return [*(f"[IMG{n}]" for n in range(cfg.vokens)), PLACEHOLDER]


def is_trained_part(spec: str) -> bool:
    """Whether weights are a file of what was trained, and no whole model."""
    return spec.endswith((".ckpt", ".pt", ".pth", ".bin", ".safetensors"))
