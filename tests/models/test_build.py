"""The keys of large models' random weights."""

import jax
import numpy as np
from flax import nnx

from metamorph_jax.models import build
from metamorph_jax.models.llm import llama


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
