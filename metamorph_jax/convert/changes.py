"""Models that were published as a change to a base.

    delta       model = base + delta, tensor by tensor
    adapters    model = base + alpha / r · B A, of a PEFT folder

Both ways only names of the published layout are touched, one tensor at a time, in float32; so the
model never has to fit into memory. A tensor that the base lacks is in the delta as it is: a
connector, or the last rows of the token tables. Code that adapts a language model and trains other
parts whole saves these beside the adapters, in `non_lora_trainables.bin`.
"""

import functools
import math
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from metamorph_jax.convert import casts, export, hf, names, peft, safetensors
from metamorph_jax.convert.card import licence_of, write_card
from metamorph_jax.convert.llama import EMBED, HEAD
from metamorph_jax.convert.progress import Progress
from metamorph_jax.data import tokenizers
from metamorph_jax.errors import WeightError
from metamorph_jax.files import shown

WHOLE = "non_lora_trainables"  # with .bin or .safetensors
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
_LLM = re.compile(r"(model\.(embed_tokens|layers|norm)|lm_head)\.")


# ---- deltas


def with_delta(base: Mapping, delta: Mapping) -> names.Lazy:
    """base + delta, tensor by tensor; what only the delta has is taken from it as it is.

    Rounded to 16 bits, the sums are those of 16-bit arithmetic.

    Args:
        base, delta: published name -> array.

    Raises:
        WeightError: listing all names and shapes that don't fit.
    """
    return _combined(base, delta, 1.0)


def difference(model: Mapping, base: Mapping) -> names.Lazy:
    """The delta that makes `model` of `base`; raises as `with_delta`.

    In float16 it gives the model back up to rounding, in float32 to the last bit of most values.
    """
    return _combined(base, model, -1.0)


def added(base: Mapping, other: Mapping) -> list[str]:
    """Names in `other` that the base lacks."""
    return [key for key in other if key not in base and not key.endswith(_BUFFERS)]


def _combined(base: Mapping, other: Mapping, sign: float) -> names.Lazy:
    """other + sign · base, with the names and shapes of `other`."""
    problems = [f"{shown(key)}: only in the base" for key in base
                if key not in other and not key.endswith(_BUFFERS)]  # fmt: skip
    problems += [f"{shown(key)}: not in the base" for key in added(base, other) if _LLM.match(key)]
    out = names.Lazy()
    for key in other:
        if key.endswith(_BUFFERS):
            continue
        shape = names.shape_of(other, key)
        under = names.shape_of(base, key) if key in base else None
        if not _fits(key, under, shape):
            problems.append(f"{shown(key)}: {shape}, in the base {under}")
        make = functools.partial(_sum, base if key in base else {}, other, key, sign)
        out.set(key, make, shape, np.float32)
    if problems:
        more = "; …" if len(problems) > 50 else ""
        listed = "; ".join(problems[:50])
        raise WeightError(f"delta and base don't fit ({len(problems)}): {listed}{more}")
    return out


def _fits(key: str, under, shape) -> bool:
    """Token tables may have rows that those of the base lack."""
    if under is None or under == shape:
        return True
    more = key in (EMBED, HEAD) and len(under) == len(shape) == 2 and under[0] < shape[0]
    return more and under[1] == shape[1]


def _sum(base: Mapping, other: Mapping, key: str, sign: float) -> np.ndarray:
    out = _float32(other, key)
    if key in base:
        under = _float32(base, key)
        under *= np.float32(sign)
        out[: len(under)] += under
    return out


def _float32(tensors: Mapping, key: str) -> np.ndarray:
    """A checked copy of a tensor."""
    given = np.asarray(tensors[key])
    out = np.empty(given.shape, np.float32)
    fault = casts.cast_into(out, given)
    names.refuse([(fault, key)] if fault else [])
    return out


# ---- adapters


def with_adapters(base: Mapping, folder: str | pathlib.Path) -> names.Lazy:
    """The tensors of a model with the adapters of a folder folded in, and what lies beside them.

    Args:
        base: published name -> array.
        folder: in PEFT's format, with or without a file `WHOLE`.

    Raises:
        WeightError: listing all adapters that have no place, lack their other half, or don't fit.
    """
    folder = pathlib.Path(folder)
    fields, whole = peft.read_config(folder), read_whole(folder)
    linears = {key.removesuffix(".weight") for key in base if key.endswith(".weight")}
    halves = peft.read_halves(folder, linears, "model")
    scale_of, wrong, out = peft.scales(folder, fields), [], names.Lazy()
    for key in base:
        if key.endswith(_BUFFERS) or key in whole:
            continue
        half = halves.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        shape = names.shape_of(base, key)
        if half is None:
            out.set(key, functools.partial(_float32, base, key), shape, np.float32)
            continue
        a, b = half["lora_a"], half["lora_b"]
        r, scale = scale_of(key.removesuffix(".weight"))
        if not r == a.shape[1] == b.shape[0] or shape != (b.shape[1], a.shape[0]):
            wrong.append(f"{key}: A {a.T.shape}, B {b.T.shape} of rank {r}; the weight is {shape}")
        out.set(key, functools.partial(_folded, base, key, a, b, scale), shape, np.float32)
    if wrong:
        raise WeightError(f"{folder}: " + "; ".join(sorted(wrong)[:50]))
    for key in whole:
        shape = names.shape_of(whole, key)
        out.set(key, functools.partial(_float32, whole, key), shape, np.float32)
    return out


