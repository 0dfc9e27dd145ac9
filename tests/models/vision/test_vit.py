"""Towers against transformers on tiny random weights, and their full sizes by eval_shape."""

import dataclasses
import tempfile

import jax
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import hf
from metamorph_jax.convert.vit import export_vit, load_vit
from metamorph_jax.models.build import rngs
from metamorph_jax.models.vision import vit
from metamorph_jax.nn import sincos
from tests.recipes.minigpt5 import golden

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"


def fast(f):
    return jax.jit(f, compiler_options=FAST)


def oracle(layout: str, cfg: vit.ViTConfig):
    """transformers' vision model of the same config, random weights, eval mode."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    common = dict(hidden_size=cfg.width, num_hidden_layers=cfg.layers, patch_size=cfg.patch,
                  num_attention_heads=cfg.heads, image_size=cfg.image_size)  # fmt: skip
    torch.manual_seed(0)
    if layout == "siglip":
        config = transformers.SiglipVisionConfig(intermediate_size=cfg.mlp_width, **common)
        model = transformers.SiglipVisionModel(config)
    elif layout == "clip":
        config = transformers.CLIPVisionConfig(intermediate_size=cfg.mlp_width, **common)
        model = transformers.CLIPVisionModel(config)
    else:
        config = transformers.Dinov2Config(mlp_ratio=cfg.mlp_width // cfg.width, **common)
        model = transformers.Dinov2Model(config)
    with torch.no_grad():  # biases, scales and norms start as constants: make them tell
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def hidden_states(model, pixels, **kw):
    import torch

    with torch.no_grad():
        x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        out = model(x, output_hidden_states=True, **kw)
    return [h.numpy() for h in out.hidden_states]


def published(model) -> dict[str, np.ndarray]:
    """Tensors by the names that the model is saved under."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {k: np.array(v) for k, v in hf.Tensors(folder).items()}


def build(cfg, model):
    tower = vit.ViT(cfg, rngs=nnx.Rngs(1))
    load_vit(tower, published(model))
    return tower


