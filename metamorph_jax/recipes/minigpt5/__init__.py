"""MiniGPT-5 (Zheng et al. 2023, arXiv 2310.02239): a language model draws by generative vokens.

    image ─ tower ─ Q-Former ─ P tokens ──┐
                                          ├─ llm ─ states ─┬─ output table: text loss
    text ─ embedding table ───────────────┘                └─ of vokens ─ mapper ─ UNet: image loss
                                                                            └─ caption loss

Vokens are tokens that are added to the vocabulary. Eight of them in a row stand for an image in an
answer; the states that predict them, through the mapper, take the place of a caption's features in
Stable Diffusion. Trained are their rows and the mapper (stage `uas`, on captions), then rows, the
mapper's transformer and adapters in the language model (stage `mls`, on stories or dialogues).
Gradients flow through UNet and language model, which stay frozen, as do tower and Q-Former.

Where we differ from the public code: only the new rows are parameters, so the old ones do not
decay; a sample may have several images to draw; losses are means over what is there, whatever
device it is on.

    config.py    the options
    input.py     batches from data files: views, drawings, tokenizer
    model.py     the parts put together; losses; what each stage trains
    weights.py   pretrained weights of the parts
    published.py how runs are written
    sources.py   kinds of records of its own
    decoding.py  how it writes text and draws
"""

from metamorph_jax.data.config import DataConfig as Data
from metamorph_jax.recipes.minigpt5.config import Config, llm_config, voken_ids
from metamorph_jax.recipes.minigpt5.decoding import generator, show
from metamorph_jax.recipes.minigpt5.input import (
    batch_spec,
    input_spec,
    load_tokenizer,
    open_data,
)
from metamorph_jax.recipes.minigpt5.model import STAGES, MiniGPT5, create
from metamorph_jax.recipes.minigpt5.published import FAMILIES
from metamorph_jax.recipes.minigpt5.sources import KINDS
from metamorph_jax.recipes.minigpt5.weights import initialize, load_pretrained

__all__ = [
    # What `recipe.Recipe` asks for.
    "Config",
    "Data",
    "FAMILIES",
    "KINDS",
    "STAGES",
    "batch_spec",
    "create",
    "generator",
    "initialize",
    "load_pretrained",
    "open_data",
    "show",
    # More.
    "MiniGPT5",
    "input_spec",
    "llm_config",
    "load_tokenizer",
    "voken_ids",
]
