"""What a MiniGPT-5 model reads: its specs, batches, and what caches hold."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from metamorph_jax.config import build, load_config
from metamorph_jax.convert import blip2, families, specs, vit
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.data.config import (
    CacheConfig,
    DataConfig,
    ImageConfig,
    OrderConfig,
    ReadingConfig,
    RowConfig,
    SourceConfig,
)
from metamorph_jax.errors import ConfigError, DataError, MissingFile
from metamorph_jax.models.build import rngs
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.vae import AutoencoderKL, VAEConfig
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes import minigpt5 as recipe
from metamorph_jax.recipes.minigpt5 import input as inputs
from metamorph_jax.recipes.minigpt5 import moments, voken_ids
from tests.recipes.minigpt5 import golden, made, tiny

CONFIGS = pathlib.Path(__file__).parents[3] / "configs/minigpt5"
pytestmark = pytest.mark.usefixtures("quick_compile")
VAE = VAEConfig.tiny(sample_size=8, block_out_channels=(8, 8))
LATENT = DiffusionConfig(
    UNetConfig.tiny(in_channels=4, out_channels=4, block_out_channels=(8,), num_heads=(2,),
                    down_block_types=("CrossAttnDownBlock2D",), norm_num_groups=4,
                    up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16, sample_size=4),
    VAE,
)  # fmt: skip


class Captions:
    """Start 62, letters, end 63."""

    def __call__(self, text, truncation, max_length):
        return {"input_ids": [*[62, *(ord(c) % 50 for c in text)][: max_length - 1], 63]}


@pytest.fixture
def tokenizers(monkeypatch):
    """Every spec of a tokenizer is that of words, "captions" that of captions."""
    words = made.Words()
    known = {"captions": Captions()}
    monkeypatch.setattr(specs, "tokenizer", lambda spec: known.get(spec, words))
    return words


@pytest.fixture
def stories(tmp_path):
    """The sources of a config: a story of five steps."""
    steps, mapping = made.five_steps()
    path = made.vist(tmp_path, steps, mapping)
    made.pictures(tmp_path, *mapping.values())
    return (SourceConfig(path, kind="vist"),)


def data_of(sources, **more):
    row = RowConfig("vokens", length=200, images=6, packing="pad")
    return DataConfig(sources=sources, row=row, order=OrderConfig(shuffle=False), **more)


def check_shapes(batch, data, cfg):
    """A batch has the shapes that the configs alone tell."""
    wanted = inputs.batch_spec(data, cfg, len(batch.tokens))
    found = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    assert found == jax.tree.map(lambda x: (x.shape, x.dtype), wanted)


def test_spec():
    """Images that are read are cut to a square, those to be drawn padded with white; of the vokens
    the tail after the first has no label."""
    cfg = dataclasses.replace(tiny.TINY, unsupervised_tail=1)
    spec = inputs.input_spec(cfg)
    wide = Image.new("RGB", (64, 32), (9, 9, 9))
    wide.paste((200, 0, 0), (0, 0, 16, 32))
    assert (spec.views.pixels(wide) == 9).all()
    drawn = spec.drawings.preprocess(wide)
    assert (drawn[0] == 255).all() and (drawn[len(drawn) // 2, 0] == (200, 0, 0)).all()
    assert spec.drawings.ids == voken_ids(cfg) and spec.drawings.unlearnt == (1,)
    assert spec.drawings.caption is None and spec.drawings.latents is None
    assert spec.feature_shape == (tiny.P, cfg.qformer.resampler.width)
    other = dataclasses.replace(cfg, qformer_weights="elsewhere")
    assert inputs.input_spec(other).tower != spec.tower
    latents = inputs.input_spec(dataclasses.replace(cfg, decoder=LATENT)).drawings.latents
    assert latents.shape == (4, 4, 4) and latents.scale == VAE.scaling_factor


def test_batches_of_captions(tokenizers, tmp_path):
    path = made.cc3m(tmp_path, ["A kite!", "red"])
    cfg = dataclasses.replace(tiny.TINY, caption_tokenizer="captions", caption_pad=7)
    data = data_of((SourceConfig(path, kind="cc3m"),))
    batch = next(inputs.open_data(data, cfg, Shard(3)))
    check_shapes(batch, data, cfg)
    a, kite = (ord(c) % 50 for c in "a "), [ord(c) % 50 for c in "kite"]
    first = [62, *a, kite[0], kite[1], 63]
    assert batch.drawings.captions[:2, 0].tolist() == [first] * 2  # the second asks for it in words
    assert batch.drawings.captions[2, 0].tolist() == [62, *(ord(c) % 50 for c in "red"), 63, 7]
    start = batch.drawings.start[0, 0]
    ids = list(voken_ids(cfg))
    assert batch.tokens[0, start + 1 : start + 4].tolist() == ids and batch.tokens[0, 0] == made.BOS
    assert batch.text_targets[0, start : start + 3].tolist() == [ids[0], -1, ids[2]]
    assert not batch.images.valid.any() and batch.drawings.valid.sum() == 3


def test_a_long_turn_ends_a_dialogue(tokenizers, tmp_path):
    """By the tokens of the model's own tokenizer."""
    turns = [made.turn("a"), made.turn("b"), made.turn("c " * 51), made.turn("d")]
    sources = (SourceConfig(made.mmdialog(tmp_path, [turns]), kind="mmdialog"),)
    order = OrderConfig(shuffle=False, epochs=1)
    data = dataclasses.replace(data_of(sources), order=order)
    batches = inputs.open_data(data, tiny.TINY, Shard(1))
    assert len(list(batches)) == 1 and batches.skipped == {"conversations/long_turn": 2}


