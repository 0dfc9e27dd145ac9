import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metamorph_jax import config as configs
from metamorph_jax.errors import ConfigError
from metamorph_jax.train import optim, state
from metamorph_jax.train.config import Group, OptimConfig

SHAPES = {
    "llm.layers.q.kernel": (3, 8, 8),
    "llm.layers.q.bias": (3, 8),
    "llm.layers.input_layernorm.scale": (3, 8),
    "connector.linears.0.kernel": (4, 8),
    "llm.embed_tokens.added": (2, 8),
}
PART = {k: k.split(".")[0] for k in SHAPES}
CONNECTOR = Group("connector", r"connector\..*", rate=3.0)


def tree(seed, scale=1.0):
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(seed), len(SHAPES)), strict=True))
    return {n: scale * jax.random.normal(keys[n], s) for n, s in SHAPES.items()}


def run(cfg, steps, grads_of, total=8):
    """(parameters, optimizer state) after some steps from `tree(0)`."""
    params = tree(0)
    optimizer = optim.build(cfg, params, 1, total)
    opt_state = optimizer.transformation.init(params)

    @jax.jit
    def step(params, opt_state, grads, t):
        norm = jnp.sqrt(sum(optim.squared_norms(grads, PART).values()))
        updates, opt_state = optimizer.transformation.update(
            optim.clip(grads, norm, cfg.clip_norm), opt_state, params, rate=optimizer.rate(t)
        )
        return optax.apply_updates(params, updates), opt_state

    for t in range(steps):
        params, opt_state = step(params, opt_state, grads_of(t), jnp.int32(t))
    return params, opt_state


def constant(**changes):
    return OptimConfig(1e-2, clip_norm=None, schedule="constant", warmup=0, **changes)


def adam(opt_state):
    return opt_state[0][0]


@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_optax(clip, decay):
    cfg = OptimConfig(1e-2, clip_norm=clip, weight_decay=decay, warmup=2)
    schedule = optim.make_schedule(cfg, 1, 8)
    grads_of = lambda t: tree(10 + t, 10.0 ** (t % 3 - 1))  # noqa: E731
    ours, opt_state = run(cfg, 8, grads_of)

    mask = {n: optim.is_decayed(n, len(s)) for n, s in SHAPES.items()}
    assert [n for n in mask if not mask[n]] == [
        "llm.layers.q.bias", "llm.layers.input_layernorm.scale"
    ]  # fmt: skip
    tx = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(schedule, weight_decay=decay, mask=mask),
    )
    params = tree(0)
    state = tx.init(params)
    for t in range(8):
        updates, state = tx.update(grads_of(t), state, params)
        params = optax.apply_updates(params, updates)
    for n in SHAPES:
        np.testing.assert_allclose(ours[n], params[n], rtol=1e-6, atol=1e-6)
    for n in SHAPES:
        np.testing.assert_allclose(adam(opt_state).nu[n], state[1][0].nu[n], rtol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "theirs"),
    [
        (constant(name="lion", b2=0.95), lambda: optax.lion(1e-2, b2=0.95, weight_decay=0.0)),
        (constant(name="nadamw"), lambda: optax.nadam(1e-2)),
        (constant(name="adafactor"), lambda: optax.adafactor(1e-2)),
        (constant(name="sgd", b1=0.9, options={"nesterov": True}),
         lambda: optax.sgd(1e-2, 0.9, nesterov=True)),
        (constant(name="rmsprop", b2=0.8), lambda: optax.rmsprop(1e-2, decay=0.8)),
        (constant(name="adagrad"), lambda: optax.adagrad(1e-2)),
        (constant(name="radam"), lambda: optax.radam(1e-2)),
        (constant(name="adabelief"), lambda: optax.adabelief(1e-2)),
        (constant(name="adam", options={"eps_root": 0.1}), lambda: optax.adam(1e-2, eps_root=0.1)),
    ],
    ids=lambda v: v.name if isinstance(v, OptimConfig) else "",
)  # fmt: skip
def test_every_name_is_optax(cfg, theirs):
    grads_of = lambda t: tree(10 + t)  # noqa: E731
    ours, _ = run(cfg, 4, grads_of)
    params, tx = tree(0), theirs()
    opt_state = tx.init(params)
    for t in range(4):
        updates, opt_state = tx.update(grads_of(t), opt_state, params)
        params = optax.apply_updates(params, updates)
    for n in SHAPES:
        np.testing.assert_allclose(ours[n], params[n], rtol=1e-5, atol=1e-6, err_msg=n)


