"""Models with their weights: what is read, what is made at random, and where all of it lies."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.convert import hf, load
from metamorph_jax.convert.llama import export_llama
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import build, lora
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.recipes.metamorph.published import FAMILY
from tests.devices import virtual
from tests.recipes.metamorph.tiny import TINY, make


def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def fresh(cfg=TINY, seed=0):
    return build.build(lambda rngs: recipe.create(cfg, rngs), mesh(), seed)


def leaves(model) -> dict[str, np.ndarray]:
    return {n: np.asarray(v.get_raw_value()) for n, v in load.named_leaves(model).items()}


def same(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    """(folder of a published language model, its tensors)."""
    from safetensors.numpy import save_file

    from metamorph_jax.convert.llama import config_to_hf

    folder = tmp_path_factory.mktemp("llm")
    llm = make(dataclasses.replace(TINY, llm_options={"added_tokens": 0}), seed=5).llm
    tensors = {k: np.asarray(v) for k, v in export_llama(llm).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_hf(llm.cfg)))
    return folder, tensors


def test_only_what_nothing_fills_is_made_at_random(llm_folder, monkeypatch):
    """And has the values that the whole model's initialisation gives it."""
    folder, tensors = llm_folder
    made = []
    one_by_one = build._one_by_one

    def counting(make, key):
        made.extend(one_by_one(make, key))
        return made

    monkeypatch.setattr(build, "_one_by_one", counting)
    cfg = dataclasses.replace(TINY, llm_weights=str(folder))
    model = load.load_model(recipe, cfg, mesh())
    monkeypatch.undo()
    found, whole = leaves(model), leaves(fresh())
    filled = {name for name in whole if name.startswith("llm.")}
    assert len(made) == len(whole) - len(filled)
    same({n: found[n] for n in whole if n not in filled},
         {n: x for n, x in whole.items() if n not in filled})  # fmt: skip
    kernel = found["llm.layers.mlp.up_proj.kernel"]
    np.testing.assert_array_equal(kernel[1].T, tensors["model.layers.1.mlp.up_proj.weight"])


def test_floats_are_cast_but_buffers_and_scales_are_not(llm_folder):
    cfg = dataclasses.replace(
        TINY, llm_weights=str(llm_folder[0]), frozen_weights="nf4", lora=lora.LoraConfig(rank=2)
    )
    model = load.load_model(recipe, cfg, mesh(), dtype=jnp.bfloat16)
    kinds = {n: v.get_raw_value().dtype for n, v in load.named_leaves(model).items()}
    scales = {n for n in kinds if n.endswith(("kernel_scale", "kernel_codes"))}
    assert len(scales) == 14
    assert all(kinds[n] != jnp.bfloat16 for n in scales)
    assert all(kind == jnp.bfloat16 for n, kind in kinds.items() if n not in scales)


def finished(folder, cfg, model, stage="vpit", **values):
    """The workdir of a finished stage."""
    from orbax.checkpoint import v1 as ocp

    from metamorph_jax.train.state import trained_filter

    folder.mkdir()
    values = {"recipe": "metamorph", "model": dataclasses.asdict(cfg), **values}
    (folder / "config.json").write_text(json.dumps(values))
    chosen = trained_filter(recipe.STAGES[stage](cfg))
    state = nnx.to_flat_state(nnx.state(model, chosen))
    ocp.save(folder / "final", {".".join(map(str, p)): v[...] for p, v in state})
    return folder


def test_a_run_comes_back_with_the_frozen_weights_of_its_seed(tmp_path):
    """The tower was not trained, and no file has it."""
    model = fresh(seed=3)
    model.head.linears[0].bias[...] = 7.0
    workdir = finished(tmp_path / "run", TINY, model, seed=3)
    found = load.load_model(recipe, TINY, mesh(), workdir=workdir)
    same(leaves(found), leaves(model))


