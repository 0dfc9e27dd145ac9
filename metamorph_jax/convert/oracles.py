"""The other side of `metamorph convert --check`: the library that a checkpoint was made for.

    hf:OWNER/NAME, a folder            transformers or diffusers, from the same folder
    FILE.gguf, gguf:FILE, pkg:NAME     transformers, by its own reader of GGUF files
    FILE.onnx, onnx:FILE, pkg:NAME     onnxruntime, the graph in the file as it is

Torch and what stands on it is imported here and in `compare.py` only, and only when asked for
(extra `oracle`).
"""

import dataclasses
import pathlib
import types
from collections.abc import Callable, Mapping

import numpy as np

from metamorph_jax.convert import diffusion, families, gguf, hf, onnx, packages, specs
from metamorph_jax.convert.compare import missing, oracle


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both sides of one model.

    Attributes:
        title: what follows the spec when it is printed.
        family: of the model.
        fields: of its config.json.
        tensors: published name -> array, for our side.
        theirs: makes the other side.
        library: its name.
        changes: fields of our config that the published one doesn't determine.
    """

    title: str
    family: families.Family
    fields: Mapping
    tensors: Mapping
    theirs: Callable
    library: str = "transformers"
    changes: Mapping = dataclasses.field(default_factory=dict)


def pairs(spec: str) -> list[Pair]:
    """What a spec stands for: one model, or the parts of a pipeline.

    Raises:
        ValueError: if there is nothing that it could be compared with; says why.
    """
    if spec == specs.RANDOM:
        raise ValueError('"random" is not a checkpoint: there is nothing to compare with')
    if spec.startswith("workdir:"):
        raise ValueError(
            "no other library reads a training run: write it for one "
            f"(metamorph convert --from {spec} --out DIR), then check DIR"
        )
    file = _file(spec)
    if file is not None:
        return [_of_gguf(file) if file.suffix == ".gguf" else _of_onnx(file)]
    where = hf.find(spec)
    if where.is_file():
        raise ValueError(
            f"{where} has tensors, but doesn't say which model they belong to: name the folder "
            "that has them and a config.json"
        )
    return [_of_folder(title, family, path) for title, family, path in _parts(where)]


def _file(spec: str) -> pathlib.Path | None:
    """The GGUF or ONNX file that a spec names; None for everything else."""
    if packages.is_package(spec):
        file = packages.find(spec)
        if file.suffix not in (".gguf", ".onnx"):
            raise ValueError(f"{spec} holds data, not weights")
        return file
    for ending in (".gguf", ".onnx"):
        file = specs.file_of(spec, ending)
        if file is not None:
            if file.suffix != ending:
                raise ValueError(f"{spec}: expected a file that ends in {ending}")
            return file
    return None


# ---- folders


def _parts(folder: pathlib.Path) -> list[tuple[str, families.Family, pathlib.Path]]:
    """(title, family, folder) of what a folder holds."""
    if not diffusion.is_pipeline(folder):
        return [("", families.detect(folder), folder)]
    names = diffusion.PARTS.items()
    return [(f"/{part}", families.known()[name], folder / part) for part, name in names]


def _of_folder(title: str, family: families.Family, folder: pathlib.Path) -> Pair:
    fields, theirs = families.read_config(folder), lambda: of_folder(family, folder)
    return Pair(title, family, fields, family.read(folder), theirs, family.reference.library)


def of_folder(family: families.Family, folder: pathlib.Path):
    """The library's model of a folder."""
    return family.reference.load(folder)


# ---- GGUF


def _of_gguf(file: pathlib.Path) -> Pair:
    reader = gguf.open_gguf(file)
    fields = gguf.read_config(reader)
    family = families.of_fields(fields, str(file))
    tensors = gguf.Weights(reader, fields)
    return Pair("", family, fields, tensors, lambda: of_gguf(file, fields))


def of_gguf(file: pathlib.Path, fields: Mapping):
    """What transformers' own reader makes of a GGUF file.

    It ignores the factors by which Llama 3.1 stretches its rotation; those alone come from our
    reader.
    """
    torch, transformers = oracle()
    where = dict(gguf_file=file.name, trust_remote_code=False)
    config = transformers.AutoConfig.from_pretrained(str(file.parent), **where)
    scaling = fields.get("rope_scaling")
    if scaling is not None:
        config.rope_parameters = {"rope_theta": fields["rope_theta"], **scaling}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent), config=config, dtype=torch.float32, attn_implementation="eager",
            **where,
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise ImportError(f"transformers can't read {file}: {error}") from error
    return model.eval()


# ---- ONNX


def _of_onnx(file: pathlib.Path) -> Pair:
    fields, tensors = onnx.read_dinov2(file)
    side = onnx.input_side(file) or fields["image_size"]
    changes = {"input_size": side, "whole": False}
    theirs = lambda: OnnxTower(file)  # noqa: E731
    family = families.known()["dinov2"]
    return Pair("", family, fields, tensors, theirs, "onnxruntime", changes)


class OnnxTower:
    """A graph of a ViT, called as transformers' towers are: hidden states and the final norm."""

    def __init__(self, file: pathlib.Path):
        try:
            import onnxruntime
        except ImportError as error:
            raise missing(error.name) from None
        model, *names = onnx.with_hidden_states(file)
        self._input, self._names = names
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # no warnings about the file's graph
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, pixels, output_hidden_states: bool = True):
        """pixels: torch float32[B, 3, h, w], one by one: a graph may have a fixed batch."""
        rows = [self._session.run(self._names, {self._input: x[None].numpy()}) for x in pixels]
        *hidden, last = (np.concatenate(part) for part in zip(*rows, strict=True))
        return types.SimpleNamespace(hidden_states=hidden, last_hidden_state=last)
