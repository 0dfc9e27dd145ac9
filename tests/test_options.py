"""Options by the types that dataclasses declare: parsing, changing, listing."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, strategies

from metamorph_jax import config, options
from metamorph_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Attributes:
    rank: number of columns; alpha: its scale.
    """

    rank: int = 16
    alpha: float = 32.0


@dataclasses.dataclass(frozen=True)
class Grid:
    """A network on a grid.

    Attributes:
        size: of its input; default: a large one.
        levels: channels of each level,
            from fine to coarse.

    Raises:
        ValueError: never.
    """

    size: int = 64
    levels: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Tokens:
    size: int = 64
    patch: int = 4
    inner: Adapter = Adapter(rank=2)


@dataclasses.dataclass(frozen=True)
class Group:
    match: str = ".*"
    rate: float = 1.0
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Model:
    text: str = "a"
    maybe: str | None = None
    count: int = 1
    limit: int | None = None
    rate: float = 0.5
    cap: float | None = 1.0
    on: bool = False
    mean: tuple[float, ...] = (0.5, 0.5)
    pair: tuple[int, str] = (1, "b")
    either: int | tuple[int, ...] = 3
    free: dict = dataclasses.field(default_factory=dict)
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"fsdp": -1})
    adapter: Adapter | None = None
    net: Grid | Tokens = Tokens(size=8)
    groups: tuple[Group, ...] = ()
    tasks: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    any: Any = None


@dataclasses.dataclass(frozen=True)
class Run:
    steps: int
    model: Model = Model()


BASE = options.complete(Run, {"steps": 1})


def changed(**overrides):
    """The model that comes out of these changes; `__` stands for a dot."""
    given = {f"model.{k.replace('__', '.')}": v for k, v in overrides.items()}
    return config.build(Run, options.change(Run, BASE, given)).model


def test_values_are_parsed_by_their_declared_type():
    got = changed(
        text="1e-4", maybe="3", count="7", limit="8", rate="1e-4", cap="None", on="true",
        mean="(1, 0.5, 2)", pair="[2, 'x']", either="(1, 2)", any="x",
    )  # fmt: skip
    want = dict(text="1e-4", maybe="3", count=7, limit=8, rate=1e-4, cap=None, on=True,
                mean=(1.0, 0.5, 2.0), pair=(2, "x"), either=(1, 2), any="x")  # fmt: skip
    assert {k: getattr(got, k) for k in want} == want
    assert [type(x) for x in got.mean] == [float] * 3
    assert changed(maybe="None", rate="3", either="4", on="False", text="None") == Model(
        maybe=None, rate=3.0, either=4, on=False, text="None"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", "many", "config.model.count must be int, not 'many'"),
        ("count", "1.5", "config.model.count must be int, not 1.5"),
        ("count", "true", "config.model.count must be int, not 'true'"),
        ("count", True, "config.model.count must be int, not True"),
        ("limit", "x", "config.model.limit must be int or None, not 'x'"),
        ("rate", "fast", "config.model.rate must be float, not 'fast'"),
        ("on", "1", "config.model.on must be bool, not 1"),
        ("on", "yes", "config.model.on must be bool, not 'yes'"),
        ("mean", "0.5", r"config.model.mean must be tuple\[float, ...\], not 0.5"),
        ("mean", "(1, 'x')", r"config.model.mean\[1\] must be float, not 'x'"),
        ("pair", "(1,)", r"config.model.pair must have 2 values, not \(1,\)"),
        ("text", 3, "config.model.text must be str, not 3"),
        ("free", "3", "config.model.free must be table, not 3"),
        ("mesh", "{'a': 'b'}", "config.model.mesh.a must be int, not 'b'"),
        ("mesh.fsdp", "1.5", "config.model.mesh.fsdp must be int, not 1.5"),
        ("mesh.none", "None", "config.model.mesh.none cannot be removed: there is none"),
        ("adapter", "3", "config.model.adapter must be a table of options, not 3"),
        ("adapter.rank", "None", "config.model.adapter.rank must be int, not None"),
        ("rate.x", "3", "config.model.rate is not a table, so it has no option 'x'"),
        ("groups.a", "3", "config.model.groups.a must be a table of options, not 3"),
    ],
)
def test_wrong_values(key, value, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        options.change(Run, BASE, {f"model.{key}": value})


def test_optional_tables():
    assert changed(adapter__rank="4").adapter == Adapter(4)
    assert changed(adapter="{'rank': 4}").adapter == Adapter(4)
    assert changed(adapter__rank="4", adapter="{'alpha': 2}").adapter == Adapter(4, 2.0)
    there = options.change(Run, BASE, {"model.adapter.rank": "4", "model.adapter.alpha": "5"})
    assert options.change(Run, there, {"model.adapter": "None"}) == BASE
    kept = options.change(Run, there, {"model.adapter.alpha": "6"})
    assert kept["model"]["adapter"] == {"rank": 4, "alpha": 6.0}
    whole = options.change(Run, there, {"model.adapter": "{'rank': 3}"})
    assert whole["model"]["adapter"] == {"rank": 3, "alpha": 32.0}


def test_unions_are_chosen_by_the_keys_given():
    assert changed(net__patch="2").net == Tokens(size=8, patch=2)
    assert changed(net__size="2").net == Tokens(size=2)
    # A key of the other one makes a table of the other one, whatever the order.
    assert changed(net__size="2", net__levels="(3,)").net == Grid(2, (3,))
    assert changed(net__levels="(3,)", net__size="2").net == Grid(2, (3,))
    assert changed(net="{'size': 3}").net == Grid(3)
    assert changed(net__inner__rank="5").net == Tokens(8, 4, Adapter(5))
    with pytest.raises(ConfigError, match="config.model.net: no kind of this table has all of"):
        changed(net__patch="2", net__levels="(3,)")


def test_tables_of_tables_and_with_any_keys():
    got = changed(groups__head__rate="7", groups__head__match="h", groups__x="{'rate': 2}")
    assert got.groups == (Group("h", 7.0, "head"), Group(rate=2.0, name="x"))
    assert changed(groups__head__name="other").groups == (Group(name="other"),)
    assert changed(tasks__a__rank="3").tasks == {"a": Adapter(3)}
    assert changed(mesh__tensor="4").mesh == {"fsdp": -1, "tensor": 4}
    assert changed(mesh__fsdp="None", mesh__data="2").mesh == {"data": 2}
    assert changed(mesh="{'data': 2}", mesh__tensor="4").mesh == {"data": 2, "tensor": 4}
    assert changed(free__a="1e-4", free__b="word", free__c__d="None").free == {
        "a": 1e-4, "b": "word", "c": {"d": None},
    }  # fmt: skip
    two = options.change(Run, BASE, {"model.groups.a.rate": "2", "model.groups.b.rate": "3"})
    one = options.change(Run, two, {"model.groups.a": None})
    assert list(one["model"]["groups"]) == ["b"]
    assert options.change(Run, two, {"model.groups": "{}"}) == BASE


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("stepps", "config.steps"),
        ("steps_", "config.steps"),
        ("modle.text", "config.model"),
        ("rank", "config.model.adapter.rank"),
        ("model.rank", "config.model.adapter.rank"),
        ("model.alpha", "config.model.adapter.alpha"),
        ("model.levels", "config.model.net.levels"),
        ("model.patches", "config.model.net.patch"),
        ("model.group_match", "config.model.groups.NAME.match"),
        ("model.net.pach", "config.model.net.patch"),
        ("model.adapter.rang", "config.model.adapter.rank"),
    ],
)
def test_the_right_name_is_found_anywhere(key, near):
    with pytest.raises(ConfigError) as caught:
        options.change(Run, BASE, {key: "1"})
    assert str(caught.value).endswith(f"is not an option; did you mean {near}?")


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ConfigError, match="config.qqq is not an option; known: steps, model$"):
        options.change(Run, BASE, {"qqq": "1"})