@pytest.mark.parametrize("stage, read", [("vpit", False), ("connector", True)])
def test_what_a_run_trained_is_not_read_from_where_it_started(
    stage, read, llm_folder, tmp_path, monkeypatch
):
    cfg = dataclasses.replace(TINY, llm_weights=str(llm_folder[0]))
    model = load.load_model(recipe, cfg, mesh())
    model.llm.embed_tokens.added[...] = 3.0
    workdir = finished(tmp_path / "run", cfg, model, stage)
    asked = []
    monkeypatch.setattr(
        hf.Tensors, "__getitem__", lambda self, key: asked.append(key) or self._where[key][key]
    )
    found = load.load_model(recipe, cfg, mesh(), workdir=workdir)
    # The tables are looked at in any case: they say whether there are rows for new tokens, and
    # whether the tables are tied.
    assert (set(asked) > {"model.embed_tokens.weight", "lm_head.weight"}) is read
    same(leaves(found), leaves(model))


@pytest.mark.parametrize("packed", ["none", "int8"])
def test_adapters_are_merged_into_the_random_weights_of_their_run(packed, tmp_path):
    adapters = lora.LoraConfig(r"llm\.layers\..*q_proj", rank=2, alpha=4.0)
    cfg = dataclasses.replace(TINY, lora=adapters, frozen_weights=packed)
    model = fresh(cfg, seed=3)
    linear = model.llm.layers.self_attn.q_proj
    linear.lora_b[...] = jax.random.normal(jax.random.key(1), linear.lora_b.shape)
    workdir = finished(tmp_path / "one", cfg, model, seed=3)
    second = dataclasses.replace(TINY, weights=f"workdir:{workdir}")
    found = load.load_model(recipe, second, mesh())
    want = lora.merged(model).llm.layers.self_attn.q_proj.kernel[...]
    exact = 1e-6 if packed == "none" else 2e-2  # an unpacked kernel is bfloat16
    np.testing.assert_allclose(found.llm.layers.self_attn.q_proj.kernel[...], want, atol=exact)


def test_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not the workdir of a training run"):
        load.load_model(recipe, TINY, mesh(), workdir=tmp_path)
    values = {"recipe": "metamorph", "model": dataclasses.asdict(TINY)}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="isn't finished"):
        load.load_model(recipe, TINY, mesh(), workdir=tmp_path)


SCRIPT = """
import dataclasses, json, sys
import jax, numpy as np
from metamorph_jax import sharding
from metamorph_jax.convert import hf, load
from metamorph_jax.recipes import metamorph as recipe
from tests.recipes.metamorph.tiny import TINY

cfg = dataclasses.replace(TINY, llm_weights=sys.argv[1])
one, eight = (
    load.load_model(recipe, cfg, sharding.make_mesh(shape, jax.devices()[:n]))
    for shape, n in (({"fsdp": 1}, 1), ({"fsdp": 4, "tensor": 2}, 8))
)
a, b = load.named_leaves(one), load.named_leaves(eight)
assert a.keys() == b.keys()
spread = 0
for name, x in a.items():
    x, y = x.get_raw_value(), b[name].get_raw_value()
    assert len(y.sharding.device_set) == 8, name
    # The rows of new tokens are a mean, which the devices sum up in another order.
    rtol = 1e-5 if name.endswith(".added") else 0
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol, err_msg=name)
    spread += y.addressable_shards[0].data.nbytes < y.nbytes
print(json.dumps({"leaves": len(a), "spread": spread}))
"""


def test_eight_devices_hold_the_same_numbers(llm_folder):
    env = os.environ | virtual(8)
    command = [sys.executable, "-c", SCRIPT, str(llm_folder[0])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["spread"] > found["leaves"] / 3


def test_convert_imports_no_recipe():
    """The other half of `tests/test_layering.py`: it gets all systems by asking."""
    from metamorph_jax.convert import families

    assert families.known()["metamorph"] is FAMILY
    code = "import sys; import metamorph_jax.convert.families, metamorph_jax.convert.load; "
    code += "print([m for m in sys.modules if m.startswith('metamorph_jax.recipes')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
