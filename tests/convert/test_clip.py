"""CLIP with both towers and its projections against transformers, at tiny size."""

import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import clip, hf
from metamorph_jax.errors import ConfigError, WeightError
from metamorph_jax.models import build
from metamorph_jax.models.vision.clip import CLIP

from .conftest import ORACLE


def loaded(fields, tensors):
    model = nnx.eval_shape(lambda: CLIP(clip.config_from_hf(fields), rngs=build.rngs(0)))
    clip.load_clip(model, tensors)
    return model


def test_features_of_images_and_texts_are_those_of_transformers(tiny):
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    folder = tiny("clip-both")
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    ours = loaded(hf.read_config(folder), hf.Tensors(folder))
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    ids = rng.integers(2, 60, (3, 16))
    ids[:, 0], ids[0, 5:], ids[1, 9:], ids[2, -1] = 62, 63, 63, 63  # ends, filled up with ends
    with torch.no_grad():
        out = theirs(torch.tensor(ids), torch.tensor(pixels.transpose(0, 3, 1, 2)))
    images = np.asarray(ours.image_features(pixels))
    texts = np.asarray(ours.text_features(ids))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(unit(images), out.image_embeds.numpy(), atol=2e-6)
    np.testing.assert_allclose(unit(texts), out.text_embeds.numpy(), atol=2e-6)
    scale = np.exp(np.asarray(ours.logit_scale[...]))
    logits = scale * unit(images) @ unit(texts).T
    np.testing.assert_allclose(logits, out.logits_per_image.numpy(), atol=1e-4)


def test_what_doesn_t_fit_is_named(tiny):
    folder = tiny("clip-both")
    fields, tensors = hf.read_config(folder), dict(hf.Tensors(folder))
    del tensors["text_projection.weight"]
    with pytest.raises(WeightError, match=r"missing \(1\): text_projection.weight"):
        loaded(fields, tensors)
    with pytest.raises(WeightError, match=r"left over \(1\): foreign"):
        loaded(fields, tensors | {"foreign": np.zeros(1)})
    with pytest.raises(ConfigError, match="'siglip' is not clip"):
        clip.config_from_hf(hf.read_config(tiny("siglip-both")))
