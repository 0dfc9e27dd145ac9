"""Adapters in the format of Hugging Face's PEFT: adapter_config.json, adapter_model.safetensors.

    ours                                              theirs
    layers.(stack).self_attn.q_proj.lora_a [n, in, r] …layers.N.self_attn.q_proj.lora_A.weight [r, in]
    layers.(stack).self_attn.q_proj.lora_b [n, r, out] …layers.N.self_attn.q_proj.lora_B.weight [out, r]

All names start with `base_model.model.`, then come those of the published model. Theirs may have
adapters in some layers only, and ranks or alphas of their own: our stack of layers then has zeros
in the others, and B absorbs differences in scale. What we don't compute (DoRA, biases, embedding
adapters, whole modules) is an error that names it.
"""  # noqa: E501

import json
import math
import pathlib
import re
import time
from collections.abc import Container, Mapping

import jax.numpy as jnp
import numpy as np
import regex
from flax import nnx

from metamorph_jax import files, sharding
from metamorph_jax.convert import casts, hf, llama, names, vit
from metamorph_jax.errors import MissingFile, WeightError
from metamorph_jax.files import shown
from metamorph_jax.models import lora
from metamorph_jax.models.llm.llama import Llama
from metamorph_jax.models.vision.vit import ViT
from metamorph_jax.nn import quantized

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ENDS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}
# In names of a model in memory, the adapter's label comes before `weight`.
_LABEL = re.compile(r"(\.lora_[AB])\.default(\.weight)$")
# Their options that change the numbers -> the values with which they don't.
_REFUSED = {
    "use_dora": (False, None), "bias": ("none", None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "layer_replication": (None,), "lora_bias": (False, None),
    "trainable_token_indices": (None,), "target_parameters": (None, []), "alora_invocation_tokens":
    (None,), "use_qalora": (False, None), "megatron_config": (None,),
}  # fmt: skip


def _naming(module: nnx.Module) -> tuple:
    """(function: our dotted name with layer number -> published name, names of our stacks)."""
    if isinstance(module, Llama):
        return llama.published_name, llama.STACKED
    if isinstance(module, ViT):
        prefix = vit.PREFIXES[module.cfg.layout]
        return lambda key: prefix + vit.rename(module.cfg, key), ("layers",)
    return lambda key: key, ()  # UNets and text towers have the published names


def _published(module: nnx.Module) -> dict[str, tuple[str, int | None]]:
    """Published name of every linear -> (our dotted name, its place in the stack)."""
    rename, stacked = _naming(module)
    out = {}
    for name, linear in [*quantized.linears(module), *lora.adapters(module)]:
        path = (*name.split("."), "kernel")
        lead, _ = quantized.describe(linear)
        for one, index in names._slices(path, (*lead, 0, 0), stacked):
            out[rename(names.torch_name(one)).removesuffix(".weight")] = (name, index)
    return out


# ---- out


def tensors(module: nnx.Module) -> dict[str, np.ndarray]:
    """PEFT's name -> float32 array of all adapters of a module."""
    out, linears = {}, dict(lora.adapters(module))
    for published, (name, index) in sorted(_published(module).items()):
        if name not in linears:
            continue
        for leaf, end in _ENDS.items():
            array = np.asarray(getattr(linears[name], leaf)[...], np.float32)
            array = array if index is None else array[index]
            out[PREFIX + published + end] = np.ascontiguousarray(array.T)
    if not out:
        raise ValueError(f"this {type(module).__name__} has no adapters")
    return out


def config(module: nnx.Module, base: str = "") -> dict:
    """The adapter_config.json of a module's adapters. `base` names the model they belong to."""
    places, linears = _published(module), dict(lora.adapters(module))
    chosen = sorted(p for p, (name, _) in places.items() if name in linears)
    ends = sorted({p.rpartition(".")[2] for p in chosen})
    others = [p for p in places if p not in chosen]
    if any(p.rpartition(".")[2] in ends for p in others) or any(e.isdigit() for e in ends):
        ends = chosen  # the last part of the name doesn't say which
    kinds = [linears[places[p][0]].adapter for p in chosen]
    first = kinds[0]
    if any(k.rslora != first.rslora for k in kinds):
        raise ValueError("PEFT can't have adapters with and without rslora in one folder")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(module, Llama) else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "target_modules": ends,
        "rank_pattern": {p: k.rank for p, k in zip(chosen, kinds, strict=True) if k != first},
        "alpha_pattern": {p: k.alpha for p, k in zip(chosen, kinds, strict=True) if k != first},
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def export_peft(module: nnx.Module, folder: str | pathlib.Path, base: str = "") -> pathlib.Path:
    """Writes a folder that `PeftModel.from_pretrained(model, folder)` reads.

    Args:
        module: with adapters: a Llama, a tower, a UNet or a text tower.
        folder: is made if it isn't there.
        base: name or path of the published model without adapters.
    """
    from safetensors.numpy import save_file

    folder = pathlib.Path(folder)
    found, fields = tensors(module), config(module, base)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    return folder


# ---- in


def read_config(folder: str | pathlib.Path) -> dict:
    """The checked fields of adapter_config.json, with defaults for those that it lacks.

    Raises:
        MissingFile: there is none.
        FileError: it is not a JSON object.
        WeightError: a field is of a wrong type or value, or the adapters are of another kind, or
            with parts that we don't compute.
    """
    file = pathlib.Path(folder) / CONFIG
    if not file.exists():
        raise MissingFile(f"no {CONFIG} in {folder}")
    fields = _USUAL | files.read_json(file)
    if fields.get("peft_type") != "LORA":
        given = shown(repr(fields.get("peft_type")), 60)
        raise WeightError(f"{file}: peft_type {given} is not LORA")
    wrong = [
        f"{key}={shown(repr(fields[key]), 60)}" for key, fine in _REFUSED.items()
        if key in fields and fields[key] not in fine
    ]  # fmt: skip
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal"):
        wrong.append(f"init_lora_weights={shown(start, 60)!r} (it changes the model's own weights)")
    if wrong:
        raise WeightError(f"{file} asks for what we don't compute: {', '.join(wrong)}")
    for key, (fits, what) in _FIELDS.items():
        if not fits(fields[key]):
            raise WeightError(f"{file}: {key} is {shown(repr(fields[key]), 60)}, expected {what}")
    return fields


def _rank(value) -> bool:
    return type(value) is int and 0 < value < 2**16


def _number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9


def _patterns(each):
    return lambda value: isinstance(value, dict) and all(map(each, value.values()))


# Fields that we use -> (whether a value fits, what it should be).
_FIELDS = {
    "r": (_rank, "a whole number above 0"),
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": (_patterns(_rank), "an object of whole numbers above 0"),
    "alpha_pattern": (_patterns(_number), "an object of numbers"),
}
_USUAL = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "rank_pattern": {},
          "alpha_pattern": {}}  # fmt: skip
