"""Options of a MetaMorph model, and the sizes of its parts that follow from them."""

import dataclasses

from metamorph_jax import losses
from metamorph_jax.config import check_known
from metamorph_jax.convert import specs
from metamorph_jax.models.connectors.mlp import linear_widths
from metamorph_jax.models.heads.visual_flow import FlowConfig
from metamorph_jax.models.heads.visual_regression import HIDDEN_LAYERS
from metamorph_jax.models.llm import llama
from metamorph_jax.models.lora import LoraConfig
from metamorph_jax.models.vision.encoder import DTYPES, VisionConfig
from metamorph_jax.nn import quantized


@dataclasses.dataclass(frozen=True)
class Config:
    """The model part of a MetaMorph config.

    Attributes:
        llm: a name in `llama.SIZES`, or "auto": as the config beside `llm_weights` says.
        llm_options: fields of LlamaConfig to change.
        llm_weights: "random", "pkg:NAME", "hf:OWNER/NAME", or a folder.
        vision: how images become visual tokens.
        weights: the whole model from a MetaMorph checkpoint ("hf:…" or a folder) or from an earlier
            stage ("workdir:PATH"); "" for none. Takes the place of `llm_weights` and
            `vision.weights`.
        tokenizer: "" is the one that belongs to `llm_weights`.
        connector, head: kinds of `connectors/mlp.py` and `heads/visual_regression.py`; head "flow"
            for one that samples visual tokens (`heads/visual_flow.py`), "none" for a model that
            reads images only (LLaVA).
        flow: of the head "flow".
        visual_loss: of heads that regress: "auto" (cosine; L1 if features aren't normalised;
            softmax cross-entropy if they are distributions) or one of `losses.VISUAL_LOSSES`.
        visual_coef, use_vision_ar: weight of the visual loss; without the latter it is only logged.
        visual_dropout: share of answer images whose visual tokens are hidden from the input, all
            of them or some, see `hidden_tokens` (targets stay). A model that reads true tokens
            can continue an image without heeding the request; when it draws, it has none.
        text_chunk: positions multiplied with the output table at a time.
        max_visual_targets: most positions of a row that predict visual tokens; the head is
            evaluated at that many. 0: at all positions. No row is packed with more, and a sample
            with more is skipped; a batch from elsewhere that has more gives NaN.
        connector_tokens, vpit_tokens: which rows of the token tables a stage trains: "added"
            (start and end of an image), "all" or "none". In the connector stage only input rows.
        train_tower: the VPiT stage trains the tower, too.
        lora: adapters, see `LoraConfig`; a stage then trains, of all that it would train, the
            adapters and what `lora.train` names. None: no adapters.
        frozen_weights: "none", or how the kernels of the llm's layers are packed ("int8", "nf4",
            "nf4_double", see `nn/quantized.py`). They can't be trained then: use it with `lora`.
        dtype: that the language model, connector and head compute in.
        remat: of the language model, see `llama.REMAT`.
    """

    llm: str = "llama3.1-8b"
    llm_options: dict = dataclasses.field(default_factory=dict)
    llm_weights: str = "random"
    vision: VisionConfig = VisionConfig()
    weights: str = ""
    tokenizer: str = ""
    connector: str = "mlp2x_gelu"
    head: str = "mlp"
    flow: FlowConfig = FlowConfig()
    visual_loss: str = "auto"
    visual_coef: float = 1.0
    use_vision_ar: bool = True
    visual_dropout: float = 0.0
    text_chunk: int = 512
    max_visual_targets: int = 0
    connector_tokens: str = "added"
    vpit_tokens: str = "all"
    train_tower: bool = False
    lora: LoraConfig | None = None
    frozen_weights: str = "none"
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        check_known("llm", self.llm, ("auto", *llama.SIZES))
        check_known("visual_loss", self.visual_loss, ("auto", *losses.VISUAL_LOSSES))
        check_known("connector_tokens", self.connector_tokens, ("none", "added", "all"))
        check_known("vpit_tokens", self.vpit_tokens, ("none", "added", "all"))
        check_known("frozen_weights", self.frozen_weights, ("none", *quantized.METHODS))
        check_known("head", self.head, ("none", "flow", *HIDDEN_LAYERS))
        check_known("dtype", self.dtype, DTYPES)
        check_known("remat", self.remat, llama.REMAT)
        linear_widths(self.connector, 1, 1)  # raises for an unknown connector
        if self.llm != "auto":
            llm_config(self)  # raises for wrong llm_options
        if not 0 <= self.visual_dropout <= 1:
            raise ValueError(f"visual_dropout {self.visual_dropout} is not between 0 and 1")
        if self.text_chunk < 1:
            raise ValueError(f"text_chunk must be at least 1, not {self.text_chunk}")
        if self.max_visual_targets < 0:
            raise ValueError(f"max_visual_targets {self.max_visual_targets} is negative")

    @property
    def loss_kind(self) -> str:
        if self.visual_loss != "auto":
            return self.visual_loss
        if self.vision.softmax:
            return "softmax_ce"
        return "cosine" if self.vision.normalize else "l1"


def llm_config(cfg: Config) -> llama.LlamaConfig:
    changes = {"added_tokens": 2, "dtype": cfg.dtype, "remat": cfg.remat, **cfg.llm_options}
    return specs.llm_config(cfg.llm, cfg.llm_weights, changes)
