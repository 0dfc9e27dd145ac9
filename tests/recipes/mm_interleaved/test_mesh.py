"""Training and drawing on eight virtual devices give the numbers of one."""

import os
import pathlib
import subprocess
import sys

from tests.devices import virtual

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
from metamorph_jax.sampling.options import Options
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
