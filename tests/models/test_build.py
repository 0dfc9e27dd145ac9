"""The keys of large models' random weights."""

import jax
import numpy as np
from flax import nnx

from metamorph_jax.models import build
from metamorph_jax.models.llm import llama
from metamorph_jax.sharding import make_mesh


def test_rngs_have_the_keys_of_flax():
    """In stacked layers, too, traced or not, from a seed or a key."""

    def weights(rngs):
        llm = llama.Llama(llama.SIZES["tiny"], rngs=rngs)
        return nnx.state(llm, nnx.Param), rngs.params(), rngs.split(2).params.key[...]

    traced = jax.jit(lambda key: (weights(build.rngs(key)), weights(nnx.Rngs(key))))
    ours, theirs = traced(jax.random.key(3))
    same = lambda a, b: np.array_equal(*(  # noqa: E731
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in (a, b)
    ))  # fmt: skip
    assert all(jax.tree.leaves(jax.tree.map(same, ours, theirs)))
    assert build.rngs(3)() == nnx.Rngs(3)()


def test_random_weights_are_those_of_the_whole_model(monkeypatch):
    """They are made one by one, and what is filled is not made at random."""
    make = lambda rngs: llama.Llama(llama.SIZES["tiny"], rngs=rngs)  # noqa: E731
    expected = nnx.state(make(nnx.Rngs(5)), nnx.Param)
    filled, run, shapes = ("embed_tokens", "embedding"), build.core.jaxpr_as_fun, []

    def fill(model):
        table = model.embed_tokens.embedding
        table.set_raw_value(np.full(table.shape, 7.0, np.float32))

    def watch(closed):
        shapes.extend(x.aval.shape for equation in closed.eqns for x in equation.outvars)
        return run(closed)

    monkeypatch.setattr(build.core, "jaxpr_as_fun", watch)
    found = nnx.state(build.build(make, make_mesh(), 5, fill), nnx.Param)
    for (path, ours), (_, theirs) in zip(
        nnx.to_flat_state(found), nnx.to_flat_state(expected), strict=True
    ):
        wanted = np.full(theirs.shape, 7.0) if path == filled else theirs[...]
        np.testing.assert_allclose(ours[...], wanted, rtol=1e-6, atol=1e-7, err_msg=str(path))
    made = dict(nnx.to_flat_state(found))
    assert made[filled].shape not in shapes
    assert made["layers", "mlp", "up_proj", "kernel"].shape in shapes