def test_features_of_the_cache(tokenizers, stories, tmp_path):
    """They are what the model makes of the pixels, and the row is the same."""
    model = tiny.make()
    tensors = {**vit.export_vit(model.vision.tower), **blip2.export_qformer(model.connector)}
    path = str(tmp_path / "blip2.safetensors")
    save_file({key: np.ascontiguousarray(tensors[key]) for key in tensors}, path)
    encoder = dataclasses.replace(tiny.TINY.vision, weights=path)
    cfg = dataclasses.replace(tiny.TINY, vision=encoder, qformer_weights=path)
    plain = dataclasses.replace(
        data_of(stories), order=OrderConfig(shuffle=False, fixed_choices=True)
    )
    cached = dataclasses.replace(plain, cache=CacheConfig(features=str(tmp_path / "cache")))
    found = next(inputs.open_data(cached, cfg, Shard(3)))
    wanted = next(inputs.open_data(plain, cfg, Shard(3)))
    check_shapes(found, cached, cfg)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    valid = wanted.images.valid
    assert valid.any() and found.images.pixels is None
    features = tiny.fast(lambda pixels: model.visual_features(pixels))(wanted.images.pixels[valid])
    np.testing.assert_allclose(found.images.features[valid], features, atol=1e-4)


def test_features_without_weights(tokenizers, stories, tmp_path):
    data = data_of(stories, cache=CacheConfig(features=str(tmp_path)))
    with pytest.raises(ConfigError, match="vision.weights and config.model.qformer_weights"):
        inputs.open_data(data, tiny.TINY, Shard(1))
    with pytest.raises(ConfigError, match="train_connector has no use for"):
        inputs.open_data(data, dataclasses.replace(tiny.TINY, train_connector=True), Shard(1))
    data = data_of(stories, cache=CacheConfig(drawings=str(tmp_path)))
    with pytest.raises(ConfigError, match="draws nothing by one"):
        inputs.open_data(data, tiny.TINY, Shard(1))
    latent = dataclasses.replace(tiny.TINY, decoder=LATENT)
    with pytest.raises(ConfigError, match="weights config.model.sd_weights names"):
        inputs.open_data(data, latent, Shard(1))


@pytest.fixture(scope="module")
def vae():
    rng = np.random.default_rng(3)
    graph, state = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(VAE, rngs(0))))
    value = lambda x: rng.normal(0.0, 0.2, x.shape).astype(np.float32)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(value, state))


@pytest.fixture
def latent(vae, tmp_path):
    """The config of a model that draws by a published autoencoder."""
    families.known()["sd-vae"].write(tmp_path / "sd/vae", vae, Source(), Writer())
    return dataclasses.replace(
        tiny.TINY, decoder=LATENT, sd_weights=str(tmp_path / "sd"), text_encoder=None
    )


def test_latents_of_the_cache(tokenizers, stories, latent, vae, tmp_path):
    """They are samples of the moments, scaled; training on them is training on the images."""
    data = data_of(stories, cache=CacheConfig(drawings=str(tmp_path / "cache")),
                   images=ImageConfig(mirror=0.5))  # fmt: skip
    batch = next(inputs.open_data(data, latent, Shard(2)))
    check_shapes(batch, data, latent)
    plain = dataclasses.replace(
        data, cache=CacheConfig(), order=OrderConfig(shuffle=False, fixed_choices=True)
    )
    pixels = next(inputs.open_data(plain, latent, Shard(2))).drawings.pixels
    of_values = tiny.fast(lambda x: vae.moments(x))
    mean, logvar = np.split(of_values(pixels[:, 0] / np.float32(127.5) - 1), 2, -1)
    noise = (batch.drawings.latents[:, 0] / VAE.scaling_factor - mean) / np.exp(logvar / 2)
    assert batch.drawings.valid[:, 0].all() and 0.7 < noise.std() < 1.3
    model = nnx.eval_shape(lambda: recipe.create(latent, rngs(0)))
    names = [{work.part for work in model.work(inputs.batch_spec(one, latent, 2))}
             for one in (data, plain)]  # fmt: skip
    assert names[1] - names[0] == {"autoencoder"} and not names[0] - names[1]


