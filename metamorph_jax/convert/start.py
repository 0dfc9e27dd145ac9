"""What a model of vision encoder, connector and language model starts from: an earlier stage, or
the weights of its parts."""

import sys
from collections.abc import Mapping

from metamorph_jax.convert import agree, load, names, specs
from metamorph_jax.convert.llama import EMBED, HEAD, disagreements, load_llama
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.models.build import is_open
from metamorph_jax.models.llm import llama
from metamorph_jax.models.vision.encoder import VisionConfig


def from_earlier_stage(model, vision: VisionConfig, spec: str) -> None:
    """Fills a model, in place, with what an earlier stage has trained.

    Args:
        model: with a `vision` encoder.
        vision: the encoder's config, for a tower that the earlier stage did not need.
        spec: "workdir:PATH".
    """
    load.load_workdir(model, spec.removeprefix(load.WORKDIR))
    if model.vision.tower is not None and is_open(model.vision.tower):
        load_vision(model.vision, vision)  # the earlier stage had its features cached


def load_llm(llm: llama.Llama, name: str, weights: str, cut: bool = False) -> None:
    """Fills a language model, in place; rows that are added to its tables start from the others.

    Args:
        name: `config.model.llm`.
        weights: `config.model.llm_weights`; nothing happens with "random".
        cut: token tables of the file may have more rows than the vocabulary, such as one for
            padding; these are left out, which is printed.

    Raises:
        ConfigError: the config beside the weights contradicts the model's.
    """
    if weights == specs.RANDOM:
        return
    if name != "auto" and specs.has_fields(weights):
        agree.require(
            weights,
            lambda: disagreements(llm.cfg, specs.llm_fields(weights)),
            advice='config.model.llm="auto" follows the checkpoint',
        )
    tensors = specs.llm_tensors(weights)
    load_llama(llm, _without_rows(llm.cfg, tensors, weights) if cut else tensors)
    if not is_open(llm.embed_tokens):  # else an earlier stage has trained the table
        llama.init_added_tokens(llm)


def _without_rows(cfg: llama.LlamaConfig, tensors: Mapping, spec: str) -> Mapping:
    """Tensors whose token tables end with the vocabulary, or with the tokens added to it."""
    rows = {key: names.shape_of(tensors, key)[0] for key in (EMBED, HEAD) if key in tensors}
    more = [key for key, n in rows.items() if n > cfg.vocab_size and n != cfg.tokens]
    for key in more:
        print(f"{spec}: of the {rows[key]} rows of {key}, those after {cfg.vocab_size} are left "
              "out", file=sys.stderr, flush=True)  # fmt: skip
    return names.Mapped(tensors, dict.fromkeys(more, lambda table: table[: cfg.vocab_size]))
