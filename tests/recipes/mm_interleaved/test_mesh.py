"""Training and drawing on eight virtual devices give the numbers of one; two processes train as one
does."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.config import load_config
from metamorph_jax.train.checkpoint import read_export
from tests.devices import virtual
from tests.train import forked

ROOT = pathlib.Path(__file__).parents[3]

SETUP = """
import dataclasses, types
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
jax.config.update("jax_disable_most_optimizations", True)
from metamorph_jax import sharding
from metamorph_jax.recipes import mm_interleaved as recipe
from metamorph_jax.train import state, step
from tests.recipes.mm_interleaved.tiny import TINY, P, make, make_batch

denoiser = TINY.decoder.denoiser
unet = dataclasses.replace(  # one level: it compiles in half the time
    denoiser.unet, block_out_channels=(8,), num_heads=(2,), layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
)
denoiser = dataclasses.replace(denoiser, unet=unet)
CFG = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, denoiser=denoiser))
MESHES = [sharding.make_mesh(devices=jax.devices()[:1]),
          sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})]
"""

TRAINING = r"""
# All that the stage trains but the adapter, whose backward pass is a third of the program.
PATTERN = r"(?!vision\.adapter\.)(" + recipe.STAGES["pretrain"](CFG) + ")"
rows = [make_batch(CFG, seed) for seed in range(4)]
batch = jax.tree.map(lambda *x: np.concatenate(x), *rows)

def trained(mesh):
    parts, params, frozen = state.split(make(CFG), PATTERN, mesh)
    params, frozen = state.place(params, parts), state.place(frozen, parts)
    here = jax.device_put(batch, sharding.batch_sharding(mesh))
    key = jax.random.key_data(jax.random.key(5))

    @jax.jit
    def run(params, frozen, batch):
        now = types.SimpleNamespace(params=params, key=key, step=0)
        counts = step.count(parts, params, frozen, batch)
        return step.gradients(parts, 1, now, frozen, batch, counts)

    with jax.set_mesh(mesh):
        return jax.device_get(run(params, frozen, here)), params

(grads, (sums, metrics)), _ = trained(MESHES[0])
(found, (found_sums, found_metrics)), params = trained(MESHES[1])
cut = [x for x in params.values() if not x.sharding.is_fully_replicated]
assert len(cut) > 20, len(cut)
for a, b in zip(jax.tree.leaves((sums, metrics)), jax.tree.leaves((found_sums, found_metrics))):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
for name, grad in grads.items():
    close = 1e-4 * np.abs(grad).max() + 1e-7
    np.testing.assert_allclose(found[name], grad, atol=close, err_msg=name)
assert sum(np.abs(grad).max() > 0 for grad in grads.values()) > 0.8 * len(grads)
print("trained alike")
"""

DRAWING = """
from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.sampling.generator import Options
from metamorph_jax.sampling.requests import Request

data = DataConfig(row=RowConfig(template="document", length=64, images=4))
asked = [Request(text, text, mode="image") for text in ("A kite", "Once upon a")]

def drawn(mesh):
    graph, values = nnx.split(make(CFG))
    values = jax.tree.map(jax.device_put, values, sharding.state_shardings(values, mesh))
    made = recipe.generator(nnx.merge(graph, values), CFG, data)
    return made.generate(asked, Options(P + 2, batch_size=2))

for one, other in zip(*map(drawn, MESHES), strict=True):
    (a,), (b,) = one.segments, other.segments
    ((scale, image),) = a.drawn.items()
    assert image.std() > 0 and np.abs(image.astype(int) - b.drawn[scale]).max() <= 1
print("drawn alike")
"""


def run(code: str, devices: int = 8) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **virtual(devices)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_training_on_eight_devices():
    assert "trained alike" in run(SETUP + TRAINING)


def test_drawing_on_eight_devices():
    assert "drawn alike" in run(SETUP + DRAWING)


# ---- processes


def write_pairs(folder: pathlib.Path) -> str:
    """Eight images, described and drawn by turns."""
    lines, rng = [], np.random.default_rng(0)
    for k in range(8):
        pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        turns = ["<image>", "noise " * (1 + k % 3)][:: 1 if k % 2 else -1]
        said = [{"from": "human", "value": turns[0]}, {"from": "gpt", "value": turns[1]}]
        lines.append(json.dumps({"image": f"{k}.png", "conversations": said}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return str(folder / "pairs.jsonl")


def losses(workdir: pathlib.Path) -> list[dict[str, float]]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    names = ("loss", "text_loss", "image_loss", "grad_norm")
    return [{name: row[name] for name in names} for row in rows if "loss" in row]


@pytest.mark.e2e
@pytest.mark.slow
def test_training_in_two_processes(tmp_path):
    """The same losses and parameters as one process, each with half of the rows."""
    changes = {
        "data.sources": {"main": {"path": write_pairs(tmp_path)}},
        "data.row": {"length": 32, "images": 2, "template": "document"},
        "model.max_drawings": 2, "data_shards": 2, "initial_batches": 1,
        "steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 100,
        # Without the large epsilon, rounding in gradients near 0 decides steps of full size.
        "optim.eps": 1e-3, "tensorboard": False, "compilation_cache": "",
    }  # fmt: skip
    table = load_config(f"{ROOT}/configs/mm_interleaved/pretrain.py:smoke", changes).to_dict()
    table |= {"recipe": "tests.recipes.mm_interleaved.quick", "stage": "context"}
    table["optim"]["groups"] = {}
    one, two = tmp_path / "one", tmp_path / "two"
    forked.finish([forked.Run(table, one)])
    forked.finish(forked.together(2, table | {"mesh": {"data": 2}}, two))
    assert len(losses(one)) == 2 and losses(one)[0]["image_loss"] > 0
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    kept, found = read_export(one), read_export(two)
    assert kept.keys() == found.keys()
    for name in kept:
        np.testing.assert_allclose(found[name], kept[name], rtol=1e-4, atol=1e-5, err_msg=name)
