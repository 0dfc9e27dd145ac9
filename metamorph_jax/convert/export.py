"""Writes folders that transformers (and diffusers) load unchanged.

    config.json  generation_config.json  model.safetensors (or shards and their index)
    tokenizer files  README.md
    tower/  connector/  head/  decoder/     beside the language model, for MetaMorph models

A folder is written under another name and renamed when it is whole, so that nothing half-written is
ever found under the name that was asked for. One tensor at a time is fetched, cast and written.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from metamorph_jax.convert import names, safetensors, tokenizers
from metamorph_jax.convert.families import FAMILIES
from metamorph_jax.convert.llama import config_to_hf, export_llama
from metamorph_jax.data.chat import END_TOKEN, START_TOKEN

DTYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PROCESSORS = {
    "siglip": "SiglipImageProcessor", "clip": "CLIPImageProcessor", "dinov2": "BitImageProcessor"
}  # fmt: skip
_TOWERS = {"siglip": "siglip", "clip": "clip-vision", "dinov2": "dinov2"}


def _quiet(name: str, size: int) -> None:
    pass


@contextlib.contextmanager
def whole_or_nothing(out: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which becomes `out` at the end and is removed on any error.

    Raises:
        FileExistsError: if `out` is there and not empty.
    """
    out = pathlib.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: pathlib.Path, fields: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n")


def write_weights(
    folder: pathlib.Path,
    tensors: names.Lazy,
    dtype: str,
    most: int,
    progress: Callable[[str, int], None] = _quiet,
    stem: str = "model",
) -> int:
    """Safetensors of at most `most` bytes each, with an index if there are several.

    Args:
        dtype: a value of `DTYPES`; other than floating-point tensors keep theirs.
        progress: called with each tensor and its bytes.

    Returns:
        Bytes of all tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = safetensors.dtype_of(dtype)
    integer = lambda d: d.kind in "iub"  # noqa: E731
    dtypes = {k: tensors.dtype_of(k) if integer(tensors.dtype_of(k)) else kind for k in tensors}
    shapes = {k: tensors.shape_of(k) for k in tensors}
    sizes = {k: int(np.prod(shapes[k], dtype=np.int64)) * dtypes[k].itemsize for k in tensors}

    def get(name):
        progress(name, sizes[name])
        return tensors[name]

    shards = safetensors.plan_shards(sizes, most, stem)
    for file, keys in shards.items():
        safetensors.write(folder / file, keys, shapes, dtypes, get)
    total = sum(sizes.values())
    if len(shards) > 1:
        where = {key: file for file, keys in shards.items() for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    return total


# ---- language models


def special_ids(fields: Mapping, tokenizer) -> dict:
    """bos, eos and pad ids, as the source's config says or else its tokenizer."""
    out = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields.get(name)
        value = getattr(tokenizer, name, None) if value is None else value
        if value is not None:
            out[name] = value
    return out


def write_llm(folder, llm, dtype, most, *, fields, tokenizer, generation=None, progress=None):
    """A folder for AutoModelForCausalLM and AutoTokenizer.

    Args:
        llm: a Llama; its added tokens become rows of the tables.
        dtype, most, progress: see `write_weights`.
        fields: config.json of the source, or {}: for ids of special tokens.
        tokenizer: a transformers tokenizer (extended already), a folder to copy it from, or None.
        generation: fields of a generation_config.json; by default the special ids alone.

    Returns:
        Bytes of all tensors.
    """
    real = None if isinstance(tokenizer, pathlib.Path) else tokenizer
    ids = special_ids(fields, real)
    name = _TORCH_NAMES[dtype]
    write_json(folder / "config.json", config_to_hf(llm.cfg, **ids, torch_dtype=name, dtype=name))
    write_json(folder / "generation_config.json", generation or ids)
    total = write_weights(folder, export_llama(llm), dtype, most, progress or _quiet)
    if isinstance(tokenizer, pathlib.Path):
        copy_files(tokenizer, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return total


# ---- MetaMorph models


def write_metamorph(folder, model, dtype, most, *, fields, tokenizer, progress=None) -> int:
    """The language model for transformers, and the other parts in folders of their own.

    tower/ loads with transformers' vision model of its family; connector/ and head/ hold the
    tensors under the names of the reference implementation, and a config.json that says what they
    are.

    Returns:
        Bytes of all tensors.
    """
    progress = progress or _quiet
    added = [START_TOKEN, END_TOKEN][: model.llm.cfg.added_tokens]
    tokenizer = tokenizers.extend(tokenizer, model.llm.cfg.vocab_size, added)
    total = write_llm(
        folder, model.llm, dtype, most, fields=fields, tokenizer=tokenizer, progress=progress
    )
    P, C = model.feature_shape
    cfg = model.cfg
    visual = {
        "image_tokens": P,
        "reduction": cfg.vision.reduction,
        "normalize_vision": cfg.vision.normalize,
        "apply_softmax": cfg.vision.softmax,
        "image_start_id": model.image_start,
        "image_end_id": model.image_end,
    }
    from metamorph_jax.convert.metamorph import CONNECTOR, HEAD, REDUCER, sequential

    D = model.llm.cfg.width
    parts = [("connector", CONNECTOR, model.connector, {"kind": cfg.connector, "in": C, "out": D})]
    if model.head is not None:
        parts.append(("head", HEAD, model.head, {"kind": cfg.head, "in": D, "out": C}))
    for name, prefix, part, what in parts:
        tensors = names.lazy_torch_dict(part, prefix, rename=sequential(part.linears))
        if name == "connector":  # what lies between tower and connector goes with it
            tensors.update(names.lazy_torch_dict(model.vision.reducer, REDUCER))
        total += write_weights(folder / name, tensors, dtype, most, progress)
        write_json(folder / name / "config.json", {"part": name, **what, **visual})
    if model.vision.tower is not None:
        total += write_tower(folder / "tower", model.vision.tower, dtype, most, progress)
    return total


def write_tower(folder, tower, dtype, most, progress=_quiet) -> int:
    """A folder for transformers' vision model of the tower's family, with its processor."""
    cfg = tower.cfg
    total = write_part(folder, FAMILIES[_TOWERS[cfg.layout]], tower, cfg, dtype, most, progress)
    processor = {
        "image_processor_type": _PROCESSORS[cfg.layout],
        "do_resize": True,
        "size": {"height": cfg.size, "width": cfg.size},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(x) for x in np.broadcast_to(cfg.mean, 3)],
        "image_std": [float(x) for x in np.broadcast_to(cfg.std, 3)],
        "do_convert_rgb": True,
    }
    write_json(folder / "preprocessor_config.json", processor)
    return total


