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
        ({"width": 3, "inner": 4}, "config.inner must be a table of options"),
    ],
)
def test_says_what_is_wrong(values, message):
    with pytest.raises(ConfigError, match=message):
        config.build(Thing, values)


def test_overrides():
    c = ConfigDict({"a": {"b": 1.5, "on": False, "none": None}, "n": 3, "text": "x"}).lock()
    for key, value in {
        "a.b": "2", "a.on": "true", "a.none": "4", "n": "7", "text": "1e3",
    }.items():  # fmt: skip
        config.set_dotted(c, key, value)
    assert c.to_dict() == {"a": {"b": 2.0, "on": True, "none": 4}, "n": 7, "text": "1e3"}
    with pytest.raises(ConfigError, match="did you mean a.on"):
        config.set_dotted(c, "a.onn", "1")
    with pytest.raises(ConfigError, match="--config.n must be int, not 'x'"):
        config.set_dotted(c, "n", "x")


def test_load(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg='small'):\n    return ConfigDict(dict(size=arg, n=1))\n"
    )
    assert config.load_config(str(file)).size == "small"
    got = config.load_config(f"{file}:a=1,b=2", {"n": "4"})
    assert (got.size, got.n) == ("a=1,b=2", 4)
    with pytest.raises(ConfigError, match="no config file"):
        config.load_config(str(tmp_path / "d.py"))
