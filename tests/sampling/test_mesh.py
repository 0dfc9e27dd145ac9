"""Decoding on eight virtual devices: the ids of one device, and no more memory than it may take."""

import os
import pathlib
import subprocess
import sys

from tests.devices import virtual

ROOT = pathlib.Path(__file__).parents[2]

SETUP = """
import jax, numpy as np
from flax import nnx
from metamorph_jax import config, sharding
from metamorph_jax.convert import load
from metamorph_jax.models.build import build
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.recipes.metamorph.decoding import VisualParts, make_loop, make_policy
from metamorph_jax.sampling import beam
from metamorph_jax.sampling.beam import Beams
from metamorph_jax.sampling.policy import TextPolicy

def make_model(mesh, **llm):
    model = {"llm": "tiny", "llm_options": llm, "vision": {"tower": "none", "feature_width": 12,
             "tokens": 4}}
    cfg = config.build(recipe.Config, model)
    model = build(lambda rngs: recipe.create(cfg, rngs), mesh, 1)
    scale = lambda x: x * 8
    nnx.update(model, jax.tree.map(scale, nnx.state(model, nnx.Param)))
    return model
"""

SAME_IDS = """
def decode(mesh, weights, **llm):
    model = make_model(mesh, **llm)
    parts = VisualParts(model)
    loop, policy = make_loop(model, parts, weights), make_policy(parts, TextPolicy())
    rng = np.random.default_rng(0)
    prompts = [loop.embed(rng.integers(0, 320, n)) for n in (5, 9, 20, 7)]
    forced = np.full((4, 12), -1)
    forced[[0, 2], [3, 5]] = parts.start
    state = loop.prefill(prompts, 12, policy, forced_ids=forced, slots=96)
    state = loop.advance(state, policy)
    first = loop.results(state, policy)
    rows = [1, 2]
    state = loop.extend(state, [loop.embed(rng.integers(0, 320, n)) for n in (6, 3)], rows, policy,
                        max_new_tokens=8)
    state = loop.advance(state, policy)
    return first, loop.results(state, policy), loop

def search(loop, requests):
    rng = np.random.default_rng(0)
    prompts = [loop.embed(rng.integers(0, 320, n)) for n in (5, 9, 20, 7)[:requests]]
    policy = TextPolicy(eos=tuple(range(0, 320, 9)))
    return beam.search(loop, prompts, [12, 8, 5, 12][:requests], policy, Beams(4))

one = sharding.make_mesh(devices=jax.devices()[:1])
cases = [({"tensor": 2, "data": 4}, "auto", {"qkv_bias": True}),
         ({"tensor": 8}, "int8", {"tied": False}),  # more shards than key-value heads
         ({"tensor": 4, "data": 2}, "nf4", {"qk_norm": True, "kv_heads": 4})]
for shape, weights, llm in cases:
    mesh = sharding.make_mesh(shape)
    expected, got = decode(one, weights, **llm), decode(mesh, weights, **llm)
    for turn in range(2):
        for a, b in zip(expected[turn], got[turn], strict=True):
            np.testing.assert_array_equal(a.record, b.record)
            # Each visual token is read again, so rounding grows from one to the next.
            np.testing.assert_allclose(a.vectors[:1], b.vectors[:1], atol=1e-4)
            np.testing.assert_allclose(a.vectors, b.vectors, atol=2e-2)
    if mesh.shape["tensor"] == 2:  # heads, hidden units and vocabulary are cut
        layer, llm = got[2].weights["llm"]["layers"][0], got[2].weights["llm"]
        for x in (layer["qkv"]["w"], layer["o"]["w"], layer["gate_up"]["w"], layer["down"]["w"],
                  llm["table"], llm["head"]["w"]):
            part = x.addressable_shards[0].data.size
            assert 2 * part == x.size, (x.shape, part)
        for requests in 4, 3:  # a request's beams lie on one device, or on several
            for a, b in zip(*(search(x[2], requests) for x in (expected, got)), strict=True):
                np.testing.assert_array_equal(a.record, b.record)
print("same")
"""

MEMORY = """
import gc, math
from metamorph_jax.sampling import llm_weights

def held(devices):
    gc.collect()
    total = dict.fromkeys(devices, 0)
    for x in jax.live_arrays():
        for device in x.sharding.device_set & total.keys():
            total[device] += on_each(x)
    return max(total.values())

def on_each(x):
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

mesh = sharding.make_mesh({"tensor": 2}, jax.devices()[:2])
model = make_model(mesh, width=256, mlp_width=1024, layers=8, vocab_size=1000, tied=False)
gc.collect()
devices = jax.devices()[:2]
before = held(devices)
largest = max(map(on_each, jax.tree.leaves(nnx.state(model))))
peak = before
original = llm_weights._Taking._run
def watched(self, *args):
    global peak
    out = original(self, *args)
    peak = max(peak, held(devices))
    return out
llm_weights._Taking._run = watched
llm, weights = llm_weights.take_over(model.llm, "float32", mesh)
after = held(devices)
print(before, largest, peak, after)
assert peak <= before + 1.5 * largest, (before, largest, peak)
assert abs(after - before) < 0.02 * before, (before, after)
assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(model.llm)))
"""


def run(code: str, devices: int = 8):
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        **virtual(devices),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_ids_are_those_of_one_device():
    assert "same" in run(SETUP + SAME_IDS)


def test_taking_over_holds_the_model_and_one_kernel():
    run(SETUP + MEMORY)
