"""Loading streams: peak host memory doesn't grow with the checkpoint."""

import json
import os
import subprocess
import sys

import pytest

from tests.devices import virtual

# Writes a bfloat16 checkpoint in two shards, tensor by tensor; then loads it onto eight devices.
# Devices of a CPU keep their arrays in the same memory, so what counts is the peak above the arrays
# themselves.
SCRIPT = """
import json, pathlib, resource, sys
import jax, jax.numpy as jnp, ml_dtypes, numpy as np
from flax import nnx
from metamorph_jax import sharding
from metamorph_jax.convert import hf, safetensors
from metamorph_jax.convert.llama import export_llama, load_llama
from metamorph_jax.models.llm import llama

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def now():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024

folder = pathlib.Path(sys.argv[1])
cfg = llama.LlamaConfig(4096, 1024, 4096, int(sys.argv[2]), 8, 8, 128)
model = nnx.eval_shape(lambda: llama.Llama(cfg, rngs=nnx.Rngs(0)))
mesh = sharding.make_mesh({"fsdp": 8})
state = nnx.state(model)
put = lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s)
nnx.update(model, jax.tree.map(put, state, sharding.state_shardings(state, mesh)))

published = export_llama(model)
shapes = {k: published.shape_of(k) for k in published}
dtype = np.dtype(ml_dtypes.bfloat16)
sizes = {k: int(np.prod(s)) * 2 for k, s in shapes.items()}
block = np.random.default_rng(0).standard_normal(2**16).astype(dtype)
make = lambda k: np.resize(block, shapes[k])
shards = safetensors.plan_shards(sizes, sum(sizes.values()) // 2)
where = {k: file for file, keys in shards.items() for k in keys}
for file, keys in shards.items():
    safetensors.write(folder / file, keys, shapes, dict.fromkeys(keys, dtype), make)
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = now()
load_llama(model, hf.Tensors(folder))
arrays = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
kernel = model.layers.mlp.up_proj.kernel
got = np.asarray(kernel[...][1]).T
np.testing.assert_array_equal(got, make("model.layers.1.mlp.up_proj.weight"))
print(json.dumps({"checkpoint": sum(sizes.values()), "largest": max(sizes.values()),
                  "arrays": arrays, "above": peak() - before - arrays}))
"""


def measure(folder, layers: int) -> dict:
    env = {**os.environ, **virtual(8)}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(layers)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc (Linux)")
def test_peak_above_the_arrays_is_a_few_pieces(tmp_path):
    """3.5 GB of files; what loading needs beside the arrays stays far below that."""
    found = measure(tmp_path, 104)
    print(found)
    promised = 3 * found["largest"] + 2**30
    assert found["checkpoint"] > 3 * promised and found["arrays"] == found["checkpoint"]
    assert found["above"] < promised
    assert found["above"] < 400e6  # what it does: some pieces of 64 MiB, in all stages
