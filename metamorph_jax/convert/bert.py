"""Sentence-BERT by its published names: `sentence-transformers/all-MiniLM-L6-v2` and its like.

Our modules have the names of transformers' BertModel; matrices are transposed. Dropped on purpose:
the pooler, which the mean of states does without, and position ids.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from metamorph_jax import files
from metamorph_jax.convert import library, names
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.bert import Bert, BertConfig

_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
           "num_attention_heads", "max_position_embeddings", "type_vocab_size",
           "layer_norm_eps")  # fmt: skip
_PREFIX = "bert."
_DROPPED = ("pooler.", "embeddings.position_ids")


def config_from_hf(fields: Mapping) -> BertConfig:
    """The config of a config.json.

    Raises:
        ConfigError: it is of something else than a BERT encoder with exact GELU.
    """
    if fields.get("model_type") != "bert":
        raise ConfigError(
            f"model_type {fields.get('model_type')!r} is not bert: expected a sentence encoder "
            "such as sentence-transformers/all-MiniLM-L6-v2"
        )
    found = library.resolved("bert", fields)
    if found["hidden_act"] != "gelu":
        raise ConfigError(f"hidden_act {found['hidden_act']!r}: expected gelu")
    return BertConfig(**{key: found[key] for key in _FIELDS})


def load_bert(model: Bert, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `model` in place from tensors by published name; anything else is an error."""
    prefix = _PREFIX if any(key.startswith(_PREFIX) for key in tensors) else ""
    names.load_torch_dict(model, tensors, prefix, ignore=lambda key: key.startswith(_DROPPED))


def longest(folder: pathlib.Path, cfg: BertConfig) -> int:
    """Most tokens of a sentence, as the folder of a sentence encoder says.

    Raises:
        ConfigError: its vectors are not the mean of the states.
    """
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        own = files.read_json(pooling, dict)
        modes = [key for key, value in own.items() if key.startswith("pooling_mode") and value]
        if modes != ["pooling_mode_mean_tokens"]:
            raise ConfigError(f"{files.shown(pooling)}: {', '.join(modes) or 'no pooling'}, "
                              "expected the mean of the states")  # fmt: skip
    length, own = cfg.max_position_embeddings, folder / "sentence_bert_config.json"
    if own.is_file():
        length = min(length, int(files.read_json(own, dict).get("max_seq_length") or length))
    return length
