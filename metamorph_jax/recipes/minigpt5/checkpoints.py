"""Files with what MiniGPT-5 trained: those of the public code, and a small one.

    stage 1   both token tables, mapper
    stage 2   both token tables, adapters (or a prefix) of the language model, the mapper's
              transformer: `fc` and queries stay as stage 1 left them
    vokens    added rows of both token tables, mapper

`stage1_cc3m.ckpt`, `stage2_vist.ckpt` and `stage2_mmdialog.ckpt` of `hf:KZ-ucsc/MiniGPT5` are such
files, of float32. Their tables are whole: the old rows shrank a little, as weight decay acted on
them. Nothing in a stage-2 file says what its adapters are scaled by: alpha / rank of the config
must be what they were trained with (there 16 / 8).

The public code reads whichever file it is given, and drops without a word what has no place. Here a
file that is not of the stage that it is named for is an error, and so is one of another model.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import hf, mapper, names
from metamorph_jax.errors import ConfigError, WeightError
from metamorph_jax.files import shown
from metamorph_jax.models import lora
from metamorph_jax.models.llm.llama import Llama
from metamorph_jax.recipes.minigpt5 import keys
from metamorph_jax.recipes.minigpt5.config import Config, is_trained_part
from metamorph_jax.recipes.minigpt5.model import MiniGPT5

FIRST, SECOND = "config.model.stage1_weights", "config.model.stage2_weights"
_LORA = ".lora_A."
# Of the mapper, what stage 2 leaves as it is.
_KEPT = (mapper.FC, mapper.QUERIES)

# ---- in


def load_stages(model: MiniGPT5, cfg: Config) -> None:
    """Fills what was trained, in place, from the files that the config names.

    Raises:
        ConfigError: a file is of another stage, or of a model with other options.
        WeightError: names or shapes don't fit.
    """
    first, second = cfg.stage1_weights, cfg.stage2_weights
    if is_trained_part(cfg.weights):
        if stage_of(_read(cfg.weights), cfg.weights) == 2:
            second = cfg.weights
        else:
            first = cfg.weights
            _check_complete(cfg)
    if first:
        _load_first(model, first)
    if second:
        complete = bool(first or cfg.weights and not is_trained_part(cfg.weights))
        _load_second(model, cfg, second, complete)


def _check_complete(cfg: Config) -> None:
    """Raises ConfigError where a file of stage 1 is named as the whole of a model of stage 2."""
    asked = {"lora": cfg.lora is not None and not cfg.lora.weights,
             "prefix": cfg.prefix is not None}  # fmt: skip
    lacking = [name for name, wanted in asked.items() if wanted]
    if lacking and not cfg.stage2_weights:
        raise ConfigError(
            f"{cfg.weights} is of stage 1: it has nothing of config.model.{lacking[0]}, which this "
            f"config asks for. To start stage 2 from it, name it as {FIRST}; to use it as it is, "
            f"set config.model.{lacking[0]}=None"
        )


def stage_of(tensors: Mapping[str, np.ndarray], spec: str) -> int:
    """1 or 2: the stage that a file is of, by the names in it.

    Raises:
        WeightError: it is no file of MiniGPT-5.
    """
    if any(f"{keys.LLM}base_model." in key or keys.PREFIX in key for key in tensors):
        return 2
    if any(key.startswith(mapper.FC) for key in tensors):
        return 1
    if any(key.startswith(mapper.TRANSFORMER) for key in tensors):
        return 2  # of a language model that stayed as it was
    listed = ", ".join(shown(key, 60) for key in list(tensors)[:8])
    raise WeightError(f"{spec} is no checkpoint of MiniGPT-5: it has {listed}")


def _read(spec: str) -> Mapping[str, np.ndarray]:
    """The tensors of a file, by their own names.

    Raises:
        ConfigError: it is a folder with several files, of which one must be named.
    """
    where = hf.find(spec)
    if where.is_dir() and (several := sorted(file.name for file in where.glob("*.ckpt"))):
        raise ConfigError(f"{spec} holds {', '.join(several)}: name one, {spec}/{several[0]}")
    return hf.Tensors(where)


def _load_first(model: MiniGPT5, spec: str) -> None:
    tensors = _read(spec)
    if stage_of(tensors, spec) == 2:
        raise ConfigError(
            f"{spec} is of stage 2, not of stage 1: name it as {SECOND}, and the stage-1 file that "
            f"it started from as {FIRST}"
        )
    _fill(model, tensors, spec, whole=True)


def _load_second(model: MiniGPT5, cfg: Config, spec: str, complete: bool) -> None:
    """`complete`: all of the mapper has been read from another file."""
    tensors = _read(spec)
    if stage_of(tensors, spec) == 1:
        raise ConfigError(
            f"{spec} is of stage 1, it has nothing of what stage 2 adds to the language model: "
            f"name it as {FIRST}; with that alone, stage 2 starts from it"
        )
    _check_adaptation(cfg, tensors, spec)
    whole = any(key.startswith(_KEPT) for key in tensors)
    if not whole and not complete:
        raise ConfigError(
            f"{spec} lacks {mapper.FC}* and {mapper.QUERIES}, which stage 2 leaves as they are: "
            f"name the stage-1 file that it started from as {FIRST} (of the published ones, that "
            "is stage1_cc3m.ckpt)"
        )
    _fill(model, tensors, spec, whole, adapters=model.cfg.lora == cfg.lora)


def _check_adaptation(cfg: Config, tensors: Mapping, spec: str) -> None:
    """Raises ConfigError where a file adapts the language model in another way than the config."""
    ranks = sorted({names.shape_of(tensors, key)[0] for key in tensors if _LORA in key})
    linears = sorted({key.split(_LORA)[0].rpartition(".")[2] for key in tensors if _LORA in key})
    prefix = any(keys.PREFIX in key for key in tensors)
    faults = []
    if ranks and cfg.lora is None:
        faults.append(
            f"it has adapters of rank {ranks[0]} on {', '.join(linears)}: set config.model.lora, "
            "as the configs of stage 2 do"
        )
    if not ranks and cfg.lora is not None:
        faults.append("it has no adapters: set config.model.lora=None")
    if ranks and cfg.lora is not None and ranks != [cfg.lora.rank]:
        listed = ", ".join(map(str, ranks))
        faults.append(f"its adapters have rank {listed}: set config.model.lora.rank")
    if prefix != (cfg.prefix is not None):
        what = "a prefix: set config.model.prefix" if prefix else "no prefix: set it to None"
        faults.append(f"it has {what}")
    if faults:
        raise ConfigError(f"{spec} is not of a model with this config: {'; '.join(faults)}")


def _fill(
    model: MiniGPT5, tensors: Mapping, spec: str, whole: bool, adapters: bool = False
) -> None:
    """Fills what a file has; `whole`: all of the mapper, else its transformer alone."""
    found = keys.plainly(tensors)
    own = names.Mapped(found, only=lambda key: key.startswith(keys.MAPPER))
    beside = (keys.LLM, *keys.MAPPER)
    loads: list[Callable[[], None]] = [
        lambda: _refuse_others([key for key in found if not key.startswith(beside)]),
        lambda: mapper.load_mapper(model.mapper, own, whole),
        lambda: _load_tables(model.llm, found),
    ]
    if adapters:
        loads += [lambda: keys.load_adapters(model.llm, found),
                  lambda: keys.load_prefix(model.llm, found)]  # fmt: skip
    try:
        names.load_parts(*loads)
    except WeightError as error:
        raise WeightError(f"{spec}: {error}") from error


def _refuse_others(left: list[str]) -> None:
    if left:
        listed = "; ".join(shown(key, 80) for key in sorted(left)[:20])
        raise WeightError(f"neither of the language model nor of the mapper: {listed}")


def _load_tables(llm: Llama, found: Mapping) -> None:
    """Fills the token tables, or their added rows alone where a file has no others."""
    cfg, faults = llm.cfg, []
    V, n = cfg.vocab_size, cfg.added_tokens
    for part, key in keys.TABLES.items():
        if cfg.tied and part == "lm_head":
            faults += [f"{key}, but the model ties its tables"] if key in found else []
            continue
        rows = names.shape_of(found, key)[0] if key in found else None
        if rows == n:
            changes = {"added": (key, np.asarray)}
        elif rows == V + n:
            changes = {"weight": (key, functools.partial(_old_rows, V=V, R=cfg.rows)),
                       "added": (key, lambda table: table[V:])}  # fmt: skip
        else:
            faults.append(_wrong_rows(key, rows, V, n))
            continue
        mine = lambda path, _, have=changes: names.torch_name(path) in have  # noqa: E731
        view = names.Mapped(found, changes, lambda key: False)
        names.load_torch_dict(getattr(llm, part), view, only=nnx.All(nnx.Param, mine))
    if faults:
        raise WeightError("; ".join(faults))


def _wrong_rows(key: str, rows: int | None, V: int, n: int) -> str:
    if rows is None:
        return f"missing: {key}"
    return (
        f"{key} has {rows} rows, this model {V + n}: {V} of its vocabulary, {n - 1} vokens and the "
        "placeholder of images (config.model.mapper.vokens)"
    )


def _old_rows(table: np.ndarray, V: int, R: int) -> np.ndarray:
    return np.concatenate([table[:V], np.zeros((R - V, *table.shape[1:]), table.dtype)])


# ---- out


def export_stage1(model: MiniGPT5) -> names.Lazy:
    """Name -> float32 array of a file of stage 1."""
    tables = _tables(model.llm, "", "")
    return names.joined(tables, mapper.export_mapper(model.mapper))


def export_stage2(model: MiniGPT5, whole: bool = False) -> names.Lazy:
    """Name -> float32 array of a file of stage 2, of a model with adapters or a prefix.

    Args:
        whole: with all of the mapper, so that the file needs none of stage 1 beside it.
    """
    llm, found = model.llm, []
    if next(lora.adapters(llm), None) is not None:
        tables = _tables(llm, "base_model.model.", "modules_to_save.default.")
        found = [tables, keys.export_adapters(llm)]
    elif llm.prefix is not None:
        found = [_tables(llm, "base_model.", ""), keys.export_prefix(llm)]
    else:
        found = [_tables(llm, "", "")]
    return names.joined(*found, mapper.export_mapper(model.mapper, whole))


def export_vokens(model: MiniGPT5) -> names.Lazy:
    """Name -> float32 array of a file with added rows and mapper alone."""
    tables = _tables(model.llm, "", "", old=False)
    return names.joined(tables, mapper.export_mapper(model.mapper))


def _tables(llm: Llama, before: str, after: str, old: bool = True) -> names.Lazy:
    """The token tables, or only their added rows; `before` and `after`: what PEFT puts into their
    names."""
    out, cfg = names.Lazy(), llm.cfg
    rows = cfg.tokens if old else cfg.added_tokens
    for part, key in keys.TABLES.items():
        if cfg.tied and part == "lm_head":
            continue
        found = names.lazy_torch_dict(getattr(llm, part))
        makers = [found.maker(name) for name in (("weight",) if old else ()) + ("added",)]
        name = key.removeprefix(keys.LLM).removesuffix("weight")
        name = f"{keys.INSIDE}{keys.LLM}{before}{name}{after}weight"
        make = functools.partial(_rows, makers, cfg.vocab_size)
        out.set(name, make, (rows, cfg.width), np.float32)
    return out


def _rows(makers: list[Callable[[], np.ndarray]], V: int) -> np.ndarray:
    *old, added = (np.asarray(make(), np.float32) for make in makers)
    return np.concatenate([*(table[:V] for table in old), added])


def file_of(folder: pathlib.Path, model: MiniGPT5) -> tuple[pathlib.Path, names.Lazy]:
    """(path, tensors) of the file that the public code would have of a model."""
    adapted = next(lora.adapters(model.llm), None) is not None or model.llm.prefix is not None
    if adapted:
        return folder / "stage2.ckpt", export_stage2(model, whole=True)
    return folder / "stage1.ckpt", export_stage1(model)
