import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from metamorph_jax import config as configs
from metamorph_jax.errors import ConfigError
from metamorph_jax.sweep import grid


@dataclasses.dataclass(frozen=True)
class Inner:
    x: float = 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    rate: float = 0.1
    steps: int = 4
    name: str = "a"
    flag: bool = False
    inner: Inner = Inner()
    none: int | None = None
    each: tuple[float, ...] = ()
    free: dict = dataclasses.field(default_factory=dict)


FILE = f"""
from metamorph_jax.config import table
from {__name__} import Options
def get_config(arg=""):
    return table(Options, dict())
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "c.py").write_text(FILE)
    return str(tmp_path / "c.py")


def runs(sweep, **config):
    add = grid.Add(ConfigDict(config))
    sweep(add)
    return add.runs


def test_product_zip_single_in_order_and_once():
    def sweep(add):
        add.product({"a": [1, 2], "b.c": (x for x in "uv")})
        add.zip({"a": [1, 5], "b.c": ["u", "w"]})  # the first one is there already
        add({"b.c": "z"}, a=add.config.base * 2)

    assert runs(sweep, base=21) == [
        {"a": 1, "b.c": "u"}, {"a": 1, "b.c": "v"}, {"a": 2, "b.c": "u"}, {"a": 2, "b.c": "v"},
        {"a": 5, "b.c": "w"},
        {"b.c": "z", "a": 42},
    ]  # fmt: skip


def test_random_has_a_seed_and_grows():
    def draw(n, seed=3, **more):
        def sweep(add):
            table = {"rate": add.log(1e-5, 1e-1), "p": add.uniform(2, 3), "k": [1, 2, 3]}
            add.random(n, table | more, seed=seed)

        return runs(sweep)

    few = draw(4)
    assert few == draw(9)[:4] and few != draw(4, seed=4)
    assert [{k: r[k] for k in ("rate", "p", "k")} for r in draw(4, new=["x", "y"])] == few
    many = draw(300)
    assert all(1e-5 <= r["rate"] <= 1e-1 and 2 <= r["p"] <= 3 for r in many)
    # Evenly in the logarithm: half below the middle of the exponents.
    assert 0.4 < sum(r["rate"] < 1e-3 for r in many) / len(many) < 0.6
    assert {r["k"] for r in many} == {1, 2, 3}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (lambda add: add.zip({"rate": [1, 2], "steps": [1]}), "rate: 2, steps: 1"),
        (lambda add: add.product({"name": "abc"}), "name needs a list"),
        (lambda add: add.log(0, 1), "no range from 0 to 1"),
        (lambda add: add({"rtae": 1.0}), "run 1 .*did you mean config.rate"),
        (lambda add: [add(rate=0.2), add(steps="many")], "run 2 .*steps must be int"),
        (lambda add: add({"inner.x": 3, "rate": 2}), "--config.rate is given"),
        (lambda add: None, "adds no run"),
        (lambda add: add.product({"rate": [1j]}), "rate is of type complex"),
        (lambda add: add({"name": pathlib.Path("a")}), "name is of type PosixPath"),
        (lambda add: add({"name": "a\0b"}), "which no command line can hold"),
        (lambda add: add({"name": "\ud800"}), "not Unicode"),
        (lambda add: add({"free.a": float("nan")}), "run 1 .*would be other values"),
        (lambda add: add({3: 1}), "3 is not the name of an option"),
        (lambda add: add({"rate": np.zeros((2, 2))}), "run 1 .*rate must be float"),
        (lambda add: add({"rate": np.float64("nan"), "steps": 1.5}), "run 1 .*steps must be int"),
        (lambda add: add.product({"rate": []}), "rate needs 1 to 1,000 values"),
        (lambda add: add.product({"rate": iter(int, 1)}), "rate needs 1 to 1,000 values"),
        (lambda add: add.product({"rate": range(99), "steps": range(99)}), "more than 1,000 runs"),
        (lambda add: add.random(10**9, {"rate": [1]}), "0 to 1,000 runs, not 1000000000"),
        (lambda add: add.random(2, {"rate": []}), "rate needs 1 to"),
        (lambda add: add.uniform(0, float("inf")), "no range from 0 to inf"),
        (lambda add: add(3), "c.py.*TypeError"),
        (lambda add: add.config.nothing, "c.py.*AttributeError"),
        (lambda add: add.product(["rate"]), "c.py.*AttributeError"),
    ],
)
def test_wrong_sweeps(spec, sweep, message):
    with pytest.raises(ConfigError, match=message):
        grid.expand(sweep, spec, {"rate": "0.5"} if "given" in message else {})


def test_values_survive_the_command_line(spec):
    """What a run is given as text is what the sweep meant."""
    values = {"rate": 1.5e-07, "steps": 9, "name": "a b=c'", "flag": True, "inner.x": 2, "none": 3}
    ((_, config),) = grid.expand(lambda add: add(values), spec, {})
    told = dict(a.removeprefix("--config.").split("=", 1) for a in grid.as_arguments(values))
    assert configs.load_config(spec, told) == config
    assert (config.rate, config.name, config.flag, config.inner.x) == (1.5e-07, "a b=c'", True, 2.0)


def flat(add):
    """Values as people write them, and what they mean."""
    add.product({"rate": np.logspace(-4, -2, 3)})
    add.product({"rate": list(np.linspace(0, 1, 3, dtype=np.float32))})
    add.product({"steps": np.arange(2)})
    add.zip({"steps": jnp.arange(5, 7), "flag": np.array([True, False])})
    add({"rate": np.float64(0.3), "name": np.str_("1e3"), "none": None})
    add({"each": (1, np.float32(0.5)), "inner": {"x": np.int64(3)}})
    add(each=np.array([1.0, 2.0]), flag=np.bool_(True))
    add({"free": {"a": [1, "2", None]}})
    add(rate=float("inf"))


def test_values_of_numpy_and_jax_are_what_the_run_gets(spec):
    """The config that was checked is the one that the run makes of its command line."""
    made = grid.expand(flat, spec, {})
    assert len(made) == 15
    for values, config in made:
        told = [a.removeprefix("--config.").split("=", 1) for a in grid.as_arguments(values)]
        assert repr(configs.load_config(spec, dict(told)).to_dict()) == repr(config.to_dict())
        assert json.loads(grid.identity(values)) == values
    rates = [config.rate for _, config in made[:3]]
    assert rates == [1e-4, 1e-3, 1e-2] and made[10][1].name == "1e3"
