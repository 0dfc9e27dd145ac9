"""LLaVA 1.0, 1.5 and 1.6 (Liu et al. 2023 and 2024, arXiv 2304.08485 and 2310.03744): a language
model that reads images.

    image ── views ── tower ── P tokens each ── connector ──┐
                                                            ├─ llm ── output table: text loss
    text ── embedding table ────────────────────────────────┘

An image has one view, or with "anyres" (1.6) several: the whole image and tiles of it, whose rows
of tokens end with a newline vector. Stage `connector` trains connector and newline, `instruct` the
language model, too, or adapters in it, and the tower if asked to.

Where we differ from the public code: images stay where the conversation has them (`<image>` is not
moved to the front); rows are packed, so that text-only samples cost no view; anyres can be trained.

    config.py    the options
    input.py     batches from data files: views, tokenizer, feature caches
    model.py     the parts put together; loss; what each stage trains
    weights.py   pretrained weights, the start of the connector
    published.py checkpoints of LLaVA, read, written and compared; with
      keys.py      the names of their tensors      fields.py   their config.json
      projectors.py   files with a part of a model, and what lies beside adapters
    decoding.py  how it answers
    sources.py   kinds of records of its own
    scienceqa.py ScienceQA's files as rows to train on
"""

from metamorph_jax.data.config import DataConfig as Data
from metamorph_jax.recipes.llava.config import Config, llm_config, markers
from metamorph_jax.recipes.llava.decoding import generator, show
from metamorph_jax.recipes.llava.input import batch_spec, input_spec, load_tokenizer, open_data
from metamorph_jax.recipes.llava.model import STAGES, Llava, create
from metamorph_jax.recipes.llava.published import FAMILIES
from metamorph_jax.recipes.llava.sources import KINDS
from metamorph_jax.recipes.llava.weights import initialize, load_pretrained

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
    "Llava",
    "input_spec",
    "llm_config",
    "load_tokenizer",
    "markers",
]
