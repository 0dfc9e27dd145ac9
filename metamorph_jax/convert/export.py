"""Writes folders that transformers (and diffusers) load unchanged.

    config.json  generation_config.json  model.safetensors (or shards and their index)
    tokenizer files  README.md

Recipes write more for their systems (`families.RunForm`). A folder is written under another name
and renamed when it is complete, so that nothing half-written appears under the requested name. One
tensor at a time is fetched, cast and written.
"""

import contextlib
import copy
import dataclasses
import errno
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from metamorph_jax import files
from metamorph_jax.convert import casts, chat_template, names, safetensors
from metamorph_jax.data import tokenizers
from metamorph_jax.errors import WeightError
from metamorph_jax.files import shown

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
LONGEST = 4096  # positions, of a checkpoint whose config.json has more or says nothing
DTYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}


def _quiet(name: str, size: int) -> None:
    pass


def written_dtype(name: str, tensors: Mapping) -> str:
    """The safetensors name of the dtype to write.

    Args:
        name: a key of `DTYPES`, or "same": that of the largest of these tensors.
    """
    if name != "same":
        return DTYPES[name]
    largest = max(tensors, key=lambda key: math.prod(names.shape_of(tensors, key)))
    found = safetensors.name_of(tensors[largest].dtype)
    return found if found in DTYPES.values() else "F32"