def test_every_option_is_listed():
    found = {o.path: o for o in options.listed(Run, BASE)}
    for name in ("steps", "model.net.inner.alpha", "model.groups.NAME.rate", "model.mesh.fsdp"):
        assert f"config.{name}" in found
    assert found["config.model.net.levels"].doc == "channels of each level, from fine to coarse."
    assert options.docs(Grid)["size"] == "of its input; default: a large one."
    assert found["config.model.adapter.rank"].doc == "number of columns"
    assert found["config.model.adapter.alpha"].doc == "its scale."
    assert not found["config.model.net.levels"].used and found["config.model.net.patch"].used
    assert not found["config.model.adapter.rank"].used
    assert found["config.model.net.inner.rank"].value == 2


# ---- any value comes back as it was given

NAMES = strategies.text("abcdefgh_", min_size=1, max_size=5)
FLOATS = strategies.floats(allow_nan=False)
FINITE = strategies.floats(allow_nan=False, allow_infinity=False)
VALUES = strategies.fixed_dictionaries(
    {},
    optional=dict(
        text=strategies.text(),
        count=strategies.integers(),
        limit=strategies.none() | strategies.integers(),
        rate=FLOATS,
        cap=strategies.none() | FLOATS,
        on=strategies.booleans(),
        mean=strategies.lists(FINITE).map(tuple),  # Python has no literal for infinity
        pair=strategies.tuples(strategies.integers(), strategies.text()),
        either=strategies.integers() | strategies.lists(strategies.integers()).map(tuple),
        free=strategies.dictionaries(
            NAMES, strategies.integers() | FINITE | strategies.text() | strategies.none()
        ),
        mesh=strategies.dictionaries(NAMES, strategies.integers()),
        adapter=strategies.none() | strategies.builds(Adapter, strategies.integers(), FINITE),
    ),
)  # fmt: skip


@given(VALUES)
def test_what_is_written_is_read(values):
    """Through text, as the command line and sweeps write values, and through tables."""
    want = dataclasses.replace(Model(), **values)
    table = dataclasses.asdict(want)
    assert config.build(Model, table) == want
    text = {k: v if isinstance(v, str) else repr(table[k]) for k, v in values.items()}
    assert config.build(Model, options.change(Model, options.complete(Model, {}), text)) == want


@given(strategies.permutations([
    ("model.count", "3"), ("model.adapter", "{'rank': 2}"), ("model.adapter.alpha", "3"),
    ("model.net.size", "2"), ("model.net.levels", "(3,)"), ("model.groups", "{}"),
    ("model.groups.a.rate", "2"), ("model.mesh", "{'data': 2}"), ("model.mesh.x", "4"),
]))  # fmt: skip
def test_the_order_of_changes_does_not_matter(changes):
    got = config.build(Run, options.change(Run, BASE, dict(changes))).model
    assert got == Model(
        count=3, adapter=Adapter(2, 3.0), net=Grid(2, (3,)), groups=(Group(rate=2.0, name="a"),),
        mesh={"data": 2, "x": 4},
    )  # fmt: skip


@given(strategies.text())
def test_any_text_is_a_value_or_one_line(text):
    for name in options.fields(Model):
        try:
            got = changed(**{name: text})
        except ConfigError as error:
            assert str(error).startswith(f"config.model.{name}")
            assert len(str(error).splitlines()) == 1
        else:
            assert options.complete(Model, dataclasses.asdict(got))
