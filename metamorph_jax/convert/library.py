"""Configs as transformers understands them: its own classes read the fields of a config.json.

So a field that is absent has the default of its model type, and of two places that state the same
thing (`rope_theta` and `rope_parameters`) the one counts that counts there. Only classes of the
installed library are used; no code of a checkpoint is run.
"""

import copy
import logging
from collections.abc import Mapping

from metamorph_jax.errors import ConfigError

# Fields in which null is not the same as leaving them out.
_NULL = ("sliding_window",)


def resolved(kind: str, fields: Mapping) -> dict:
    """All fields of a model type's config, those of config.json and the defaults of the rest.

    `rope_parameters` of the result holds all that is known about rotary positions.

    Args:
        kind: a model type of transformers.
        fields: of a config.json.

    Raises:
        ConfigError: a field has a value of the wrong kind.
    """
    from transformers import CONFIG_MAPPING

    own = {k: copy.deepcopy(v) for k, v in fields.items() if v is not None or k in _NULL}
    if "num_key_value_heads" in fields:  # null: as many as heads, in every class
        own.setdefault("num_key_value_heads", own.get("num_attention_heads"))
    own = {k: v for k, v in own.items() if v is not None or k in _NULL}
    own.pop("model_type", None)
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # what it has to warn about is an error here
    try:
        config = CONFIG_MAPPING[kind].from_dict(own)
        return config.to_dict() | {"rope_parameters": getattr(config, "rope_parameters", None)}
    except Exception as error:  # the classes raise a dozen kinds for values of the wrong kind
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{kind} config: {reason}") from error
    finally:
        log.setLevel(level)
