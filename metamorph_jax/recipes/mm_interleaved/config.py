"""Options of an MM-Interleaved model, and the sizes of its parts that follow from them."""

import dataclasses

from metamorph_jax.config import check_known, replaced
from metamorph_jax.convert import specs
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.samplers import SamplingConfig
from metamorph_jax.models.diffusion.unet_mmfs import UNetMMFSConfig
from metamorph_jax.models.heads.context import ContextConfig
from metamorph_jax.models.llm import llama
from metamorph_jax.models.mmfs import MMFSConfig
from metamorph_jax.models.vision import vit, vit_adapter
from metamorph_jax.models.vision.encoder import DTYPES, VisionConfig
from metamorph_jax.models.vision.vit_adapter import AdapterConfig

SOI, PLACEHOLDER = "<|startofimage|>", "<|image|>"  # the two rows added to the token tables


@dataclasses.dataclass(frozen=True)
class VisualConfig:
    """The visual tokenizer: a tower with its adapter, and a resampler.

    Attributes:
        tower: a name in `vit.SIZES`; all of its layers are run, and its class token is read.
        tower_options: fields of `ViTConfig` to change.
        weights: of the tower: "random", "pkg:NAME", "hf:OWNER/NAME", or a folder.
        adapter: what is built around the tower.
        resampler: from the tower's tokens to visual tokens; its `key_width` is the tower's width.
        table_side: of the grid that the sin-cos tables of tokens and maps are defined on.
        dtype: that tower and adapter compute in.
        remat: recompute layers of tower and adapter in the backward pass, which goes through the
            tower even where it is frozen.
    """

    tower: str = "clip-l-224"
    tower_options: dict = dataclasses.field(default_factory=lambda: {"select_layer": -1})
    weights: str = "random"
    adapter: AdapterConfig = AdapterConfig(star_offsets=True)
    resampler: PerceiverConfig = PerceiverConfig(dropout=0.1)
    table_side: int = 16
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        check_known("tower", self.tower, vit.SIZES)
        check_known("dtype", self.dtype, DTYPES)
        if self.table_side < 1:
            raise ValueError(f"vision.table_side must be at least 1, not {self.table_side}")
        if self.resampler.key_width != self.vit.width:
            raise ValueError(
                f"resampler.key_width is {self.resampler.key_width}, but {self.tower} is "
                f"{self.vit.width} wide"
            )

    @property
    def vit(self) -> vit.ViTConfig:
        """The tower's own config."""
        changes = {"dtype": self.dtype, "remat": self.remat, **self.tower_options}
        return replaced(vit.SIZES[self.tower], changes, "tower_options")

    @property
    def tokens(self) -> int:
        """P, visual tokens of an image."""
        return self.resampler.queries

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the four maps, finest first."""
        return vit_adapter.sides(self.vit.grid)

    @property
    def encoder(self) -> VisionConfig:
        """What is needed to read the tower's weights, and to prepare images as they ask for."""
        options = dict(self.tower_options)
        return VisionConfig(self.tower, options, self.weights, tokens=-1, dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class InsertConfig:
    """MMFS inside the language model.

    Attributes:
        every: layers 0, every, 2 * every, … have a module.
        heads, points: see `MMFSConfig`.
        ratio: width of the sampled values over that of the language model.
        levels: how many of the maps are sampled, from the coarsest.
        base: side of the grid in whose cells offsets are measured; 0: that of the tower's patches.
        relative_rows: one more than the most images that a position may see.
        recent: a position samples at most so many of the images before it; 0: all of them.
        method: of `nn.deformable.sample`.
    """

    every: int = 4
    heads: int = 16
    points: int = 8
    ratio: float = 0.2
    levels: int = 3
    base: int = 0
    relative_rows: int = 50
    recent: int = 0
    method: str = "auto"

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"insert.every must be at least 1, not {self.every}")
        if not 1 <= self.levels <= vit_adapter.STAGES:
            raise ValueError(f"insert.levels is {self.levels}: expected 1 to {vit_adapter.STAGES}")
        if self.base < 0:
            raise ValueError(f"insert.base must not be negative, not {self.base}")


