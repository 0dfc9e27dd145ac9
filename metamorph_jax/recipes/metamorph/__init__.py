"""MetaMorph (Tong et al. 2024, arXiv 2412.14164): a language model that reads and predicts
visual tokens (VPiT, visual-predictive instruction tuning).

    image ─── vision encoder ─ P tokens ──┬─ connector ─┐
                                          │             ├─ llm ─ hidden ─┬─ output table: text loss
    text ─ embedding table ───────────────│─────────────┘                └─ head: next visual token,
                                          └────────── detached target ──────── minus cosine

The state at position p predicts what stands at p + 1, for both kinds of tokens.

Where we differ from the public code (each is an option or a fix): no NaN for batches without
targets, shapes that don't fit raise, every head gives the feature width, the connector stage trains
only the two new rows of the input table (`connector_tokens = "all"` trains all of it).

    config.py    the options
    model.py     the parts put together; losses; what each stage trains
    weights.py   pretrained weights, tokenizer, the start of the connector
    published.py the checkpoints of the public implementation, and what we write
    input.py     batches from data files, feature caches
    sources.py   kinds of records of its own, with their wordings in wordings.py
    decoding.py  how it writes text and visual tokens
"""

from metamorph_jax.data.config import DataConfig as Data
from metamorph_jax.recipes.metamorph import published
from metamorph_jax.recipes.metamorph.config import Config, llm_config
from metamorph_jax.recipes.metamorph.decoding import generator, show
from metamorph_jax.recipes.metamorph.input import batch_spec, input_spec, open_data
from metamorph_jax.recipes.metamorph.model import STAGES, MetaMorph, create
from metamorph_jax.recipes.metamorph.published import load_tokenizer
from metamorph_jax.recipes.metamorph.sources import KINDS
from metamorph_jax.recipes.metamorph.weights import initialize, load_pretrained

FAMILIES = (published.RUN, published.FAMILY)

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
    "MetaMorph",
    "input_spec",
    "llm_config",
    "load_tokenizer",
]
