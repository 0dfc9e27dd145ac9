"""Llama-family weights by their Hugging Face names, and their configs in both directions.

    ours                                   published
    embed_tokens.embedding [R, D]          model.embed_tokens.weight, rows below V
    embed_tokens.added     [n, D]          model.embed_tokens.weight, the rows after them
    layers.(stack).self_attn.q_proj.kernel model.layers.N.self_attn.q_proj.weight   (transposed)
    layers.(stack).self_attn.q_norm.scale  model.layers.N.self_attn.q_norm.weight   (Qwen3)
    norm.scale                             model.norm.weight
    lm_head.kernel / .added                lm_head.weight, cut the same way

Where a published table has V rows, `added` keeps its values, or gets the mean of the rows if it has
none yet. Our rows from V to R (`vocab_multiple`) are zeros, and are not written. Dropped on
purpose: `rotary_emb.inv_freq`, and `lm_head.weight` where the model ties it and it is equal.

The blocks of an `Insert` and the biases of the output table belong to the recipe that asked for
them: they are neither filled nor written here.
"""

import functools
import math
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from metamorph_jax.convert import agree, compare, export, library, names
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.convert.families import Family, Reference
from metamorph_jax.errors import ConfigError, WeightError
from metamorph_jax.models.llm.llama import SIZES, Llama, LlamaConfig
from metamorph_jax.nn.rope import RopeScaling

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KINDS = ("llama", "mistral", "qwen2", "qwen3")


# ---- configs