@pytest.mark.parametrize("layout", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("select", [-1, -2, 0, 1])
def test_hidden_states(layout, select):
    base = dataclasses.replace(vit.SIZES[f"{layout}-tiny"], image_size=36)  # 4 px of border
    model = oracle(layout, base)
    pixels = np.random.default_rng(0).normal(size=(2, 36, 36, 3)).astype(np.float32)
    theirs = hidden_states(model, pixels)[select]
    tower = build(dataclasses.replace(base, select_layer=select), model)
    ours = fast(tower)(pixels)
    np.testing.assert_allclose(ours, theirs[:, int(base.class_token) :], atol=2e-5)


def test_select_by_index_and_by_count_agree_and_skip_layers():
    base = vit.SIZES["dinov2-tiny"]
    assert dataclasses.replace(base, select_layer=1).depth == 1
    assert dataclasses.replace(base, select_layer=-2).depth == base.layers - 1
    tower = vit.ViT(dataclasses.replace(base, select_layer=1), rngs=nnx.Rngs(0))
    assert tower.layers.mlp.fc1.kernel.shape[0] == 1  # layers behind the selected don't exist


@pytest.mark.parametrize("layout", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("size", [16, 24, 48])
def test_other_input_sizes(layout, size):
    """Position tables are resized as transformers does it at run time."""
    base = vit.SIZES[f"{layout}-tiny"]
    model = oracle(layout, base)
    pixels = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
    kw = {} if layout == "dinov2" else {"interpolate_pos_encoding": True}
    theirs = hidden_states(model, pixels, **kw)[-1]
    tower = build(dataclasses.replace(base, input_size=size, select_layer=-1), model)
    np.testing.assert_allclose(fast(tower)(pixels), theirs[:, int(base.class_token) :], atol=2e-5)


@pytest.mark.parametrize("aligned", [False, True])
def test_bicubic_equals_torch(aligned):
    torch = pytest.importorskip("torch", reason=ORACLE)
    table = np.random.default_rng(0).normal(size=(1 + 49, 5)).astype(np.float32)
    resize = torch.nn.functional.interpolate
    for grid in (3, 8, 16):
        square = torch.from_numpy(table[1:].reshape(1, 7, 7, 5).transpose(0, 3, 1, 2).copy())
        theirs = resize(square, size=(grid, grid), mode="bicubic", align_corners=aligned)
        theirs = theirs.numpy()[0].transpose(1, 2, 0).reshape(-1, 5)
        if aligned:
            ours = sincos.resize_table(table, grid, 1, sincos.aligned_bicubic)
        else:
            ours = vit.resize_positions(table, grid, 1)
        np.testing.assert_allclose(ours[1:], theirs, atol=5e-6)
        np.testing.assert_array_equal(ours[0], table[0])


def test_resize_needs_a_square():
    with pytest.raises(ValueError, match="50 rows is not a square plus 0"):
        vit.resize_positions(np.zeros((50, 4)), 3, 0)


def test_uint8_pixels_are_normalised_on_the_device():
    cfg = vit.SIZES["clip-tiny"]
    tower = vit.ViT(cfg, rngs=nnx.Rngs(0))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    floats = (pixels / 255.0 - np.array(cfg.mean)) / np.array(cfg.std)
    floats = floats.astype(np.float32)
    np.testing.assert_allclose(fast(tower)(pixels), fast(tower)(floats), atol=1e-5)


def test_wrong_picture_size_is_an_error():
    tower = vit.ViT(vit.SIZES["clip-tiny"], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="32 x 32 images, not 32 x 40"):
        tower(np.zeros((1, 32, 40, 3), np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_gives_the_same_gradients(dtype):
    def grads(remat):
        cfg = dataclasses.replace(vit.SIZES["siglip-tiny"], remat=remat, dtype=dtype)
        tower = vit.ViT(cfg, rngs=nnx.Rngs(0))
        graph, weights = nnx.split(tower)
        pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
        return fast(jax.grad(lambda w: (nnx.merge(graph, w)(pixels) ** 2).mean()))(weights)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4),
        grads(False), grads(True),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["siglip", "clip", "dinov2"])
def test_export_gives_the_published_tensors(layout):
    cfg = dataclasses.replace(vit.SIZES[f"{layout}-tiny"], select_layer=-1, final_norm=True)
    tensors = published(oracle(layout, cfg))
    tower = vit.ViT(cfg, rngs=nnx.Rngs(0))
    load_vit(tower, tensors)
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in tensors) else ""
    out = export_vit(tower, prefix)
    dropped = {k for k in tensors if k not in out}
    assert all("head." in k or "mask_token" in k or "position_ids" in k for k in dropped), dropped
    for name, array in out.items():
        np.testing.assert_array_equal(array, tensors[name], err_msg=name)


def test_left_over_and_missing_keys_are_errors():
    cfg = vit.SIZES["siglip-tiny"]
    tensors = export_vit(vit.ViT(cfg, rngs=nnx.Rngs(0)))
    tensors["vision_model.encoder.layers.0.extra"] = np.zeros(1)
    del tensors["vision_model.encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(ValueError) as error:
        load_vit(vit.ViT(cfg, rngs=nnx.Rngs(0)), tensors)
    assert "extra" in str(error.value) and "1.mlp.fc1.bias" in str(error.value)


def count(cfg) -> int:
    tower = nnx.eval_shape(lambda: vit.ViT(cfg, rngs=rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(tower, nnx.Param)))


@pytest.mark.parametrize(
    "size, total",
    [
        # From the published shapes: layers, patches, positions, final norm.
        ("siglip-so400m-384", 27 * (4 * 1152**2 + 2 * 1152 * 4304 + 9 * 1152 + 4304)
         + 588 * 1152 + 1152 + 729 * 1152 + 2 * 1152),
        ("clip-l-336", 303_507_456),
        ("dinov2-s14", 22_056_576 - 384),  # less the mask token
    ],
)  # fmt: skip
def test_published_sizes(size, total):
    cfg = dataclasses.replace(vit.SIZES[size], select_layer=-1, final_norm=True)
    assert count(cfg) == total


def test_so400m_is_428_million_with_its_pooling_head():
    cfg = dataclasses.replace(vit.SIZES["siglip-so400m-384"], final_norm=True)
    D, F = cfg.width, cfg.mlp_width
    head = D + 4 * D * D + 4 * D + 2 * D + 2 * D * F + F + D  # probe, attention, norm, MLP
    assert count(cfg) + head == 428_225_600


# ---- EVA


def eva_config(fields: dict) -> vit.ViTConfig:
    """Of the case; fields that have no meaning here must say what the layout does."""
    assert fields["act"].startswith("gelu (exact") and fields["qkv_bias"].startswith("q and v only")
    assert fields["abs_pos_embed"] and not fields["rel_pos_bias"] and not fields["final_norm"]
    return dataclasses.replace(
        vit.SIZES["eva-g-224"],
        image_size=fields["img_size"],
        patch=fields["patch_size"],
        width=fields["embed_dim"],
        mlp_width=fields["mlp_hidden"],
        layers=fields["depth"],
        heads=fields["num_heads"],
        norm_eps=fields["block_norm_eps"],
    )


@pytest.mark.golden
def test_eva_equals_the_reference(golden_root):
    case = golden.Case(golden_root, "eva_vit")
    cfg = eva_config(case.config)
    weights = case.weights()
    own = {k: v for k, v in weights.items() if not k.startswith("ln_vision.")}
    tower = nnx.eval_shape(lambda: vit.ViT(cfg, rngs=rngs(0)))
    load_vit(tower, own)
    norm = nnx.LayerNorm(cfg.width, epsilon=case.config["ln_vision_eps"], rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = weights["ln_vision.weight"], weights["ln_vision.bias"]
    pixels = case["in.image"].transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        x, blocks = tower.embed(pixels), []
        for i in range(cfg.layers):
            x = tower.run(x, i, i + 1)
            blocks.append(x)
        features = fast(tower)(pixels)
    for key, found in (("block_outputs", np.stack(blocks)), ("features", features),
                       ("ln_vision", norm(features))):  # fmt: skip
        np.testing.assert_allclose(found, case[f"out.{key}"], rtol=1e-4, atol=1e-5, err_msg=key)
    resized = case["out.pos_embed_interpolated"]
    grid = round((resized.shape[1] - 1) ** 0.5)
    larger = dataclasses.replace(cfg, input_size=grid * cfg.patch)
    tower = nnx.eval_shape(lambda: vit.ViT(larger, rngs=rngs(0)))
    load_vit(tower, own)
    np.testing.assert_allclose(tower.position_embedding[...], resized[0], rtol=1e-4, atol=1e-5)
    case.check_all_read()