@dataclasses.dataclass(frozen=True)
class Config:
    """The model part of an MM-Interleaved config; the defaults are those of the 13B model.

    Attributes:
        llm: a name in `llama.SIZES`, or "auto": as the config beside `llm_weights` says.
        llm_options: fields of LlamaConfig to change.
        llm_weights: "random", "pkg:NAME", "hf:OWNER/NAME", or a folder.
        vision: the visual tokenizer.
        insert: MMFS inside the language model.
        context: from states of the language model to the context of the image decoder.
        decoder: denoiser, autoencoder, schedule and loss.
        sampling: how images are drawn unless asked otherwise.
        weights: the whole model from a checkpoint ("hf:…" or a folder) or from an earlier stage
            ("workdir:PATH"); "" for none. Takes the place of the parts' weights.
        sd_weights: folder or "hf:OWNER/NAME" with unet/ and vae/ of Stable Diffusion, or "random";
            where it has a text_encoder/, the null condition starts as that of the empty prompt.
        tokenizer: "" is the one that belongs to `llm_weights`.
        text_coef, image_coef: weights of the two losses.
        image_mean: what the image loss is a mean over: "images", all that the rows hold, as in the
            reference; "drawings", those that are drawn.
        max_drawings: K, images of a row that are drawn; a sample of more is skipped. 0: images are
            only read, there is no image loss, and what draws them is not trained.
        drop_context: probability that an image is trained with the null condition.
        images_before: how many images before it, in its document, an image is drawn from.
        document_bos: id that begins a document inside of a segment, for rows in which documents
            share one, as the reference's do; -1: a segment is one document.
        text_chunk: positions multiplied with the output table at a time.
        train_llm: the stage "sft" trains the language model's layers, too.
        train_tower: the stages train the tower, too.
        dtype: that the language model computes in.
        frozen_dtype: that frozen weights of language model and tower are kept in; "auto": the one
            they are computed in.
        remat: of the language model, see `llama.REMAT`.
    """

    llm: str = "vicuna-13b"
    llm_options: dict = dataclasses.field(
        default_factory=lambda: {"norm_eps": 1e-6, "max_positions": 2048}
    )
    llm_weights: str = "random"
    vision: VisualConfig = VisualConfig()
    insert: InsertConfig = InsertConfig()
    context: ContextConfig = ContextConfig()
    decoder: DiffusionConfig = DiffusionConfig(UNetMMFSConfig())
    sampling: SamplingConfig = SamplingConfig("ddpm", 30, 7.5)
    weights: str = ""
    sd_weights: str = "random"
    tokenizer: str = ""
    text_coef: float = 1.0
    image_coef: float = 10.0
    image_mean: str = "images"
    max_drawings: int = 4
    drop_context: float = 0.1
    images_before: int = 1
    document_bos: int = -1
    text_chunk: int = 512
    train_llm: bool = False
    train_tower: bool = False
    dtype: str = "float32"
    frozen_dtype: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        check_known("llm", self.llm, ("auto", *llama.SIZES))
        check_known("image_mean", self.image_mean, ("images", "drawings"))
        check_known("dtype", self.dtype, DTYPES)
        check_known("frozen_dtype", self.frozen_dtype, ("auto", *DTYPES))
        check_known("remat", self.remat, llama.REMAT)
        for name, least in (("max_drawings", 0), ("images_before", 1), ("text_chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.drop_context <= 1:
            raise ValueError(f"drop_context {self.drop_context} is not between 0 and 1")
        self._check_widths()
        if self.llm != "auto":
            insert_config(self)  # raises for wrong llm_options, and widths that don't divide

    def _check_widths(self) -> None:
        """Raises ValueError where neighbouring parts don't fit together."""
        if not isinstance(self.decoder.denoiser, UNetMMFSConfig):
            raise ValueError("decoder.denoiser must be a UNetMMFSConfig")
        if self.images_before >= self.decoder.denoiser.relative_rows:
            raise ValueError(
                f"images_before is {self.images_before}, but decoder.denoiser.relative_rows "
                f"{self.decoder.denoiser.relative_rows} is enough for one image less than that"
            )
        fitting = [
            ("context.resampler.width", self.context.resampler.width,
             "decoder.denoiser.cross_attention_dim", self.decoder.denoiser.cross_attention_dim),
            ("decoder.denoiser.value_width", self.decoder.denoiser.value_width,
             "the width of vision.tower", self.vision.vit.width),
            ("the number of decoder.denoiser.sides", len(self.decoder.denoiser.sides),
             "that of its maps", vit_adapter.STAGES),
        ]  # fmt: skip
        if self.llm != "auto":
            width = llm_config(self).width
            fitting.append(("context.width", self.context.width, "the width of llm", width))
        for name, found, other, wanted in fitting:
            if found != wanted:
                raise ValueError(f"{name} is {found}, {other} is {wanted}")


def llm_config(cfg: Config) -> llama.LlamaConfig:
    """The structure of the language model, with rows for `soi` and the placeholder of images.

    An output table of its own gets biases: those of the added rows are trained.
    """
    changes = {"added_tokens": 2, "dtype": cfg.dtype, "remat": cfg.remat, **cfg.llm_options}
    found = specs.llm_config(cfg.llm, cfg.llm_weights, changes)
    return found if found.tied else dataclasses.replace(found, head_bias=True)


def insert_config(cfg: Config) -> MMFSConfig:
    """MMFS of one layer of the language model."""
    own, tower, width = cfg.insert, cfg.vision.vit, llm_config(cfg).width
    return MMFSConfig(
        width=width,
        value_width=tower.width,
        out_width=width,
        inner_width=round(own.ratio * width),
        heads=own.heads,
        points=own.points,
        sides=cfg.vision.sides[-own.levels :],
        base=own.base or tower.grid,
        relative_rows=own.relative_rows,
        recent=own.recent,
        method=own.method,
        dtype=cfg.dtype,
    )