_PATTERNS_TAKE = 1.0  # seconds, of all linears together; good ones take milliseconds


class _Own:
    """Rank or alpha of each linear: a pattern fits a name or the end of it, as in PEFT.

    Patterns are regular expressions of the file, so the time that they take is bounded.
    """

    def __init__(self, file: pathlib.Path, patterns: Mapping, usual):
        self._file, self._usual = file, usual
        self._end = time.monotonic() + _PATTERNS_TAKE
        self._patterns = [(self._compiled(p), value) for p, value in patterns.items()]

    def _compiled(self, pattern: str):
        whole = rf"(.*\.)?({pattern})$"
        try:
            re.compile(whole)  # PEFT's syntax; `regex` has more, such as recursion
            return regex.compile(whole)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise self._error(pattern, f"is not a regular expression: {error}") from error

    def _error(self, pattern: str, text: str) -> WeightError:
        return WeightError(f"{self._file}: the pattern {shown(repr(pattern), 80)} {text}")

    def __call__(self, name: str):
        for pattern, value in self._patterns:
            try:
                found = pattern.match(name, timeout=max(self._end - time.monotonic(), 1e-3))
            except TimeoutError as error:
                raise self._error(pattern.pattern, "takes too long") from error
            if found:
                return value
        return self._usual


def load_peft(module: nnx.Module, spec: str | pathlib.Path) -> lora.LoraConfig:
    """Gives a module, in place, the adapters of a folder or "hf:OWNER/NAME".

    Linears that have adapters already get new values; they must be the same linears, with a rank
    that is large enough. Without adapters, the module gets those that the folder has.

    Returns:
        Config of the adapters, with names as in `module`.

    Raises:
        WeightError: listing all names that have no place, lack their other half, or don't fit.
    """
    folder = hf.find(str(spec))
    fields, places = read_config(folder), _published(module)
    halves = read_halves(folder, places, type(module).__name__)
    chosen = {places[name][0] for name in halves}
    cfg = _lora_config(fields, halves, chosen)
    linears = _matching_linears(module, folder, cfg, chosen)
    values = _stacked_values(folder, fields, linears, places, halves)
    for name, linear in linears.items():
        for leaf in _ENDS:
            _put(getattr(linear, leaf), values[name][leaf])
    return cfg


Halves = dict[str, dict[str, np.ndarray]]  # published name of a linear -> leaf of ours -> array


