"""Options of a LLaVA model."""

import dataclasses

from metamorph_jax.config import check_known
from metamorph_jax.convert import specs
from metamorph_jax.data.chat import Markers
from metamorph_jax.models.connectors.mlp import linear_widths
from metamorph_jax.models.llm import llama
from metamorph_jax.models.lora import LoraConfig
from metamorph_jax.models.vision.encoder import DTYPES, VisionConfig
from metamorph_jax.nn import quantized

IMAGE_MODES = ("tower", "square", "crop", "pad", "anyres")
MERGES = ("flat", "spatial", "spatial_unpad")
GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
START_TOKEN, END_TOKEN = "<im_start>", "<im_end>"


@dataclasses.dataclass(frozen=True)
class Config:
    """The model part of a LLaVA config; the defaults are those of LLaVA 1.5 7B.

    Attributes:
        llm: a name in `llama.SIZES`, or "auto": as the config beside `llm_weights` says.
        llm_options: fields of LlamaConfig to change.
        llm_weights: "random", "pkg:NAME", "hf:OWNER/NAME", or a folder.
        vision: how a view becomes visual tokens.
        weights: the whole model from a LLaVA checkpoint ("hf:…" or a folder) or from an earlier
            stage ("workdir:PATH"); "" for none. Takes the place of `llm_weights`,
            `connector_weights` and, where the checkpoint has a tower, of `vision.weights`.
        connector_weights: a projector to start from ("hf:…", a folder, or a file such as
            mm_projector.bin); "" for none.
        tokenizer: "" is the one that belongs to `llm_weights`.
        connector: one of the kinds of `connectors/mlp.py`.
        image_mode: how an image becomes the square that the tower sees: "tower", as the tower's
            own preprocessing does; "crop" cuts the centre out; "pad" pads with the mean colour;
            "square" stretches; "anyres" takes the whole image and tiles of it at a higher
            resolution (`data/views.py`).
        grids: for "anyres": (width, height) in pixels of the canvases that are cut into tiles,
            multiples of the tower's side.
        merge: how tokens of the views follow one another: "flat", view by view; "spatial", tiles
            as one map of tokens; "spatial_unpad", that map without the padding and with the newline
            vector after every row (and after the tokens of an image that has a single view).
        start_end: put a start and an end token around every image: two rows that are added to the
            token tables, each the mean of the others at first.
        image_token: id that stands for an image in the checkpoints of transformers, where their
            tables have a row for it; -1: none. It is never read.
        text_chunk: positions multiplied with the output table at a time.
        trained_tokens: which rows of the token tables the instruction stage trains: "all", "added"
            (start and end of an image) or "none".
        train_tower: the instruction stage trains the tower, too.
        lora: adapters, see `LoraConfig`; a stage then trains, of all that it would train, the
            adapters and what `lora.train` names. None: no adapters.
        frozen_weights: "none", or how the kernels of the llm's layers are packed ("int8", "nf4",
            "nf4_double", see `nn/quantized.py`). They can't be trained then: use it with `lora`.
        dtype: that the language model and connector compute in.
        remat: of the language model, see `llama.REMAT`.
    """

    llm: str = "vicuna-7b"
    llm_options: dict = dataclasses.field(default_factory=dict)
    llm_weights: str = "random"
    vision: VisionConfig = VisionConfig("clip-l-336", tokens=576, normalize=False)
    weights: str = ""
    connector_weights: str = ""
    tokenizer: str = ""
    connector: str = "mlp2x_gelu"
    image_mode: str = "pad"
    grids: tuple[tuple[int, int], ...] = GRIDS
    merge: str = "flat"
    start_end: bool = False
    image_token: int = -1
    text_chunk: int = 512
    trained_tokens: str = "all"
    train_tower: bool = False
    lora: LoraConfig | None = None
    frozen_weights: str = "none"
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        check_known("llm", self.llm, ("auto", *llama.SIZES))
        check_known("image_mode", self.image_mode, IMAGE_MODES)
        check_known("merge", self.merge, MERGES)
        check_known("trained_tokens", self.trained_tokens, ("none", "added", "all"))
        check_known("frozen_weights", self.frozen_weights, ("none", *quantized.METHODS))
        check_known("dtype", self.dtype, DTYPES)
        check_known("remat", self.remat, llama.REMAT)
        linear_widths(self.connector, 1, 1)  # raises for an unknown connector
        if self.llm != "auto":
            llm_config(self)  # raises for wrong llm_options
        if self.text_chunk < 1:
            raise ValueError(f"text_chunk must be at least 1, not {self.text_chunk}")

    @property
    def newline(self) -> bool:
        """Whether the model has a newline vector."""
        return self.merge == "spatial_unpad"


def llm_config(cfg: Config) -> llama.LlamaConfig:
    """The structure of the language model, with the rows that are added to its tables."""
    added = {"added_tokens": 2 if cfg.start_end else 0}
    changes = added | {"dtype": cfg.dtype, "remat": cfg.remat} | cfg.llm_options
    return specs.llm_config(cfg.llm, cfg.llm_weights, changes)


def markers(cfg: Config) -> Markers:
    """Start and end token around an image, if there are any: the first two of the added ids."""
    if not cfg.start_end:
        return Markers()
    start = llm_config(cfg).vocab_size
    return Markers((start,), (start + 1,))


def added_names(cfg: Config) -> list[str]:
    """Names in the tokenizer of the rows that are added to the token tables."""
    names = [START_TOKEN, END_TOKEN] if cfg.start_end else []
    return [*names, "<image>"][: llm_config(cfg).added_tokens]
