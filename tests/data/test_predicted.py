import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data import cache, images
from metamorph_jax.data.config import InputSpec
from metamorph_jax.data.decoder_pairs import DecoderPairs
from metamorph_jax.data.predicted import Predicted, save
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.data.views import Single
from metamorph_jax.recipe import Shard


@pytest.fixture
def made(tmp_path):
    """(refs, feature cache, file of predictions for all but the last image)."""
    refs = []
    for k in range(6):
        Image.new("RGB", (8, 8), (40 * k, 0, 0)).save(tmp_path / f"{k}.png")
        refs.append(ImageRef(str(tmp_path / f"{k}.png")))
    preprocess = images.Preprocess(8)
    views = Single(2, preprocess)
    spec = cache.feature_spec(views, InputSpec(views, 3, "test"))
    compute = lambda pixels: np.zeros((len(pixels), 2, 3), np.float32)  # noqa: E731
    features, _ = cache.build(str(tmp_path / "cache"), spec, refs, views, compute, 2)
    path = str(tmp_path / "predicted.npz")
    values = 1 + np.arange(2, dtype=np.float32)[:, None, None] * np.ones((2, 2, 3), np.float32)
    save(path, [r.key() for r in refs], [0, 1, 0, 1, 0, -1], values)
    return refs, preprocess, features, path


def pairs(made, share):
    refs, preprocess, features, path = made
    return DecoderPairs(
        refs, preprocess, Shard(6), seed=3, features=features, predicted=Predicted(path),
        predicted_share=share,
    )  # fmt: skip


def test_every_prediction_goes_with_its_image(made):
    batch = next(pairs(made, 1.0))
    for image, feature in zip(batch.image, batch.features, strict=True):
        number = int(image[0, 0, 0]) // 40
        assert (feature == (0 if number == 5 else 1 + number % 2)).all()


def test_the_share_is_kept_and_the_choice_repeats(made):
    some = pairs(made, 0.5)
    batches = [next(some) for _ in range(60)]
    used = np.mean([(b.features[:, 0, 0] > 0).mean() for b in batches])
    assert 0.3 < used < 0.55  # half of five in six
    again = pairs(made, 0.5)
    next(again)
    again.set_state(again.get_state())
    for expected in batches[1:5]:
        np.testing.assert_array_equal(next(again).features, expected.features)


def test_predictions_of_other_images_are_an_error_and_none_at_all_is_not(made, tmp_path):
    refs, preprocess, features, _ = made
    path = str(tmp_path / "other.npz")
    save(path, ["elsewhere.png"], [0], np.ones((1, 2, 3), np.float32))
    with pytest.raises(ValueError, match="belong to other images"):
        pairs((refs, preprocess, features, path), 1.0)
    save(path, [r.key() for r in refs], [-1] * len(refs), np.ones((0, 2, 3), np.float32))
    assert not next(pairs((refs, preprocess, features, path), 1.0)).features.any()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        Predicted(str(tmp_path / "nothing.npz"))