def test_muon_makes_each_layers_matrix_orthogonal():
    """Stacked kernels are matrices of their own; tables and vectors are AdamW's."""
    cfg = constant(name="muon", options={"ns_steps": 10})
    start, grads = tree(0), tree(5)
    params, opt_state = run(cfg, 1, lambda t: grads)
    moved = (start["llm.layers.q.kernel"] - params["llm.layers.q.kernel"]) / 1e-2
    for layer in range(3):
        sizes = np.linalg.svd(np.asarray(moved[layer]), compute_uv=False)
        assert sizes.min() > 0.6 and sizes.max() < 1.3
    plain, _ = run(constant(name="nadamw"), 1, lambda t: grads)
    for n in ("llm.embed_tokens.added", "llm.layers.q.bias"):
        np.testing.assert_allclose(params[n], plain[n], rtol=1e-6)
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    second = {path[-1].key for path, _ in leaves if "nu" in jax.tree_util.keystr(path)}
    assert second == {"llm.embed_tokens.added", "llm.layers.q.bias",
                      "llm.layers.input_layernorm.scale"}  # fmt: skip


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_all_learn_and_have_groups(name):
    """Down a quadratic bowl; a group at rate 0 stays where it is, first match wins."""
    still = Group("still", r"connector\..*", rate=0.0)
    cfg = constant(name=name, groups=(still, Group("rest", r".*")))
    params = tree(0)
    optimizer = optim.build(cfg, params, 1, 8)
    opt_state = optimizer.transformation.init(params)
    size = lambda p: float(optax.global_norm(p))  # noqa: E731
    update = jax.jit(optimizer.transformation.update)
    for _ in range(20):
        updates, opt_state = update(params, opt_state, params, rate=jnp.float32(1e-2))
        params = optax.apply_updates(params, updates)
    assert size(params) < 0.999 * size(tree(0))
    np.testing.assert_array_equal(
        params["connector.linears.0.kernel"], tree(0)["connector.linears.0.kernel"]
    )


def test_rate_of_a_group():
    grads_of = lambda t: tree(20 + t)  # noqa: E731
    fast, _ = run(constant(groups=(CONNECTOR,)), 3, grads_of)
    one, _ = run(constant(), 3, grads_of)
    three, _ = run(OptimConfig(3e-2, clip_norm=None, schedule="constant", warmup=0), 3, grads_of)
    for n in SHAPES:
        expected = three if n.startswith("connector") else one
        np.testing.assert_allclose(fast[n], expected[n], rtol=1e-6, atol=1e-7)


def test_decay_of_a_group():
    """The decay of its group, else of the optimizer; biases and norms have none in any group."""
    groups = (
        Group("connector", r"connector\..*", decay=0.5),
        Group("norms", ".*norm.*", decay=0.5),
        Group("table", r".*added", decay=0.0),
    )
    nothing = lambda t: jax.tree.map(jnp.zeros_like, tree(0))  # noqa: E731
    params, _ = run(constant(weight_decay=0.1, groups=groups), 1, nothing)
    left = {"connector.linears.0.kernel": 1 - 0.5e-2, "llm.layers.q.kernel": 1 - 0.1e-2}
    for n, p in tree(0).items():
        np.testing.assert_allclose(params[n], left.get(n, 1.0) * p, rtol=1e-6, err_msg=n)


def test_groups_of_a_config():
    table = {"groups": {"connector": {"match": r"connector\..*", "rate": 3}}}
    cfg = configs.build(OptimConfig, table)
    assert cfg.groups == (CONNECTOR,)
    twice = OptimConfig(groups=(Group("all", ".*"), CONNECTOR))
    with pytest.raises(ConfigError, match=r"groups.connector: .*an earlier group doesn't match"):
        optim.build(twice, tree(0), 1, 8)
    with pytest.raises(ConfigError, match=r"groups.part: .*Trained: connector.linears.0.kernel, "):
        optim.build(OptimConfig(groups=(Group("part", "connector"),)), tree(0), 1, 8)


def test_ema():
    params = tree(5)
    ema = optim.average(tree(0), params, 0.5, jnp.int32(0))
    keep = 2 / 11  # min(0.5, (1 + t) / (10 + t)) at t = 1
    for n, p in tree(0).items():
        np.testing.assert_allclose(ema[n], keep * p + (1 - keep) * params[n], rtol=1e-6)
    late = optim.average(tree(0), params, 0.5, jnp.int32(1000))
    np.testing.assert_allclose(
        late["llm.layers.q.bias"],
        0.5 * (tree(0)["llm.layers.q.bias"] + params["llm.layers.q.bias"]), rtol=1e-5, atol=1e-7,
    )  # fmt: skip


def test_norms_by_part():
    grads = tree(7)
    squares = optim.squared_norms(grads, PART)
    assert set(squares) == {"llm", "connector"}
    total = np.sqrt(sum(float(s) for s in squares.values()))
    assert total == pytest.approx(float(optax.global_norm(grads)), rel=1e-6)