@contextlib.contextmanager
def whole_or_nothing(out: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which becomes `out` at the end and is removed on any error.

    Raises:
        FileExistsError: if `out` is there and not empty, or so at the end, by another process.
    """
    out = pathlib.Path(out)
    taken = FileExistsError(f"{out} exists and is not an empty folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise taken
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        try:
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise taken from error
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: pathlib.Path, fields: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Writer:
    """How weights are written.

    Attributes:
        dtype: a value of `DTYPES`; other than floating-point tensors keep theirs.
        most: bytes of a file.
        progress: called with each tensor and its bytes.
    """

    dtype: str = "F32"
    most: int = 5 * 10**9
    progress: Callable[[str, int], None] = _quiet

    def weights(self, folder: pathlib.Path, tensors: names.Lazy, stem: str = "model") -> int:
        """Writes safetensors files, with an index if there are several; returns their bytes.

        Args:
            stem: of the file names, as transformers ("model") or diffusers look for them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        kind = safetensors.dtype_of(self.dtype)
        integer = lambda d: d.kind in "iub"  # noqa: E731
        dtypes = {k: tensors.dtype_of(k) if integer(tensors.dtype_of(k)) else kind for k in tensors}
        shapes = {k: tensors.shape_of(k) for k in tensors}
        sizes = {k: int(np.prod(shapes[k], dtype=np.int64)) * dtypes[k].itemsize for k in tensors}

        def get(name):
            self.progress(name, sizes[name])
            return tensors[name]

        shards = safetensors.plan_shards(sizes, self.most, stem)
        for file, keys in shards.items():
            safetensors.write(folder / file, keys, shapes, dtypes, get)
        total = sum(sizes.values())
        if len(shards) > 1:
            where = {key: file for file, keys in shards.items() for key in keys}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(folder / f"{stem}.safetensors.index.json", index)
        return total

    def torch_file(
        self, file: pathlib.Path, tensors: names.Lazy, beside: Mapping | None = None
    ) -> int:
        """Writes a torch file, for public code that reads no other; returns bytes of all tensors.

        All tensors are in memory at once.

        Args:
            beside: what stands beside `state_dict`, which has the tensors then; None: there is
                nothing but the tensors.

        Raises:
            ImportError: torch is not installed.
            WeightError: numbers are too large for the dtype.
        """
        try:
            import torch
        except ImportError:
            raise ImportError(f"{file.name} is a torch file: pip install torch") from None
        file.parent.mkdir(parents=True, exist_ok=True)
        kind, out = safetensors.dtype_of(self.dtype), {}
        for key in tensors:
            array = np.array(tensors[key], np.float32)
            with np.errstate(over="ignore"):  # it is looked at right below
                fault = casts.fault_of(array, array.astype(kind))
            if fault and fault not in casts.ALLOWED:
                raise WeightError(f"{fault} in {key}: it can't be written as {kind}")
            out[key] = torch.from_numpy(array).to(getattr(torch, self.torch_dtype))
            self.progress(key, out[key].nbytes)
        torch.save(out if beside is None else {"state_dict": out, **beside}, file)
        return sum(tensor.nbytes for tensor in out.values())

    @property
    def torch_dtype(self) -> str:
        """The name of the dtype in a config.json."""
        return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[self.dtype]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a written folder takes over from where its weights came from.

    Attributes:
        fields: of the source's config.json, or {}: for ids of special tokens.
        tokenizer: a transformers tokenizer, or None.
        folder: whose tokenizer, processor and generation files are copied, or None.
        generation: fields of its generation_config.json, which come before `fields`.
    """

    fields: Mapping = dataclasses.field(default_factory=dict)
    tokenizer: Any = None
    folder: pathlib.Path | None = None
    generation: Mapping = dataclasses.field(default_factory=dict)


# ---- what goes beside the weights


def special_ids(fields: Mapping, tokenizer) -> dict:
    """bos, eos and pad ids, as the source's config says or else its tokenizer."""
    out = {}
    for name in SPECIAL:
        value = fields.get(name)
        value = getattr(tokenizer, name, None) if value is None else value
        if value is not None:
            out[name] = value
    return out


def write_generation(folder: pathlib.Path, source: Source) -> dict:
    """Writes generation_config.json; returns the ids of special tokens for config.json."""
    ids = special_ids(source.fields, source.tokenizer)
    write_json(folder / "generation_config.json", {**ids, **source.generation})
    return ids


def trained_source(chat, single_bos: bool, fields: Mapping, generation: Mapping) -> Source:
    """What a run takes over: its tokenizer with the chat template that it was trained with.

    An answer of it ends with the template's closing token, so that is its eos; the tokenizer's own
    and those of the base's generation config stay ids at which generation stops. Its bos and pad
    are not taken from there, which may name tokens that the run's tokenizer lacks.

    Args:
        chat: of the run; single_bos: of its config.
        fields, generation: config.json and generation_config.json of the weights that it began
            with, or {}.
    """
    ends = eos_ids(chat.close, chat.tokenizer.eos_token_id, *listed_eos(generation))
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = chat_template.to_jinja(chat, single_bos)
    generation = {k: v for k, v in generation.items() if k not in SPECIAL}
    if ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
        fields = {**fields, "eos_token_id": ends[0]}
        generation = {**generation, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    return Source(fields, tokenizer, generation=generation)


def computing_dtype(fields: Mapping) -> str:
    """What a checkpoint computes in: bfloat16, unless its config.json says float32."""
    text = fields.get("text_config")
    text = text if isinstance(text, Mapping) else {}
    saved = [t.get(key) for t in (fields, text) for key in ("dtype", "torch_dtype")]
    return "float32" if next(filter(None, saved), "") == "float32" else "bfloat16"


def context_length(fields: Mapping) -> int:
    """Positions that a checkpoint is used with: those of its config.json, 4096 at most."""
    text = fields.get("text_config")
    text = text if isinstance(text, Mapping) else fields
    given = text.get("max_position_embeddings")
    return min(given, LONGEST) if type(given) is int and given > 1 else LONGEST


def eos_ids(*ids: int | None) -> list[int]:
    """The ids that there are, each once, in this order."""
    return list(dict.fromkeys(i for i in ids if i is not None))


def listed_eos(generation: Mapping) -> list[int]:
    """The ids at which a generation_config.json says to stop; they may be one, a list or none.

    Raises:
        WeightError: they are something else.
    """
    return _listed(generation, "eos_token_id", "generation_config.json")


def _listed(fields: Mapping, name: str, where: str) -> list[int]:
    """The ids that stand under one of the `SPECIAL` names; raises as `listed_eos`."""
    given, several = fields.get(name), name == "eos_token_id"
    if given is None or (name == "pad_token_id" and type(given) is int and given == -1):
        return []  # -1 is no padding token in the files of the first Llama
    ids = given if several and isinstance(given, list) else [given]
    if any(type(id) is not int or id < 0 for id in ids):
        kinds = "neither an id nor a list of ids" if several else "not an id"
        raise WeightError(f"{where}: {name} {shown(repr(given), 100)} is {kinds}")
    return ids


def check_special_ids(
    folder: pathlib.Path, fields: Mapping, rows: int, named: pathlib.Path | None = None
) -> None:
    """Compares the ids of special tokens in a language model's config.json and
    generation_config.json with its table, and with its tokenizer, which may have more tokens.

    Args:
        folder: with these files.
        fields: of the config.json.
        rows: of the table.
        named: what messages call the folder.

    Raises:
        WeightError: one of them is not the id of a token.
    """
    where, generation = named or folder, "generation_config.json"
    file = f"{where / 'config.json'}"
    parts = {file: fields, f"{file}, text_config": fields.get("text_config")}
    if (folder / generation).exists():
        parts[f"{where / generation}"] = files.read_json(folder / generation)
    beyond = [
        (where, name, id)
        for where, part in parts.items() if isinstance(part, Mapping)
        for name in SPECIAL
        for id in _listed(part, name, where) if id >= rows
    ]  # fmt: skip
    if not beyond:
        return
    known = tokenizers.load(folder).get_vocab().values() if tokenizers.is_in(folder) else ()
    for where, name, id in beyond:
        if id not in known:
            raise WeightError(f"{where}: {name} {id} is none of the {rows} ids of the language "
                              "model, nor of its tokenizer")  # fmt: skip


def rows_of(tensors: Mapping) -> int | None:
    """Rows of a language model's table, by its published name in any system; None if there is no
    language model."""
    keys = [key for key in tensors if key.endswith("embed_tokens.weight")]
    return names.shape_of(tensors, keys[0])[0] if keys else None


def save_part(family, folder: pathlib.Path, part, source: Source, writer: Writer) -> int:
    """config.json and weights of any family, under the file names that its library looks for.

    Args:
        family: a `families.Family`.
        part: a module of it, with its config as `cfg`.

    Returns:
        Bytes of all tensors.
    """
    fields = family.config_to_hf(part.cfg)
    diffusers = "_class_name" in fields
    if not diffusers:
        fields |= {"torch_dtype": writer.torch_dtype, "dtype": writer.torch_dtype}
    stem = "diffusion_pytorch_model" if diffusers else "model"
    total = writer.weights(folder, family.export(part), stem)
    write_json(folder / "config.json", fields)
    if source.folder is not None:
        copy_files(source.folder, folder)
    return total


def copy_files(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Tokenizer, processor and generation files, as they are."""
    for file in (*tokenizers.FILES, "generation_config.json"):
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)


# ---- the card


def card(title: str, source: str, lines: list[str], licence: str = "", numbers=None) -> str:
    """README.md: front matter for the hub, where the weights come from, last metrics."""
    front = ["---", "library_name: transformers", "tags: [metamorph-jax]"]
    front += [f"license: {licence}"] if licence else []
    body = [*front, "---", "", f"# {title}", "", f"Written by `metamorph convert` from {source}."]
    body += ["", *lines]
    if numbers:
        body += ["", "## Numbers", "", "| | |", "|---|---|"]
        body += [f"| {key} | {value:.6g} |" for key, value in numbers.items()]
    return "\n".join(body) + "\n"


def run_lines(values: Mapping) -> list[str]:
    """The lines of a card on a training run, from its saved config."""
    data = values.get("data") or {}
    sources = [s for s in data.get("sources") or () if isinstance(s, Mapping)]
    lines = ["## Recipe", "", f"`{values.get('recipe')}`, stage `{values.get('stage', '?')}`.", ""]
    lines += ["## Data", ""]
    lines += [
        f"- {s.get('name') or 'source'}: `{pathlib.PurePath(str(s.get('path', '?'))).name}`"
        for s in sources
    ] or ["- not stated"]  # fmt: skip
    shown = {k: v for k, v in values.items() if k != "data"}
    block = json.dumps(shown, indent=1, sort_keys=True, default=str)
    return [*lines, "", "## Config", "", "```json", block, "```"]


def last_numbers(workdir: pathlib.Path) -> dict[str, float]:
    """The numbers of the last line of a run's metrics.jsonl; {} if there are none."""
    file = pathlib.Path(workdir) / "metrics.jsonl"
    if not file.is_file():
        return {}
    for line in reversed(file.read_text().splitlines()):
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut off while it was written
        return {k: v for k, v in values.items() if isinstance(v, int | float)}
    return {}
