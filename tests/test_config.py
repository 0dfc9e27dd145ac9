"""Config files, and the dataclasses that are built from them."""

import copy
import dataclasses

import pytest
from ml_collections import ConfigDict

from metamorph_jax import config
from metamorph_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Thing:
    width: int
    rate: float = 0.1
    note: str | None = None
    sources: tuple[Source, ...] = ()
    inner: Source = Source("x")
    extra: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.width < 1:
            raise ValueError("width must be positive")


def test_builds_nested():
    got = config.build(
        Thing,
        {"width": 3, "rate": 1, "sources": {"a": {"path": "p"}}, "inner": {"path": "q"},
         "extra": {"k": 2.0}},
    )  # fmt: skip
    assert got == Thing(3, 1.0, None, (Source("p", name="a"),), Source("q"), {"k": 2.0})
    assert config.build(Thing, {"width": 3, "sources": [{"path": "p"}]}).sources == (Source("p"),)
    assert config.build(Thing, ConfigDict({"width": 3, "inner": {"path": "q"}})).inner.path == "q"
    assert config.build(Thing, dataclasses.asdict(got)) == got


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "config.widht is not an option; did you mean config.width?"),
        ({}, "config lacks width"),
        ({"width": "3"}, "config.width must be int, not '3'"),
        ({"width": True}, "config.width must be int"),
        ({"width": 0}, "width must be positive"),
        ({"width": 3, "inner": {"pat": "x"}}, "did you mean config.inner.path"),
        ({"width": 3, "sources": [{"path": 1}]}, r"config.sources\[0\].path must be str"),
        ({"width": 3, "sources": {"a": {}}}, "config.sources.a lacks path"),
        ({"width": 3, "sources": 1}, "config.sources must be table, not 1"),
        ({"width": 3, "inner": 4}, "config.inner must be a table of options"),
    ],
)
def test_says_what_is_wrong(values, message):
    with pytest.raises(ConfigError, match=message):
        config.build(Thing, values)


def test_narrowed():
    @dataclasses.dataclass(frozen=True)
    class Whole:
        """Attributes:
        size: it is documented.
        """

        size: int
        part: dict
        more: Source = Source("x")

    cls = config.narrowed(Whole, part=Source)
    assert config.build(cls, {"size": 3, "part": {"path": "p"}}).part == Source("p")
    with pytest.raises(ConfigError, match=r"config.part.weight must be float, not 'x'"):
        config.build(cls, {"size": 3, "part": {"path": "p", "weight": "x"}})
    assert [f.name for f in dataclasses.fields(cls)] == ["size", "part", "more"]


# ---- files


@pytest.fixture
def write(tmp_path):
    def write(body: str, name: str = "c.py") -> str:
        (tmp_path / name).write_text(
            "from ml_collections import ConfigDict\n"
            "from metamorph_jax.config import table\n"
            f"from {__name__} import Thing\n{body}\n"
        )
        return str(tmp_path / name)

    return write


def test_load(write):
    file = write("def get_config(arg='small'):\n    return ConfigDict(dict(size=arg, n=1))")
    assert config.load_config(file).size == "small"
    got = config.load_config(f"{file}:a=1,b=2", {"n": "4"})
    assert (got.size, got.n) == ("a=1,b=2", 4)


def test_a_table_has_every_option_and_is_locked(write):
    file = write(
        "def get_config():\n"
        "    sources = dict(z=dict(path='p'), a=dict(path='q'))\n"
        "    config = table(Thing, dict(width=2, sources=sources))\n"
        "    config.note = 'later'\n"
        "    config.inner = dict(path='r')\n"
        "    return config"
    )
    got = config.load_config(file, {"inner.weight": "2"})
    assert got.to_dict() == {
        "width": 2, "rate": 0.1, "note": "later", "extra": {},
        "inner": {"path": "r", "weight": 2.0, "name": ""},
        "sources": {"z": {"path": "p", "weight": 1.0, "name": "z"},
                    "a": {"path": "q", "weight": 1.0, "name": "a"}},
    }  # fmt: skip
    assert list(got.sources) == ["z", "a"]  # in the order of the file
    assert config.declared(got) is not dict
    with pytest.raises(AttributeError):
        got.sources.b = 1
    with pytest.raises(TypeError):
        got.width = "wide"
    assert copy.deepcopy(got) == got


def test_without_declared_types(write):
    """Any key may be set; values are Python literals, or text, and what was text stays text."""
    file = write(
        "def get_config():\n"
        "    return ConfigDict(dict(a=dict(b=1.5, on=False, none=None), n=3, text='x'))"
    )
    got = config.load_config(
        file,
        {"a.b": "2", "a.on": "true", "a.none": "4", "n": "7", "text": "1e3", "a.new": "(1, 'b')",
         "other.word": "some"},
    )  # fmt: skip
    assert got.to_dict() == {
        "a": {"b": 2, "on": True, "none": 4, "new": (1, "b")}, "n": 7, "text": "1e3",
        "other": {"word": "some"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="config.n is not a table, so it has no option 'm'"):
        config.load_config(file, {"n.m": "3"})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 3", r"c.py has no get_config\(arg\)"),
        ("get_config = 3", r"c.py has no get_config\(arg\)"),
        ("\nx = y", r"c.py, line 5: NameError: name 'y' is not defined"),
        ("x = (", r"c.py, line 4: SyntaxError"),
        ("def get_config():\n    return 1 / 0", r"c.py, line 5: ZeroDivisionError"),
        ("def get_config():\n    return {}", r"c.py: get_config returned dict, not a ConfigDict"),
        ("def get_config(a, b): pass", r"c.py: TypeError: get_config\(\) missing"),
        ("def get_config():\n    return table(Thing, dict(widht=1))",
         r"c.py: config.widht is not an option; did you mean config.width\?"),
        ("def get_config():\n    c = table(Thing, dict(width=1))\n    c.rate = 'x'\n    return c",
         r"c.py, line 6: TypeError: Could not override field 'rate'"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(write, body, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.load_config(write(body))
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_are_missing(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        config.load_config(str(tmp_path / "d.py"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="config.json is not a Python file"):
        config.load_config(str(tmp_path / "config.json"))
