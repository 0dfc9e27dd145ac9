"""`metamorph_jax.load` and what it gives."""

import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import metamorph_jax
from metamorph_jax import api, cli
from metamorph_jax.convert import families, load
from metamorph_jax.data.config import RowConfig
from metamorph_jax.errors import UserError
from metamorph_jax.models import build
from metamorph_jax.models.build import is_open
from metamorph_jax.recipes import metamorph
from metamorph_jax.sampling import trained
from metamorph_jax.sampling.options import Options


def test_load_and_generate(workdir, image_files, capsys):
    model = metamorph_jax.load(workdir)
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    options = {"max_new_tokens": 6, "temperature": 0.7, "seed": 3}
    reply = model.generate("What is it?", images=[image_files / "a.png", image], **options)
    assert reply.text and reply.images == []
    again = model.generate(
        "What is it?", images=[image_files / "a.png", image], stream=True, **options
    )
    assert again.text == reply.text
    assert capsys.readouterr().out.strip("\n") == reply.text.strip("\n")
    with pytest.raises(TypeError, match="surprise"):
        model.generate("x", surprise=1)


def test_a_chat_has_the_options_of_generate(generator):
    conversation = api.Model(generator).chat(max_new_tokens=4, temperature=0.5)
    assert conversation.options == Options(4, 0.5, batch_size=1) and conversation.turns == 0
    with pytest.raises(ValueError, match="the prompt is empty"):
        api.Model(generator).generate(" ")


def test_importing_the_package_starts_nothing():
    code = (
        "import sys, metamorph_jax; "
        "found = {'jax', 'torch', 'flax', 'numpy', 'transformers'} & set(sys.modules); "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "load" in metamorph_jax.__all__
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        metamorph_jax.unload  # noqa: B018


def test_published_weights_need_no_config(workdir, tmp_path, capsys):
    """A run that was written as a folder, in either layout, says itself what it is."""
    for form in ("hf", "reference"):
        words = ("--from", f"workdir:{workdir}", "--to", form, "--out", str(tmp_path / form))
        assert cli.main(["convert", *words]) == 0
        name, cfg, data = families.whole_checkpoint(str(tmp_path / form))
        written = load.open_run(workdir)[1]
        assert name == "metamorph" and data.row == RowConfig(length=2048)
        assert cfg.vision.feature_shape == written.vision.feature_shape
        assert (cfg.connector, cfg.head) == (written.connector, written.head)
        tower, wanted = cfg.vision.vit, written.vision.vit
        assert (tower.depth, tower.mean, tower.std) == (wanted.depth, wanted.mean, wanted.std)
        model = nnx.eval_shape(lambda cfg=cfg: metamorph.create(cfg, build.rngs(0)))
        metamorph.load_pretrained(model, cfg)
        assert not any(is_open(leaf) for leaf in load.named_leaves(model).values())
    assert trained.is_published(str(tmp_path / "hf")) and not trained.is_published(str(workdir))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="'gpt2'.* is no whole model of .*: give --config"):
        metamorph_jax.load(tmp_path)