def write_decoder(folder, recipe, dtype, most, progress=_quiet) -> int:
    """The parts of a diffusion decoder: a UNet and an autoencoder as diffusers has them, the rest
    (projector, statistics, a transformer in place of the UNet) under our names."""
    from metamorph_jax.models.diffusion.unet import UNet

    total, parts = 0, {"projector": recipe.projector}
    decoder, cfg, how = recipe.decoder, recipe.decoder.cfg, (dtype, most, progress)
    if isinstance(decoder.denoiser, UNet):
        family = FAMILIES["sd-unet"]
        total += write_part(folder / "unet", family, decoder.denoiser, cfg.denoiser, *how)
    else:
        parts["denoiser"] = decoder.denoiser
    if cfg.vae:
        total += write_part(folder / "vae", FAMILIES["sd-vae"], decoder.vae, cfg.vae, *how)
    for name, part in parts.items():
        tensors = names.lazy_torch_dict(part)
        total += write_weights(folder / name, tensors, dtype, most, progress)
    statistics = names.Lazy()
    for name, value in (
        ("feature_mean", recipe.feature_mean),
        ("feature_scale", recipe.feature_scale),
        ("pixel_mean", decoder.pixel_mean),
        ("pixel_scale", decoder.pixel_scale),
    ):
        statistics[name] = np.asarray(value[...])
    return total + write_weights(folder / "statistics", statistics, "F32", most, progress)


def write_part(folder, family, part, cfg, dtype, most, progress=_quiet, files=None) -> int:
    """config.json and weights of any family, under the file names that its library looks for.

    `files` is a folder whose tokenizer and processor files are copied.
    """
    fields = family.config_to_hf(cfg)
    if "_class_name" not in fields:
        fields |= {"torch_dtype": _TORCH_NAMES[dtype], "dtype": _TORCH_NAMES[dtype]}
    stem = "diffusion_pytorch_model" if "_class_name" in fields else "model"
    tensors = family.export(part)
    if not isinstance(tensors, names.Lazy):
        tensors, found = names.Lazy(), tensors
        tensors.update(found)
    total = write_weights(folder, tensors, dtype, most, progress, stem)
    write_json(folder / "config.json", fields)
    if files is not None:
        copy_files(files, folder)
    return total


def copy_files(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Tokenizer and processor files, as they are."""
    for file in tokenizers.FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)


# ---- the card


def card(title: str, source: str, lines: list[str], licence: str = "", numbers=None) -> str:
    """README.md: front matter that the hub reads, how it was made, what was measured."""
    front = ["---", "library_name: transformers", "tags: [metamorph-jax]"]
    front += [f"license: {licence}"] if licence else []
    body = [*front, "---", "", f"# {title}", "", f"Written by `metamorph convert` from {source}."]
    body += ["", *lines]
    if numbers:
        body += ["", "## Numbers", "", "| | |", "|---|---|"]
        body += [f"| {key} | {value:.6g} |" for key, value in numbers.items()]
    return "\n".join(body) + "\n"


def run_lines(values: Mapping) -> list[str]:
    """What a card says about a training run, from its saved config."""
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
