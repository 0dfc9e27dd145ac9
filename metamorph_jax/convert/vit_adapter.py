"""A tower with its ViT-Adapter by the names of MM-Interleaved's checkpoints.

    ours                              published, after `vision_model.`
    tower.…                           as in `convert/vit.py`; no post_layernorm
    prior.stem.N.{conv,norm}          adapter_spm.stem.{3N}, adapter_spm.stem.{3N + 1}
    prior.halvings.N.{conv,norm}      adapter_spm.conv{N + 2}.0, adapter_spm.conv{N + 2}.1
    prior.projections.N               adapter_spm.fc{N + 1}
    level_embed                       adapter_level_embed
    interactions.N.….ffn.conv         adapter_interactions.N.….ffn.dwconv.dwconv
    interactions.N.…                  adapter_interactions.N.…
    up                                adapter_up, a transposed convolution [in, out, h, w]

For another grid, the position table is resized as the reference does it beside an adapter: bicubic,
corners aligned (without an adapter they are not, see `convert/vit.py`).
"""

import re
from collections.abc import Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import names, vit
from metamorph_jax.models.vision.vit_adapter import ViTAdapter
from metamorph_jax.nn import sincos

PREFIX = "vision_model."
OWN = "adapter_"  # what the adapter's keys start with
_PLACES = {"conv": 0, "norm": 1}


def rename(key: str) -> str:
    """The published name of one of our (torch-style) names of the adapter, without `PREFIX`."""
    if found := re.fullmatch(r"prior\.(stem|halvings)\.(\d+)\.(conv|norm)\.(\w+)", key):
        part, n, kind, leaf = found[1], int(found[2]), _PLACES[found[3]], found[4]
        place = f"stem.{3 * n + kind}" if part == "stem" else f"conv{n + 2}.{kind}"
        return f"{OWN}spm.{place}.{leaf}"
    if found := re.fullmatch(r"prior\.projections\.(\d+)\.(\w+)", key):
        return f"{OWN}spm.fc{int(found[1]) + 1}.{found[2]}"
    return OWN + key.replace(".ffn.conv.", ".ffn.dwconv.dwconv.")


_OWN = nnx.All(nnx.Param, lambda path, _: path[0] != "tower")


def load_adapter(adapter: ViTAdapter, tensors: Mapping[str, np.ndarray], prefix: str = "") -> None:
    """Fills tower and adapter in place.

    Args:
        tensors: published name -> array; those that don't start with prefix are left alone.
        prefix: what stands before `vision_model.`.

    Raises:
        ValueError: names or shapes don't fit.
    """
    prefix, cfg = prefix + PREFIX, adapter.tower.cfg
    position = prefix + vit.rename(cfg, "position_embedding")
    extra = int(cfg.class_token)
    resized = {position: lambda table: _resized(table, cfg.grid, extra)}
    tower = lambda key: key.startswith(prefix) and not key.startswith(prefix + OWN)  # noqa: E731
    mine = lambda key: key.startswith(prefix + OWN)  # noqa: E731
    names.load_parts(
        lambda: vit.load_vit(adapter.tower, names.Mapped(tensors, resized, tower), prefix),
        lambda: names.load_torch_dict(
            adapter, names.Mapped(tensors, only=mine), prefix, rename=rename, only=_OWN
        ),
    )


def _resized(table, grid: int, extra: int) -> np.ndarray:
    table = np.asarray(table)
    if len(table) == grid**2 + extra:
        return table
    return sincos.resize_table(
        table.astype(np.float32), grid, extra, weights=sincos.aligned_bicubic
    )


def export_adapter(adapter: ViTAdapter, prefix: str = "") -> names.Lazy:
    """Published name -> array, of tower and adapter; the inverse of `load_adapter`."""
    prefix = prefix + PREFIX
    tower = vit.export_vit(adapter.tower, prefix)
    own = names.lazy_torch_dict(adapter, prefix, rename=rename, only=_OWN)
    return names.joined(tower, own)