def read_halves(folder: pathlib.Path, places: Container, what: str) -> Halves:
    """A and B of every linear, float32 in our layout; WeightError for names that have no place, and
    for what is not a finite matrix of floating-point numbers."""
    found, wrong, halves = _adapters(folder), [], {}
    for key in found:
        plain = _LABEL.sub(r"\1\2", key)
        end = next((leaf for leaf, e in _ENDS.items() if plain.endswith(e)), None)
        name = plain.removeprefix(PREFIX).removesuffix(_ENDS.get(end, ""))
        if end is None or name not in places:
            wrong.append(f"{shown(key)}: no linear of this {what}")
            continue
        out = np.empty(found.shape_of(key), np.float32)
        if out.ndim != 2 or not out.size:
            wrong.append(f"{key}: shape {out.shape}, expected a matrix")
        elif fault := casts.cast_into(out, np.asarray(found[key])):
            wrong.append(f"{key}: {fault}")
        halves.setdefault(name, {})[end] = out.T
    wrong += [f"{name}: only half of an adapter" for name, h in halves.items() if len(h) < 2]
    if wrong or not halves:
        listed = "; ".join(sorted(wrong)[:50]) or "no adapters in it"
        raise WeightError(f"{folder}: {listed}")
    return halves


def _adapters(folder: pathlib.Path) -> hf.Tensors:
    """The file with the adapters; newer PEFT writes safetensors, older a torch file."""
    for file in (folder / WEIGHTS, folder / "adapter_model.bin"):
        if file.is_file():
            return hf.Tensors(file)
    raise MissingFile(f"no {WEIGHTS} or adapter_model.bin in {folder}")


def _lora_config(fields: Mapping, halves: Halves, chosen: set[str]) -> lora.LoraConfig:
    """The config of adapters of these linears, with the largest of the ranks."""
    return lora.LoraConfig(
        target="|".join(re.escape(n) for n in sorted(chosen)),
        rank=max(half["lora_a"].shape[1] for half in halves.values()),
        alpha=float(fields["lora_alpha"]),
        dropout=float(fields["lora_dropout"]),
        rslora=fields["use_rslora"],
    )


def _matching_linears(module, folder, cfg: lora.LoraConfig, chosen: set[str]) -> dict:
    """name -> linear with an adapter; they are added to a module that has none."""
    have = dict(lora.adapters(module))
    if have and set(have) != chosen:
        raise WeightError(
            f"{folder} has adapters of other linears than the model: "
            f"only there: {sorted(chosen - set(have))}; only here: {sorted(set(have) - chosen)}"
        )
    if not have:
        lora.add(module, cfg, rngs=nnx.Rngs(0))
        have = dict(lora.adapters(module))
    return have


def _stacked_values(folder, fields: Mapping, linears, places: Mapping, halves: Halves) -> Halves:
    """Our name of a linear -> A and B of all its layers, zeros where theirs has none.

    B takes up what differs in scale. WeightError for shapes and ranks that don't fit.
    """
    wrong, values = [], {
        name: {leaf: np.zeros(getattr(m, leaf).shape, np.float32) for leaf in _ENDS}
        for name, m in linears.items()
    }  # fmt: skip
    scale_of = scales(folder, fields)
    for published, half in halves.items():
        name, index = places[published]
        a, b, adapter = half["lora_a"], half["lora_b"], linears[name].adapter
        r, scale = scale_of(published)
        whole = values[name]["lora_a"], values[name]["lora_b"]
        to_a, to_b = whole if index is None else (whole[0][index], whole[1][index])
        fits = a.shape[0] == to_a.shape[0] and b.shape[1] == to_b.shape[1]
        if not fits or not r == a.shape[1] == b.shape[0] <= to_a.shape[1]:
            wrong.append(
                f"{published}: A {a.T.shape}, B {b.T.shape} of rank {r}; the model's linear takes "
                f"{to_a.shape[0]} to {to_b.shape[1]} at rank {to_a.shape[1]}"
            )
            continue
        to_a[:, :r] = a
        to_b[:r] = b * (scale / adapter.scale)
    if wrong:
        raise WeightError(f"{folder}: " + "; ".join(sorted(wrong)[:50]))
    return values


def scales(folder: pathlib.Path, fields: Mapping):
    """Function: published name of a linear -> (rank, scale) of its adapter."""
    file = pathlib.Path(folder) / CONFIG
    rank_of = _Own(file, fields["rank_pattern"], fields["r"])
    alpha_of = _Own(file, fields["alpha_pattern"], fields["lora_alpha"])

    def scale_of(name: str) -> tuple[int, float]:
        r, alpha = rank_of(name), alpha_of(name)
        return r, alpha / (math.sqrt(r) if fields["use_rslora"] else r)

    return scale_of


def _put(variable: nnx.Variable, array: np.ndarray) -> None:
    """Gives a variable an array in its dtype, on the devices where it lies."""
    where = getattr(variable.get_raw_value(), "sharding", None)
    host = array.astype(variable.dtype)
    variable.set_raw_value(jnp.asarray(host) if where is None else sharding.put(host, where))
