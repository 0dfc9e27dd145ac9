"""Whole MetaMorph checkpoints by the names of the public implementation.

    llm         model.embed_tokens / model.layers / model.norm / lm_head     (convert/llama.py)
    tower       model.vision_tower.vision_tower.…                            (convert/vit.py)
    connector   model.mm_projector.{0,2,…}.{weight,bias}, one linear: model.mm_projector.…
    head        vision_head.{0,2[,4]}.{weight,bias},      one linear: vision_head.…

Dropped on purpose: `model.vision_proj`, which never had a gradient.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import names
from metamorph_jax.convert.llama import export_llama, load_llama
from metamorph_jax.convert.vit import export_vit, load_vit

TOWER, CONNECTOR, HEAD = "model.vision_tower.vision_tower.", "model.mm_projector.", "vision_head."
DROPPED = ("model.vision_proj.",)


def sequential(linears) -> Callable[[str], str]:
    """Our `linears.i` are items 0, 2, 4 … of a torch Sequential; a single one stands alone."""
    if len(linears) == 1:
        return lambda key: key.removeprefix("linears.0.")
    return lambda key: re.sub(r"^linears\.(\d+)", lambda m: str(2 * int(m[1])), key)


def _parts(model: nnx.Module):
    """(prefix, module with `linears`) of connector and head."""
    return ((CONNECTOR, model.connector), (HEAD, model.head))


def load_metamorph(model: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills a MetaMorph model in place; reports what doesn't fit in all parts at once."""
    tensors = {k: v for k, v in tensors.items() if not k.startswith(DROPPED)}
    problems = []

    def attempt(load, *args, **kwargs):
        try:
            load(*args, **kwargs)
        except ValueError as error:
            problems.append(str(error))

    prefixes = (TOWER, CONNECTOR, HEAD)
    if model.tower is not None:
        attempt(load_vit, model.tower, tensors, TOWER)
    for prefix, part in _parts(model):
        rename = sequential(part.linears)
        attempt(names.load_torch_dict, part, tensors, prefix, rename=rename)
    llm = {k: v for k, v in tensors.items() if not k.startswith(prefixes)}
    attempt(load_llama, model.llm, llm)
    if problems:
        raise ValueError("\n".join(problems))


def export_metamorph(model: nnx.Module) -> dict[str, np.ndarray]:
    """Published name -> array of the whole model."""
    out = dict(export_llama(model.llm))
    if model.tower is not None:
        out |= export_vit(model.tower, TOWER)
    for prefix, part in _parts(model):
        out |= names.to_torch_dict(part, prefix, rename=sequential(part.linears))
    return out