def config_from_hf(fields: Mapping, **overrides) -> LlamaConfig:
    """The LlamaConfig of a config.json.

    Args:
        fields: of the file.
        overrides: fields of LlamaConfig that replace the file's.

    Raises:
        ValueError: for another family, or for an option that changes the numbers and that we don't
            support (sliding windows, other activations and rope scalings, …).
    """
    kind = fields.get("model_type", "llama")
    if kind not in KINDS:
        raise ValueError(f"model_type {kind!r} is not of the Llama family ({', '.join(KINDS)})")
    absent = [k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads") if fields.get(k) is None]  # fmt: skip
    if absent:
        raise ValueError(f"the config lacks {', '.join(absent)}")
    f = library.resolved(kind, fields)
    _refuse(f, kind)
    rope, heads = f["rope_parameters"] or {}, f["num_attention_heads"]
    bias = bool(f.get("attention_bias"))
    values = dict(
        vocab_size=f["vocab_size"],
        width=f["hidden_size"],
        mlp_width=f["intermediate_size"],
        layers=f["num_hidden_layers"],
        heads=heads,
        kv_heads=f["num_key_value_heads"],
        head_dim=f.get("head_dim") or f["hidden_size"] // max(heads, 1),
        norm_eps=f["rms_norm_eps"],
        rope_theta=rope.get("rope_theta"),
        rope_scaling=_scaling(rope),
        tied=bool(f["tie_word_embeddings"]),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2",
        mlp_bias=bool(f.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        max_positions=f["max_position_embeddings"],
    )
    return LlamaConfig(**{**values, **overrides})


def _refuse(f: Mapping, kind: str) -> None:
    if f["hidden_act"] not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {f['hidden_act']!r} is not supported, only 'silu'")
    window, layers = f.get("sliding_window"), f.get("layer_types") or ()
    windowed = f.get("use_sliding_window") or "sliding_attention" in layers
    windowed = windowed or not kind.startswith("qwen")
    if window and windowed and window < f["max_position_embeddings"]:
        stated = f"sliding_window {window}"
        raise ConfigError(
            f"{stated} is not supported ({kind}'s default where the config doesn't state one; null "
            "is none)"
        )
    rope = f["rope_parameters"] or {}
    part = f.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        raise ConfigError(f"partial_rotary_factor {part} is not supported")


def _scaling(rope: Mapping) -> RopeScaling:
    """The scaling of transformers' `rope_parameters`."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        if rope.get("factor", 1.0) != 1.0:
            raise ConfigError(f"RoPE scaling has factor {rope['factor']}, but no rope_type")
        return RopeScaling()
    names = {"linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings")}  # fmt: skip
    if kind not in names:
        raise ConfigError(f"RoPE scaling {kind!r} is none of default, linear, llama3")
    values = [rope.get(name) for name in names[kind]]
    wrong = [f"{n} {x!r}" for n, x in zip(names[kind], values, strict=True) if not _positive(x)]
    if wrong:
        raise ConfigError(f"RoPE scaling {kind!r}: not a number above 0: {', '.join(wrong)}")
    return RopeScaling(kind, *map(float, values[:3]), *map(int, values[3:]))


def _positive(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf


def disagreements(cfg: LlamaConfig, fields: Mapping, where: str = "llm.") -> list[str]:
    """Where a model is not the one of a config.json (or of a GGUF's metadata), in what shapes don't
    show; see `agree`."""
    return agree.differences(cfg, config_from_hf(fields), agree.LLM, where)


def kind_of(cfg: LlamaConfig) -> str:
    """The model type that can express this model: llama, qwen2 or qwen3.

    Raises:
        ValueError: for a combination of biases and norms that none of them has.
    """
    if cfg.qk_norm and not cfg.mlp_bias and cfg.qkv_bias == cfg.o_bias:
        return "qwen3"
    if not cfg.qk_norm and cfg.qkv_bias == cfg.o_bias:
        return "llama"
    if not cfg.qk_norm and cfg.qkv_bias and not cfg.mlp_bias:
        return "qwen2"
    raise ValueError(
        f"no published layout has qkv_bias={cfg.qkv_bias}, o_bias={cfg.o_bias}, "
        f"mlp_bias={cfg.mlp_bias}, qk_norm={cfg.qk_norm} together"
    )


def config_to_hf(cfg: LlamaConfig, **extra) -> dict:
    """A config.json that transformers reads unchanged.

    The rope is written in the way that every version of transformers reads.

    Args:
        cfg: of ours; added tokens count as rows of the vocabulary.
        extra: fields that we don't have (ids of special tokens, dtype).
    """
    kind = kind_of(cfg)
    scaling, rope = cfg.rope_scaling, None
    if scaling.kind == "linear":
        rope = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling.kind == "llama3":
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    fields = {
        "architectures": [kind.title() + "ForCausalLM"],
        "model_type": kind,
        "vocab_size": cfg.tokens,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": cfg.init_std,
        "use_cache": True,
    }
    if kind == "llama":
        fields |= {"attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}
    if kind == "qwen3":
        fields |= {"attention_bias": cfg.qkv_bias}
    if kind != "llama":
        fields |= {"use_sliding_window": False}
    return fields | extra


def published(fields: Mapping) -> list[str]:
    """Every key of a published checkpoint with this config.json."""
    cfg = config_from_hf(fields)
    layer = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    layer += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layer += [f"self_attn.{part}_proj.bias" for part in "qkv" if cfg.qkv_bias]
    layer += ["self_attn.o_proj.bias"] * cfg.o_bias
    layer += [f"mlp.{part}_proj.bias" for part in ("gate", "up", "down") if cfg.mlp_bias]
    layer += [f"self_attn.{part}_norm.weight" for part in "qk" if cfg.qk_norm]
    keys = [EMBED, "model.norm.weight"] + [HEAD] * (not cfg.tied)
    return keys + [f"model.layers.{i}.{key}" for i in range(cfg.layers) for key in layer]


# ---- weights


STACKED = ("layers",)
_OURS = ("inserts", "prefix")  # parts of a `Llama` that no published model has


def _is_published(path, value) -> bool:
    """nnx filter: the parameters that a published model of the family has."""
    path = tuple(map(str, path))
    biases = (("lm_head", "bias"), ("lm_head", "added_bias"))
    return isinstance(value, nnx.Param) and path[0] not in _OURS and path not in biases


def published_name(key: str) -> str:
    """The published name of one of our (torch-style) names."""
    return key if key.startswith("lm_head") else "model." + key


def _fit_tables(tensors: Mapping, llm: Llama) -> Mapping:
    """Tables of V + n rows as two tensors, the first with rows of zeros up to R."""
    cfg, changes = llm.cfg, {}
    V, n = cfg.vocab_size, cfg.added_tokens
    holders = {EMBED: llm.embed_tokens} | ({} if cfg.tied else {HEAD: llm.lm_head})
    for key, holder in holders.items():
        if key not in tensors:
            continue
        rows, added = names.shape_of(tensors, key)[0], key.replace("weight", "added")
        if rows not in (V, V + n):
            continue  # a wrong number: the shape check reports it
        if (rows, cfg.rows) != (V, V):
            changes[key] = functools.partial(_table, V=V, R=cfg.rows)
        if n and rows == V + n:
            changes[added] = (key, lambda table: table[V:])
        elif n:
            value = holder.added.get_raw_value()
            if isinstance(value, jax.ShapeDtypeStruct):
                changes[added] = (key, functools.partial(_mean_rows, n=n))
            else:
                changes[added] = (key, lambda _, value=value: np.asarray(value))
    return names.Mapped(tensors, changes)


def _mean_rows(table: np.ndarray, n: int) -> np.ndarray:
    return np.repeat(np.mean(table, 0, np.float32, keepdims=True), n, 0)


def _table(table: np.ndarray, V: int, R: int) -> np.ndarray:
    if R == V:
        return table[:V]
    return np.concatenate([table[:V], np.zeros((R - V, *table.shape[1:]), table.dtype)])


def untied(fields: Mapping, tensors: Mapping) -> dict:
    """The fields of a config.json, with what the tensors say about ties.

    As transformers has it, a config that ties tables is not followed where the file has both and
    they differ.
    """
    tied = fields.get("tie_word_embeddings", False)
    return dict(fields) | ({"tie_word_embeddings": False} if tied and _two_tables(tensors) else {})


def _two_tables(tensors: Mapping) -> bool:
    """Whether there are an input and an output table, and they differ."""
    if EMBED not in tensors or HEAD not in tensors:
        return False
    if names.shape_of(tensors, EMBED) != names.shape_of(tensors, HEAD):
        return True
    return not np.array_equal(np.asarray(tensors[EMBED]), np.asarray(tensors[HEAD]))


def load_llama(llm: Llama, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `llm` in place from tensors by Hugging Face name; anything else is an error.

    Where the model ties its tables, a file may hold either of them, or both if they are equal.

    Raises:
        ValueError: with a list of all that doesn't fit.
    """
    tied = llm.cfg.tied
    if tied and _two_tables(tensors):
        raise WeightError(
            f"{HEAD} is not {EMBED}, but the model ties them: set llm_options.tied=false"
        )
    if tied and EMBED not in tensors and HEAD in tensors:
        only = lambda key: key != HEAD  # noqa: E731
        tensors = names.Mapped(tensors, {EMBED: (HEAD, lambda table: table)}, only)
    names.load_torch_dict(
        llm,
        _fit_tables(tensors, llm),
        stacked=STACKED,
        rename=published_name,
        ignore=lambda key: key.endswith("rotary_emb.inv_freq") or (tied and key == HEAD),
        only=_is_published,
    )


def export_llama(llm: Llama) -> names.Lazy:
    """Tensors by Hugging Face name, fetched when asked for.

    Added tokens are the last rows of the tables; rows that only pad them are cut off.
    """
    cfg = llm.cfg
    out = names.lazy_torch_dict(llm, stacked=STACKED, rename=published_name, only=_is_published)
    for key in (EMBED, HEAD):
        added = key.replace("weight", "added")
        if key not in out or (added not in out and cfg.rows == cfg.vocab_size):
            continue
        make = functools.partial(_joined, out.maker(key), out.maker(added), cfg.vocab_size)
        out.set(key, make, (cfg.tokens, cfg.width), out.dtype_of(key))
        if added in out:
            del out[added]
    return out


def _joined(table, added, V: int) -> np.ndarray:
    """The table's first V rows and the added ones; both arguments are functions, or None."""
    rows = table()[:V]
    return rows if added is None else np.concatenate([rows, added()])


def create(cfg: LlamaConfig, *, rngs: nnx.Rngs) -> Llama:
    return Llama(cfg, rngs=rngs)


def save_llm(family, folder: pathlib.Path, llm: Llama, source: Source, writer: Writer) -> int:
    """Writes a folder for AutoModelForCausalLM and AutoTokenizer; see `Family.save`.

    Added tokens become rows of the tables. The generation config is the source's, or the ids of
    special tokens alone.
    """
    ids = export.write_generation(folder, source)
    kind = writer.torch_dtype
    fields = family.config_to_hf(llm.cfg) | ids | {"torch_dtype": kind, "dtype": kind}
    export.write_json(folder / "config.json", fields)
    total = writer.weights(folder, export_llama(llm))
    if source.folder is not None:
        export.copy_files(source.folder, folder)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    return total


def _family(name: str, kinds: tuple[str, ...], *starts: str) -> Family:
    return Family(
        name,
        kinds,
        config_from_hf,
        config_to_hf,
        create,
        load_llama,
        export_llama,
        sizes={k: v for k, v in SIZES.items() if k.startswith(starts)},
        published=published,
        reference=Reference(compare.transformers_model("AutoModelForCausalLM"), compare.llama),
        save=save_llm,
    )


FAMILIES = (
    _family(
        "llama", ("llama", "mistral"), "llama", "vicuna", "tinyllama", "smollm2", "mistral", "yi"
    ),
    _family("qwen2", ("qwen2",), "qwen2.5"),
    _family("qwen3", ("qwen3",), "qwen3"),
)