def _folded(base: Mapping, key: str, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + scale · (A B)ᵀ of a: [in, r], b: [r, out]."""
    out = (a @ b).T
    out *= np.float32(scale)
    out += _float32(base, key)
    return out


def read_whole(folder: str | pathlib.Path) -> Mapping[str, np.ndarray]:
    """What was trained whole beside adapters, by its published name; {} without such a file.

    A leading `base_model.` is cut off, and one `model.` where that stands twice.

    Raises:
        WeightError: a tensor is empty, as a run whose parameters were spread (ZeRO-3) and not
            gathered saves it; or two have one name.
    """
    found = [pathlib.Path(folder) / f"{WHOLE}.{ending}" for ending in ("safetensors", "bin")]
    file = next((path for path in found if path.is_file()), None)
    if file is None:
        return {}
    tensors = hf.Tensors(file)
    if empty := [key for key in tensors if 0 in tensors.shape_of(key)]:
        raise WeightError(f"{file}: no values in {', '.join(map(shown, empty[:8]))}: the run that "
                          "saved it did not gather its parameters (ZeRO-3)")  # fmt: skip
    plain = {key: key.removeprefix("base_model.") for key in tensors}
    if any(name.startswith("model.model.") for name in plain.values()):
        plain = {key: name.removeprefix("model.") for key, name in plain.items()}
    if len(set(plain.values())) < len(plain):
        raise WeightError(f"{file}: tensors of one name, with and without base_model.")
    changes = {name: (key, np.asarray) for key, name in plain.items() if name != key}
    return names.Mapped(tensors, changes, lambda key: plain[key] == key)


# ---- for `metamorph convert`


_CARD = {
    "delta": "The delta weights `{}` were added to it.",
    "make_delta": "These are differences to `{}`, and no model without it.",
    "lora": "The adapters of `{}` are merged into it.",
}


def write(source: str, out: str, kind: str, other: str, dtype: str, most: int) -> int:
    """Writes a folder in the published names of what it is made from; returns all bytes.

    Args:
        source, other: for kind "delta" a base and the delta to add to it; for "make_delta" a model
            and the base to subtract from it; for "lora" a base and adapters. Folders or hub names.
        dtype: "same" (that of the delta, the model, or the adapters' base) or a key of
            `export.DTYPES`.
        most: bytes of a file.

    Raises:
        WeightError: both are the same weights, or don't fit.
    """
    given, second = hf.find(source), hf.find(other)
    first, places = hf.Tensors(given), (second, given)
    like = {} if kind == "lora" else hf.Tensors(second)
    _check_different(first, like, given, second, f"--{kind.replace('_', '-')}")
    if kind == "lora":
        tensors, like = with_adapters(first, second), first
    elif kind == "delta":
        like = hf.Tensors(second)
        tensors = with_delta(first, like)
        _say_added(first, like, source)
    else:
        base, like, places = hf.Tensors(second), first, (given, second)
        tensors = difference(first, base)
        _say_added(base, first, other)
    dtype = export.written_dtype(dtype, like)
    wide = safetensors.dtype_of(dtype).itemsize
    total = wide * sum(math.prod(tensors.shape_of(key)) for key in tensors)
    progress = Progress("writing", total)
    with export.whole_or_nothing(out) as folder:
        writer = export.Writer(dtype, most, progress)
        writer.weights(folder, tensors)
        progress.close()
        _write_beside(folder, places, writer, export.rows_of(tensors))
        lines = [_CARD[kind].format(pathlib.PurePath(other).name)]
        write_card(folder, pathlib.Path(out).name, source, lines, licence_of(places[0]))
    return total


def _check_different(first: Mapping, second: Mapping, given, other, option: str) -> None:
    """Raises WeightError where --from and what changes it are one folder, or hold equal tensors."""
    if pathlib.Path(given).resolve() == pathlib.Path(other).resolve():
        raise WeightError(f"--from and {option} are both {shown(given)}: name two different ones")
    both = sorted((k for k in first if k in second), key=lambda k: math.prod(first.shape_of(k)))
    if both and all(_equal(first, second, key) for key in both):
        raise WeightError(f"--from {shown(given)} and {option} {shown(other)} hold the same "
                          "weights: one of them is another model than you meant")  # fmt: skip


def _equal(first: Mapping, second: Mapping, key: str) -> bool:
    same_shape = first.shape_of(key) == second.shape_of(key)
    return same_shape and np.array_equal(np.asarray(first[key]), np.asarray(second[key]))


def _say_added(base: Mapping, other: Mapping, spec: str) -> None:
    if found := added(base, other):
        more = " …" if len(found) > 20 else ""
        print(f"taken as they are: {', '.join(found[:20])}{more} ({spec} lacks them)", flush=True)


def _write_beside(
    folder: pathlib.Path, places: tuple, writer: export.Writer, rows: int | None
) -> None:
    """config.json, tokenizer and generation files, each kind from the first place that has it.

    Raises:
        WeightError: an id of a special token is beyond the table's `rows`, see `export`.
    """
    holders = [place for place in places if (place / "config.json").is_file()] or [places[0]]
    kind = {"torch_dtype": writer.torch_dtype, "dtype": writer.torch_dtype}
    fields = hf.read_config(holders[0])
    export.write_json(folder / "config.json", fields | kind)
    speaking = [place for place in places if tokenizers.is_in(place)] or [places[0]]
    export.copy_files(speaking[0], folder)
    if rows:
        export.check_special_ids(folder, fields, rows, holders[0])
