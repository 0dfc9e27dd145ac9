"""Counts against sums done by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from metamorph_jax import flops
from metamorph_jax.models.llm import llama


def count(remat="none", trained=("llm.layers.x", "llm.lm_head.kernel")):
    cfg = llama.LlamaConfig(100, 8, 16, 3, 4, 2, 2, remat=remat)
    return flops.total(llama.work(cfg, 2, 10), trained)


LAYER = 8 * (4 + 2 * 2) * 2 + 4 * 2 * 8 + 3 * 8 * 16  # weights of a layer's products
PAIRS = 4 * 8 * 3 * 20 * 10 / 2  # 4 per channel, 3 layers, half of 20 x 10 pairs


def test_all_trained():
    found = count()
    assert found.by_part["llm"] == 6 * LAYER * 3 * 20 + 3 * PAIRS
    assert found.by_part["head table"] == 6 * 8 * 100 * 20
    assert found.recomputed == 0


def test_a_frozen_model_still_passes_gradients_on():
    found = count(trained=("connector.x",))
    assert found.by_part["llm"] == 4 * LAYER * 3 * 20 + 3 * PAIRS
    assert found.by_part["head table"] == 4 * 8 * 100 * 20


@pytest.mark.parametrize(
    ("remat", "again"),
    [
        ("dots", PAIRS),
        ("attention", 2 * LAYER * 3 * 20),
        ("full", 2 * LAYER * 3 * 20 + PAIRS),
        ("offload", 2 * LAYER * 3 * 20 + PAIRS),
    ],
)
def test_what_is_computed_twice(remat, again):
    assert count(remat).recomputed == again
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("fsdp",))):
        over_a_mesh = count(remat).recomputed
    assert over_a_mesh == again + 2 * 8 * 100 * 20  # the loss goes through the table twice


class Small(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x, image):
        x, _ = jax.lax.scan(lambda c, _: (self.linear(c) @ self.linear.kernel[...].T, None), x,
                            length=6)  # fmt: skip
        return x, self.conv(image)


def test_products_scans_and_convolutions_of_a_function():
    model = nnx.eval_shape(Small)
    x, image = jnp.zeros((2, 5)), jnp.zeros((1, 8, 8, 3))
    found = flops.of_function(model, lambda m, *a: m(*a), x, image)
    assert found == 6 * 2 * (2 * 2 * 5 * 7) + 2 * 8 * 8 * 4 * 9 * 3
