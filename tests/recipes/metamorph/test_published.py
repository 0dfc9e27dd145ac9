"""MetaMorph checkpoints in the reference's names."""

import json

import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import check, oracles
from metamorph_jax.errors import WeightError
from metamorph_jax.models import build
from metamorph_jax.models.heads.visual_flow import FlowConfig
from metamorph_jax.models.vision.vit import SIZES as TOWER_SIZES
from metamorph_jax.models.vision.vit import ViTConfig
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.recipes.metamorph import published as metamorph
from tests.recipes.metamorph.tiny import change

TINY = metamorph.FAMILY.sizes["metamorph-tiny"]
WHOLE = change(TINY, dict(tower_options={"whole": True}))


def abstract(cfg):
    return nnx.eval_shape(lambda: metamorph.create(cfg, rngs=build.rngs(0)))


@pytest.fixture(scope="module")
def model():
    return metamorph.create(WHOLE, rngs=nnx.Rngs(0))


def folder_of(model, cfg, path):
    """A checkpoint folder of the whole model."""
    from safetensors.numpy import save_file

    (path / "config.json").write_text(json.dumps(metamorph.config_to_hf(cfg)))
    tensors = dict(metamorph.export_metamorph(model))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return tensors


def test_full_size_has_exactly_the_reference_s_tensors():
    """Also from the reference's own fields, which only name the tower."""
    cfg = change(recipe.Config(), dict(tower_options={"whole": True}))
    out = metamorph.export_metamorph(abstract(cfg))
    fields = metamorph.config_to_hf(cfg)
    assert sorted(out) == sorted(metamorph.published(fields))
    assert out.shape_of("model.embed_tokens.weight") == (128258, 4096)
    assert out.shape_of("lm_head.weight") == (128258, 4096)
    assert out.shape_of("vision_head.2.weight") == (1152, 4096)
    del fields["vision_config"]
    assert metamorph.config_from_hf(fields).vision.vit == cfg.vision.vit
    assert sorted(out) == sorted(metamorph.published(fields))


@pytest.mark.parametrize(
    "changes",
    [{}, {"vision": {"tower_options": {"select_layer": -2}}},
     {"head": "mlp2x_gelu", "connector": "mlp3x_gelu"},
     {"head": "single", "connector": "linear"}, {"vision": {"reduction": "mlpmixer"}},
     {"head": "flow", "flow": FlowConfig(width=16, depth=2, steps=5)},
     {"vision": {"tower": "none", "feature_width": 32, "tower_options": {}}}],
    ids=["default", "not whole", "deep", "single", "mlpmixer", "flow", "no tower"],
)  # fmt: skip
def test_all_kinds_survive_both_ways(changes):
    cfg = change(WHOLE, **changes)
    first = metamorph.create(cfg, rngs=nnx.Rngs(1))
    out = dict(metamorph.export(first))
    fields = json.loads(json.dumps(metamorph.config_to_hf(cfg)))
    assert sorted(out) == sorted(metamorph.published(fields))
    assert metamorph.config_to_hf(metamorph.config_from_hf(fields)) == fields
    read = metamorph.config_from_hf(fields)
    assert (read.head, read.flow) == (cfg.head, cfg.flow)
    again = abstract(read)
    metamorph.load_metamorph(again, out | {"model.vision_proj.weight": np.zeros((2, 2))})
    for key, value in metamorph.export_metamorph(again).items():
        assert value.tobytes() == out[key].tobytes(), key


def test_tower_names_with_and_without_vision_model(model):
    out = dict(metamorph.export_metamorph(model))
    start = metamorph.TOWER
    longer = {k.replace(start, start + "vision_model."): v for k, v in out.items()}
    again = abstract(WHOLE)
    metamorph.load_metamorph(again, longer)
    for key, value in metamorph.export_metamorph(again).items():
        np.testing.assert_array_equal(value, out[key])


def test_problems_of_all_parts_are_listed_together(model):
    out = dict(metamorph.export_metamorph(model))
    del out["vision_head.2.bias"], out["model.norm.weight"]
    out |= {"model.mm_projector.4.weight": np.zeros(1), "stray": np.zeros(1)}
    out |= {"model.vision_tower.vision_tower.extra": np.zeros(1)}
    out |= {"model.vision_tower.token_mixing.weight": np.zeros(1)}
    with pytest.raises(ValueError) as error:
        metamorph.load_metamorph(abstract(WHOLE), out)
    for words in ("2.bias", "model.norm.weight", "4.weight", "stray", "extra", "token_mixing"):
        assert words in str(error.value), words


def test_configs_that_are_not_ours():
    fields = metamorph.config_to_hf(WHOLE)
    with pytest.raises(ValueError, match="mm_use_im_start_end"):
        metamorph.config_from_hf(fields | {"mm_use_im_start_end": False})
    with pytest.raises(ValueError, match="eva"):
        metamorph.config_from_hf(fields | {"vision_config": None, "mm_vision_tower": "eva"})


def test_parity_of_every_part(model, tmp_path, capsys):
    folder_of(model, WHOLE, tmp_path)
    assert check.run(str(tmp_path), tolerance=1e-4)
    out = capsys.readouterr().out
    for row in ("connector", "head", "tower, layer 1", "llm, logits, packed"):
        assert row in out


def test_parity_finds_a_changed_head(model, tmp_path, capsys, monkeypatch):
    tensors = folder_of(model, WHOLE, tmp_path)
    tensors["vision_head.0.bias"] = tensors["vision_head.0.bias"] + 1
    monkeypatch.setattr(oracles, "of_folder", lambda *_: tensors)
    assert not check.run(str(tmp_path), tolerance=1e-4)
    wrong = [line for line in capsys.readouterr().out.splitlines() if " > " in line]
    assert len(wrong) == 1 and wrong[0].split()[0] == "head"


def test_reference_tower_is_so400m_at_its_layer():
    fields = metamorph.config_to_hf(recipe.Config()) | {"vision_config": None}
    tower = metamorph.config_from_hf(fields | {"mm_vision_select_layer": -1}).vision.vit
    assert isinstance(tower, ViTConfig) and tower.depth == 27
    assert tower.width == TOWER_SIZES["siglip-so400m-384"].width


def test_generation_fields_are_those_of_the_weights(tmp_path):
    """Of the llm's folder, or of the whole model's; an eos that is no id of the model is named."""
    cfg = recipe.Config(llm="tiny", llm_weights=str(tmp_path))
    assert metamorph.generation_fields(cfg) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [3, 5], "temperature": 0.6}')
    wanted = {"eos_token_id": [3, 5], "temperature": 0.6}
    assert metamorph.generation_fields(cfg) == wanted
    whole = recipe.Config(llm="tiny", weights=str(tmp_path))
    assert metamorph.generation_fields(whole) == wanted
    for wrong in ("[3, 10000000]", "-1", '"</s>"'):
        file.write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(WeightError, match="eos_token_id"):
            metamorph.generation_fields(cfg)