def test_square_root_rule_and_schedules():
    cfg = OptimConfig(6.93e-5, base_batch=1536)
    assert optim.peak_rate(cfg, 48) == pytest.approx(6.93e-5 * (48 / 1536) ** 0.5)
    assert optim.peak_rate(OptimConfig(1.0, base_batch=100, batch=400), 7) == 2.0
    assert optim.peak_rate(OptimConfig(1e-4), 9999) == 1e-4
    assert optim.warmup_steps(OptimConfig(1.0, warmup=0.03), 1000) == 30
    assert optim.warmup_steps(OptimConfig(1.0, warmup=7), 1000) == 7
    rate = optim.make_schedule(OptimConfig(1.0, warmup=10), 1, 100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(55), rate(100)],
                               [0, 0.5, 1, 0.5, 0], atol=1e-6)  # fmt: skip
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="linear"), 1, 14)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4, 9, 14)], [0, 1, 2, 1, 0], atol=1e-6)
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="rsqrt"), 1, 100)
    np.testing.assert_allclose([rate(2), rate(4), rate(16)], [1, 2, 1], rtol=1e-6)
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="wsd"), 1, 100)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4, 80, 90, 100)], [0, 1, 2, 2, 1, 0])
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="constant"), 1, 100)
    np.testing.assert_allclose([rate(2), rate(4), rate(99)], [1, 2, 2], rtol=1e-6)
    for name in ("constant", "cosine", "linear", "wsd", "scratch"):  # without a warm-up
        rate = optim.make_schedule(OptimConfig(2.0, warmup=0, schedule=name), 1, 100)
        assert rate(1) > 1.9, name
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="finetune"), 1, 14)
    np.testing.assert_allclose([rate(4), rate(9), rate(14)], [2, 1, 0], atol=1e-6)
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="scratch"), 1, 14)
    np.testing.assert_allclose([rate(2), rate(9)], [1, 2], atol=1e-6)


def test_first_moment_in_bfloat16():
    """Half as large, and the same way but for its rounding; the second moment stays as it is."""
    grads_of = lambda t: tree(10 + t)  # noqa: E731
    params, opt_state = run(constant(momentum_dtype="bfloat16"), 8, grads_of)
    exact, _ = run(constant(), 8, grads_of)
    assert {m.dtype for m in adam(opt_state).mu.values()} == {jnp.dtype("bfloat16")}
    assert {m.dtype for m in adam(opt_state).nu.values()} == {jnp.dtype("float32")}
    for name, start in tree(0).items():
        off, moved = np.abs(params[name] - exact[name]), np.abs(exact[name] - start)
        assert 0 < off.max() < 0.02 * moved.max()
    with pytest.raises(ValueError, match="neither float32 nor bfloat16"):
        OptimConfig(1e-2, momentum_dtype="float16")


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_moments_in_bfloat16_wherever_there_are_some(name):
    momentum = {"b1": 0.9} if name in ("sgd", "adafactor") else {}
    cfg = constant(name=name, momentum_dtype="bfloat16", **momentum)
    if name in ("radam", "adabelief", "rmsprop", "adagrad"):
        with pytest.raises(ConfigError, match=f"{name} can't keep its first moment in bfloat16"):
            optim.build(cfg, tree(0), 1, 8)
        return
    kinds = [x.dtype for x in jax.tree.leaves(optim.build(cfg, tree(0), 1, 8).state)]
    assert kinds.count(jnp.bfloat16) == len(SHAPES)


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_state_lies_as_its_parameters(name):
    """Also adafactor's factored moments; on a mesh that is only described."""
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
    P, Named = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    specs = {"llm.q.kernel": P(None, "fsdp", "tensor"), "llm.q.bias": P(None, "tensor"),
             "head.kernel": P("fsdp")}  # fmt: skip
    where = {n: Named(mesh, s) for n, s in specs.items()}
    sizes = {"llm.q.kernel": (4, 256, 512), "llm.q.bias": (4, 512), "head.kernel": (256, 640)}
    shapes = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in sizes.items()}
    optimizer = optim.build(constant(name=name), shapes, 1, 8)
    found = state.optimizer_shardings(optimizer, where, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(optimizer.state)
    leaves = jax.tree_util.tree_leaves_with_path(optimizer.state)
    seen = {}
    for (path, leaf), lies in zip(leaves, jax.tree.leaves(found), strict=True):
        key = getattr(path[-1], "key", None)
        if key in shapes and leaf.shape == shapes[key].shape:
            assert lies == where[key]
        elif key in shapes and leaf.shape != (1,):
            seen[key, leaf.shape] = lies.spec
        else:
            assert lies.spec == P()
    factored = {
        ("llm.q.kernel", (4, 256)): P(None, "fsdp"),
        ("llm.q.kernel", (4, 512)): P(None, "tensor"),
        ("head.kernel", (256,)): P("fsdp"),
        ("head.kernel", (640,)): P(None),
    }
    assert seen == (factored if name == "adafactor" else {})
