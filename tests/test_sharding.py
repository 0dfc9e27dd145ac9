import os
import pathlib
import subprocess
import sys

import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from metamorph_jax import sharding
from tests.devices import virtual

ROOT = pathlib.Path(__file__).parents[1]

EIGHT = """
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from metamorph_jax import sharding
from metamorph_jax.models.llm import llama
from metamorph_jax.nn.linear import gathering_dot_general

mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
assert mesh.size == 8
cfg = llama.SIZES["tiny"]
model = nnx.eval_shape(lambda: llama.Llama(cfg, rngs=nnx.Rngs(0)))
where = {".".join(map(str, p)): v for p, v in
         nnx.to_flat_state(sharding.state_shardings(nnx.state(model), mesh))}
spec = lambda name: where[name].get_value().spec
assert spec("layers.self_attn.q_proj.kernel") == P(None, "fsdp", "tensor")
assert spec("layers.mlp.down_proj.kernel") == P(None, "tensor", "fsdp")
assert spec("embed_tokens.embedding") == P("tensor", "fsdp")
big = sharding.variable_sharding(jnp.zeros((3, 4096, 30)), mesh)
assert big.spec == P(None, "fsdp", None), big
assert sharding.variable_sharding(jnp.zeros((8, 8)), mesh).spec == P()
odd = sharding.fit(P("tensor", "fsdp"), (9, 8), mesh)
assert odd == P(None, "fsdp"), odd
assert sharding.batch_sharding(mesh).spec == P(("slice", "data", "fsdp"))

def loss(w, x):
    w = sharding.gathered(w, ("embed", "mlp"))
    return jnp.sum((jnp.tanh(x @ w) @ w.T) ** 2)

rows = sharding.make_mesh({"fsdp": 8})
w, x = jax.random.normal(jax.random.key(0), (16, 24)), jax.random.normal(jax.random.key(1), (8, 16))
cut = jax.NamedSharding(rows, P("fsdp", None))
with jax.set_mesh(rows):
    step = jax.jit(jax.grad(loss), in_shardings=(cut, cut))
    text = step.lower(w, x).compile().as_text()
    gradient = step(w, x)
assert text.count(" all-gather(") + text.count(" all-gather-start(") == 1, text
assert gradient.sharding.is_equivalent_to(cut, 2), gradient.sharding
assert jnp.allclose(gradient, jax.grad(loss)(w, x), rtol=1e-4, atol=1e-4)

def product(x, w):
    return gathering_dot_general(("embed", "mlp"), x, w, (((1,), (0,)), ((), ())))

with jax.set_mesh(rows):  # positions travel where they are fewer than the rows of the kernel
    few, many = (str(jax.make_jaxpr(product)(jnp.ones((n, 16)), w)) for n in (15, 16))
assert "sharding_constraint" in many and "sharding_constraint" not in few

def f(x):
    return sharding.constrain(x * 2, "act_batch", "act_len", "act_mlp")

with jax.set_mesh(mesh):
    y = jax.jit(f)(jnp.ones((8, 4, 6)))
assert y.sharding.shard_shape(y.shape) == (2, 4, 3), y.sharding
"""


def test_one_device():
    mesh = sharding.make_mesh({"fsdp": 1})
    assert mesh.axis_names == sharding.AXES and mesh.size == 1
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.spec("embed", None, "mlp") == P("fsdp", None, "tensor")


def test_wrong_shapes():
    with pytest.raises(ValueError, match="mesh axes \\['model'\\] are unknown"):
        sharding.make_mesh({"model": 1})
    with pytest.raises(ValueError, match="only one mesh axis may be -1"):
        sharding.make_mesh({"data": -1, "fsdp": -1})
    with pytest.raises(ValueError, match="needs 3 devices; there are 1"):
        sharding.make_mesh({"data": 3})


def test_eight_devices():
    env = os.environ | {
        **virtual(8),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", EIGHT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
