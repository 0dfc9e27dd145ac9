"""MM-Interleaved (Tian et al. 2024, arXiv 2401.10208): a language model that reads images between
its texts and draws images there, trained end to end with the decoder that draws them.

    image ─ tower + adapter ─┬─ resampler ─ P tokens ─┐
                             │                        ├─ llm ─ states ─┬─ output table: text loss
    text ─ embedding table ──│────────────────────────┘   ↑            └─ resampler ─┐
                             └─ maps of four scales ─ MMFS┴─────────── MMFS ─ UNet ──┴─ image loss

An image is `soi` and its P tokens. It is drawn from the states of its document up to its `soi`, and
from the maps of the image before it; language model and tower stay frozen.

Where we differ from the public code: rows hold documents that don't see each other (`row.crossing`
and `document_bos` give the reference's rows), the adapter's sampling points start spread out
(`vision.adapter.star_offsets`), and a row draws at most `max_drawings` images.

    config.py    the options
    input.py     batches from data files: views, drawings, tokenizer
    visual.py    the visual tokenizer
    documents.py which images a position sees, and what a drawing is made from
    model.py     the parts put together; losses; what each stage trains
    weights.py   pretrained weights of the parts
    published.py the checkpoints of the public implementation, and what we write
    sources.py   kinds of records of its own
    decoding.py  how it writes text and draws
"""

from metamorph_jax.data.config import DataConfig as Data
from metamorph_jax.recipes.mm_interleaved.config import Config, llm_config
from metamorph_jax.recipes.mm_interleaved.decoding import generator, show
from metamorph_jax.recipes.mm_interleaved.input import (
    batch_spec,
    input_spec,
    load_tokenizer,
    open_data,
)
from metamorph_jax.recipes.mm_interleaved.model import STAGES, MMInterleaved, create
from metamorph_jax.recipes.mm_interleaved.published import FAMILIES
from metamorph_jax.recipes.mm_interleaved.sources import KINDS
from metamorph_jax.recipes.mm_interleaved.weights import initialize, load_pretrained

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
    "MMInterleaved",
    "input_spec",
    "llm_config",
    "load_tokenizer",
]
