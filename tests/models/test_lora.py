"""Adapters: numbers, what is trained and kept, stacked layers, shardings, merging."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import cli, sharding
from metamorph_jax.convert import peft
from metamorph_jax.convert.llama import export_llama
from metamorph_jax.convert.load import load_workdir
from metamorph_jax.errors import Preempted
from metamorph_jax.models import build, lora
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig
from metamorph_jax.models.llm import llama
from metamorph_jax.models.vision import vit
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.train import checkpoint, loop, optim
from metamorph_jax.train import state as states
from metamorph_jax.train.config import OptimConfig
from metamorph_jax.train.state import trained_filter

CFG = lora.LoraConfig(target=r".*_proj", rank=3, alpha=6.0)
TINY = recipe.Config(llm="tiny", vision=VisionConfig("siglip-tiny", tokens=4), text_chunk=16)


# Compiling is what these tests spend their time on.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random_b(model, seed=0):
    """Adapters as after some training."""
    for i, (_, linear) in enumerate(lora.adapters(model)):
        key = jax.random.fold_in(jax.random.key(seed), i)
        linear.lora_b[...] = 0.3 * jax.random.normal(key, linear.lora_b.shape)
    return model


def make_llm(cfg=CFG, **options):
    llm = llama.Llama(dataclasses.replace(llama.SIZES["tiny"], **options), rngs=nnx.Rngs(0))
    if cfg is not None:
        lora.add(llm, cfg, rngs=nnx.Rngs(1))
    return llm


def states_of(llm, seed=2):
    B, L = 2, 7
    embeds = jax.random.normal(jax.random.key(seed), (B, L, llm.cfg.width))
    positions = jnp.tile(jnp.arange(L), (B, 1))
    mask = jnp.tril(jnp.ones((L, L), bool))[None].repeat(B, 0)
    graph, state = nnx.split(llm)
    run = jax.jit(lambda state: nnx.merge(graph, state)(embeds, positions, mask),
                  compiler_options=FAST)  # fmt: skip
    return np.asarray(run(state))


def test_a_fresh_adapter_changes_nothing():
    np.testing.assert_array_equal(states_of(make_llm()), states_of(make_llm(None)))


@pytest.mark.parametrize("rslora", [False, True])
def test_one_linear(rslora):
    cfg = lora.LoraConfig(target="", rank=4, alpha=8.0, rslora=rslora)
    linear = nnx.Linear(5, 6, rngs=nnx.Rngs(0))
    adapted = lora.LoraLinear(linear, cfg, rngs=nnx.Rngs(1))
    adapted.lora_b[...] = jax.random.normal(jax.random.key(2), (4, 6))
    x = jax.random.normal(jax.random.key(3), (2, 3, 5))
    s = 8 / 2 if rslora else 8 / 4
    want = linear(x) + s * np.asarray(x) @ adapted.lora_a[...] @ adapted.lora_b[...]
    np.testing.assert_allclose(adapted(x), want, atol=1e-5)


def test_merged_equals_adapted():
    llm = random_b(make_llm())
    plain = make_llm(None)
    merged = lora.merged(llm)
    assert not list(lora.adapters(merged)) and list(lora.adapters(llm))
    assert [str(p) for p, _ in nnx.to_flat_state(nnx.state(merged))] == [
        str(p) for p, _ in nnx.to_flat_state(nnx.state(plain))
    ]
    np.testing.assert_allclose(states_of(merged), states_of(llm), atol=2e-5)
    assert np.abs(states_of(llm) - states_of(plain)).max() > 0.1
    with pytest.raises(ValueError, match="lora.merged"):
        export_llama(llm)


def test_towers_and_unets_take_adapters():
    tower = vit.ViT(vit.SIZES["siglip-tiny"], rngs=nnx.Rngs(0))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    before = tower(pixels)
    names = lora.add(tower, dataclasses.replace(CFG, target=".*fc1|.*q_proj"), rngs=nnx.Rngs(1))
    assert names == ["layers.mlp.fc1", "layers.self_attn.q_proj"]
    np.testing.assert_array_equal(tower(pixels), before)
    random_b(tower)
    np.testing.assert_allclose(lora.merged(tower)(pixels), tower(pixels), atol=1e-4)

    def adapted():
        unet = UNet(UNetConfig.sd15(), nnx.Rngs(0))
        target = r".*attn[12]\.(to_[qkv]|to_out\.0)"
        lora.add(unet, dataclasses.replace(CFG, target=target), rngs=nnx.Rngs(1))
        return unet

    found = dict(lora.adapters(nnx.eval_shape(adapted)))
    assert len(found) == 16 * 2 * 4
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert found[name].lora_a.shape == (768, 3) and found[name].lora_b.shape == (3, 640)


def test_a_target_that_fits_nothing():
    with pytest.raises(ValueError, match="matches no linear.*layers.mlp.down_proj"):
        lora.add(make_llm(None), lora.LoraConfig(target="q_proj"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="have adapters already"):
        lora.add(make_llm(), CFG, rngs=nnx.Rngs(0))
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"target": "("}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lora.LoraConfig(**wrong)


def test_dropout():
    cfg = dataclasses.replace(CFG, dropout=0.4)
    llm = random_b(make_llm(cfg))
    calm = states_of(llm)
    np.testing.assert_array_equal(states_of(llm), calm)
    a, b = (states_of(lora.with_dropout(llm, jax.random.key(k))) for k in (0, 1))
    assert np.abs(a - calm).max() > 1e-3 and np.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(states_of(lora.with_dropout(llm, jax.random.key(0))), a)
    np.testing.assert_array_equal(states_of(llm), calm)  # the model itself has no key
    # In the mean it is the linear without dropout, and layers drop different inputs.
    linear = lora.LoraLinear(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), cfg, rngs=nnx.Rngs(1))
    linear.lora_b[...] = jax.random.normal(jax.random.key(2), linear.lora_b.shape)
    x = jax.random.normal(jax.random.key(3), (1, 64))
    runs = np.stack([lora.with_dropout(linear, jax.random.key(i))(x) for i in range(300)])
    error = np.abs(runs.mean(0) - linear(x)) / (runs.std(0) / 300**0.5)
    assert error.max() < 4
    keys = jax.random.key_data(
        next(lora.adapters(lora.with_dropout(llm, jax.random.key(0))))[1].key[...]
    )
    assert len(np.unique(keys, axis=0)) == llm.cfg.layers


def test_dropout_under_remat_has_the_same_gradient():
    cfg = dataclasses.replace(CFG, dropout=0.4, target=".*(q|down)_proj")
    embeds = jax.random.normal(jax.random.key(2), (1, 5, 64))
    positions, mask = jnp.arange(5)[None], jnp.tril(jnp.ones((1, 5, 5), bool))

    def gradient(remat):
        graph, trained, rest = nnx.split(random_b(make_llm(cfg, remat=remat)), lora.Adapter, ...)

        def loss(trained):
            llm = lora.with_dropout(nnx.merge(graph, trained, rest), jax.random.key(5))
            return jnp.sum(llm(embeds, positions, mask) ** 2)

        return jax.jit(jax.grad(loss), compiler_options=FAST)(trained)

    for a, b in zip(*(jax.tree.leaves(gradient(r)) for r in ("none", "full")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4)


# ---- in the recipe


def trained_names(cfg, stage="vpit"):
    model = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    return model, {
        ".".join(map(str, p))
        for p, _ in nnx.to_flat_state(nnx.state(model, trained_filter(recipe.STAGES[stage](cfg))))
    }


def test_what_is_trained():
    model, names = trained_names(dataclasses.replace(TINY, lora=lora.LoraConfig(rank=2)))
    linears = {n.rpartition(".")[0] for n in names if lora.is_adapter(n.split("."))}
    assert len(linears) == 7 and all(n.startswith("llm.layers.") for n in linears)
    rest = {n for n in names if not lora.is_adapter(n.split("."))}
    assert {n.split(".")[0] for n in rest} == {"connector", "head", "llm"}
    assert {n for n in rest if n.startswith("llm")} == {"llm.embed_tokens.added"}
    assert {model.param_group(n.split(".")) for n in names} == {
        "lora", "connector", "head", "tokens"
    }  # fmt: skip
    only = dataclasses.replace(TINY, lora=lora.LoraConfig(rank=2, train=""))
    assert all(lora.is_adapter(n.split(".")) for n in trained_names(only)[1])
    full = lora.LoraConfig(rank=2, target=r"llm\..*q_proj", train=r"llm\.layers\.mlp\..*")
    names = trained_names(dataclasses.replace(TINY, lora=full))[1]
    assert {n.split(".")[2] for n in names} == {"self_attn", "mlp"}
    # The connector stage does not train the llm, so it does not train the llm's adapters.
    names = trained_names(dataclasses.replace(TINY, lora=lora.LoraConfig(rank=2)), "connector")[1]
    assert {n.split(".")[0] for n in names} == {"connector", "llm"}
    assert not any(lora.is_adapter(n.split(".")) for n in names)


def test_adapters_of_the_tower_need_a_trained_tower():
    adapters = lora.LoraConfig(target=r"vision\.tower\..*q_proj", rank=2)
    cfg = dataclasses.replace(TINY, lora=adapters)
    with pytest.raises(ValueError, match="set train_tower"):
        trained_names(cfg)
    names = trained_names(dataclasses.replace(cfg, train_tower=True))[1]
    assert {n for n in names if n.startswith("vision.tower")} == {
        f"vision.tower.layers.self_attn.q_proj.{leaf}" for leaf in lora.LEAVES
    }


def test_adapters_lie_as_their_kernels():
    cfg = dataclasses.replace(TINY, lora=lora.LoraConfig(rank=4))
    model = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    mesh = sharding.make_mesh({"fsdp": 1})
    parts, params, _ = states.split(model, recipe.STAGES["vpit"](cfg), mesh)
    opt_state = optim.build(OptimConfig(), params, 1, 1).state
    assert set(opt_state[0][0].mu) == set(parts.names) == set(params)

    q, o = model.llm.layers.self_attn.q_proj, model.llm.layers.self_attn.o_proj
    names = [v.get_metadata()["logical"] for v in (q.lora_a, q.lora_b, o.lora_a, o.lora_b)]
    assert names == [("embed", None), (None, "heads"), ("heads", None), (None, "embed")]
    devices = jax.sharding.AbstractMesh((1, 1, 2, 4, 1), sharding.AXES)
    spec = sharding.variable_sharding(q.lora_b, devices).spec
    assert tuple(spec) + (None,) * (3 - len(spec)) == (None, None, "tensor")


def test_a_model_without_adapters_is_as_before():
    model = nnx.eval_shape(lambda: recipe.create(TINY, build.rngs(0)))
    assert type(model.llm.layers.mlp.up_proj) is nnx.Linear
    assert lora.merged(model) is model


# ---- saved by one stage, used by the next


class Fake:
    """A finished stage of this recipe, without running one."""

    def __init__(self, folder: pathlib.Path, cfg, model):
        import json

        from orbax.checkpoint import v1 as ocp

        folder.mkdir()
        values = {"recipe": "metamorph", "model": dataclasses.asdict(cfg)}
        (folder / "config.json").write_text(json.dumps(values))
        chosen = trained_filter(recipe.STAGES["vpit"](model.cfg))
        state = nnx.to_flat_state(nnx.state(model, chosen))
        ocp.save(folder / "final", {".".join(map(str, p)): v[...] for p, v in state})


def test_adapters_of_a_run_leave_in_pefts_format(tmp_path, capsys):
    """The language model's into the folder itself, the connector's beside them."""
    adapters = lora.LoraConfig(r"llm\.layers\..*q_proj|connector\..*", rank=2, alpha=4.0)
    cfg = dataclasses.replace(TINY, lora=adapters)
    model = random_b(recipe.create(cfg, nnx.Rngs(0)))
    Fake(tmp_path / "one", cfg, model)
    out, workdir = tmp_path / "out", f"workdir:{tmp_path / 'one'}"
    assert cli.main(["convert", "--from", workdir, "--to", "peft", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert peft.read_config(out)["target_modules"] == ["q_proj"]
    again = recipe.create(TINY, nnx.Rngs(0))
    for part, folder in (("llm", out), ("connector", out / "connector")):
        peft.load_peft(getattr(again, part), folder)
        mine, theirs = peft.tensors(getattr(model, part)), peft.tensors(getattr(again, part))
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[k], theirs[k]) for k in mine)

    Fake(tmp_path / "two", TINY, recipe.create(TINY, nnx.Rngs(0)))
    for source, message in ((f"workdir:{tmp_path / 'two'}", "without adapters"), ("x", "workdir:")):
        words = ["convert", "--from", source, "--to", "peft", "--out", str(tmp_path / "no")]
        assert cli.main(words) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("rank", [None, 2, 5])
def test_the_next_stage(tmp_path, rank):
    """Same adapters go on, other ones or none: the old ones are merged into the kernels."""
    cfg = dataclasses.replace(TINY, lora=lora.LoraConfig(rank=2, alpha=4.0))
    model = random_b(recipe.create(cfg, nnx.Rngs(0)))
    Fake(tmp_path / "one", cfg, model)
    second = None if rank is None else lora.LoraConfig(rank=rank, alpha=2.0 * rank)
    other = recipe.create(dataclasses.replace(TINY, lora=second), nnx.Rngs(0))
    load_workdir(other, tmp_path / "one")
    np.testing.assert_allclose(states_of(other.llm), states_of(model.llm), atol=2e-5)
    found = dict(lora.adapters(other))
    if rank == 2:
        np.testing.assert_array_equal(
            found["llm.layers.mlp.up_proj"].lora_b[...],
            model.llm.layers.mlp.up_proj.lora_b[...],
        )
    elif rank:
        assert not found["llm.layers.mlp.up_proj"].lora_b[...].any()


# ---- a run that is interrupted


def test_an_interrupted_run_ends_with_the_same_adapters(tmp_path, monkeypatch):
    """Cut off in step 4 with a checkpoint of step 2, then told to stop after step 3: to the bit as
    if nothing had been, with dropout, and with packed frozen weights that no checkpoint holds."""
    model = dict(
        llm="tiny", vision=VisionConfig("none", feature_width=8, tokens=4), head="none",
        text_chunk=16,
        frozen_weights="int8",
        lora=dict(target=r"llm\.layers\..*(q|up)_proj", rank=2, dropout=0.3, train=""),
    )  # fmt: skip
    config = dict(
        recipe="tests.models.tuned", stage="vpit", steps=5, batch_size=4, model=model, data={},
        optim=dict(learning_rate=0.02, warmup=2), log_every=1, checkpoint_every=2,
        tensorboard=False, compilation_cache="",
    )  # fmt: skip
    loop.train(config, tmp_path / "whole")

    def power_cut(batch, *where, seen=[]):  # noqa: B006
        seen.append(batch)
        if len(seen) == 4:
            raise RuntimeError("power cut")
        return put(batch, *where)

    put = loop.shards.to_devices
    with monkeypatch.context() as patch:
        patch.setattr(loop.shards, "to_devices", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            loop.train(config, tmp_path / "cut")
    with monkeypatch.context() as patch:
        stop = lambda self, step: step == 3 and not self._note()  # noqa: E731
        patch.setattr(loop.Sigterm, "received", stop)
        with pytest.raises(Preempted, match="after step 3"):
            loop.train(config, tmp_path / "cut")
    assert not (tmp_path / "cut/final").exists()
    loop.train(config, tmp_path / "cut")

    whole, cut = (checkpoint.read_export(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and len(whole) == 4
    for name, value in whole.items():
        assert lora.is_adapter(name.split(".")) and np.abs(value).max() > 0
        np.testing.assert_array_equal(value, cut[name], err_msg=name)