def test_moments_of_the_reference_script(tokenizers, stories, latent, vae, tmp_path, capsys):
    """Files of pixels in [-1, 1] are taken over, and what has none is computed; those of [0, 1], as
    its script makes them, are refused."""
    torch = pytest.importorskip("torch")
    spec = inputs.input_spec(latent)
    data = data_of(stories, cache=CacheConfig(drawings=str(tmp_path / "cache")))
    folder = tmp_path / "made"
    with pytest.raises(MissingFile, match="NAME_output.pt of none of 5 images"):
        moments.take(data, latent, folder)
    names = [f"val_images/{k}.jpg" for k in range(4)]
    pixels = np.stack([spec.drawings.preprocess(Image.open(tmp_path / name)) for name in names])
    of_values = tiny.fast(lambda x: vae.moments(x))
    for scale, shift in ((255, 0), (127.5, -1)):
        found = np.asarray(of_values(pixels / np.float32(scale) + np.float32(shift)))
        folder.mkdir(exist_ok=True)
        for k, one in enumerate(found):
            torch.save(torch.tensor(one.transpose(2, 0, 1).copy()), folder / f"{k}_output.pt")
        if shift == 0:
            with pytest.raises(DataError, match=r"_output.pt was made from pixels in \[0, 1\]"):
                moments.take(data, latent, folder)
    assert moments.take(data, latent, folder) == 4
    batches = inputs.open_data(data, latent, Shard(13))
    assert len(batches.samples.drawing_cache) == 5 and next(batches).drawings.valid.sum() == 9


def _official(root):
    """The files that the configs of published stages name, in their folders."""
    folder = root / "data/minigpt5"
    for name in ("cc3m", "vist", "mmdialog/train", "mmdialog/valid"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "val"):
        made.cc3m(folder / "cc3m", ["red", "blue"])
        (folder / "cc3m/cc3m_val.tsv").rename(folder / f"cc3m/cc3m_{split}.tsv")
        steps, mapping = made.five_steps()
        made.vist(folder / "vist", steps, mapping)
        made.pictures(folder / "vist", *mapping.values())
        for name in ("cleaned", "image_mapping"):
            (folder / f"vist/val_{name}.json").rename(folder / f"vist/{split}_{name}.json")
    for split in ("train", "valid"):
        made.mmdialog(folder / f"mmdialog/{split}", [[made.turn("a", "-1"), made.turn("b", "2")]])
        made.pictures(folder / f"mmdialog/{split}", "-1.jpg", "2.jpg")


@pytest.mark.parametrize("stage", ["stage1", "stage2_vist", "stage2_mmdialog"])
def test_published_configs_read_official_files(stage, tokenizers, tmp_path, monkeypatch):
    """As the sets come, in the folders that the configs name; so do their evaluations."""
    config = load_config(f"{CONFIGS}/{stage}.py:7b").to_dict()
    _official(tmp_path)
    monkeypatch.chdir(tmp_path)
    held_out = config["data"] | config["evals"]["validation"]["data"]
    for values in (config["data"], held_out):
        data = build(DataConfig, values, "config.data")
        data = dataclasses.replace(data, reading=ReadingConfig())
        batches = inputs.open_data(data, tiny.TINY, Shard(1))
        batch = next(batches)
        assert batch.drawings.valid.any() and not batches.skipped
        assert (batch.images.valid.shape[1] == 0) == (stage == "stage1")


def test_captions_need_a_tokenizer(tokenizers, latent, tmp_path):
    """Of the folder of the image decoder, when data are opened; other uses of the spec don't."""
    path = made.cc3m(tmp_path, ["a"])
    cfg = dataclasses.replace(latent, text_encoder=tiny.TINY.text_encoder)
    assert inputs.input_spec(cfg).drawings.caption_length == 6
    with pytest.raises(ConfigError, match="has no tokenizer/.*config.model.caption_tokenizer"):
        inputs.open_data(data_of((SourceConfig(path, kind="cc3m"),)), cfg, Shard(1))


@pytest.mark.golden
def test_published_model_prepares_images_as_the_reference(golden_root):
    """At full size, by what the 7B config says; of the reference's pixels, normalised ones are
    tested in `tests/data/test_images.py`."""
    case = golden.Case(golden_root, "preprocess")
    image = Image.fromarray(case["in.image_hwc_uint8"])
    model = load_config(f"{CONFIGS}/stage1.py:7b").to_dict()["model"]
    spec = inputs.input_spec(build(recipe.Config, model, "config.model"), read=False)
    assert spec.feature_shape == (32, 768) and spec.drawings.places == 3
    read = case["out.input_224_hwc_uint8_no_pad"]
    np.testing.assert_array_equal(spec.views.pixels(image)[0], read)
    np.testing.assert_array_equal(spec.drawings.preprocess(image), case["out.output_512_hwc_uint8"])
    assert spec.drawings.caption_length == 77 and spec.drawings.latents.shape == (64, 64, 4)
    assert spec.drawings.latents.scale == 0.18215 and len(spec.drawings.ids) == 8
