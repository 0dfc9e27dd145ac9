"""The seams of the package: who may import whom, and that shared code knows no recipe.

The order is that of `docs/design.md`: a file imports from its own line and from lines above.
"""

import ast
import pathlib
import re

import pytest

from metamorph_jax import recipe

PACKAGE = pathlib.Path(recipe.__file__).parent
LINES = (
    ("errors", "files", "paths", "lock", "options", "config", "types", "recipe", "sharding",
     "distributed", "platforms", "chips", "flops", "endpoint"),
    ("nn",),
    ("models",),
    ("data",),
    ("losses",),
    ("train",),
    ("convert",),
    ("sampling",),
    ("recipes",),
    ("plan", "sweep", "eval", "instruct", "quickstart", "api", "cli"),
)  # fmt: skip
LEVEL = {name: number for number, line in enumerate(LINES) for name in line}
# The package's own front door stands above all of it, and imports what it needs when asked.
DOOR = {"__init__", "__main__"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: pathlib.Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.Module):
    """(line, dotted module of ours) of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names)


def modules(file: pathlib.Path):
    for line, name in imported(ast.parse(file.read_text())):
        head, *rest = name.split(".")
        if head == "metamorph_jax" and rest:
            yield line, rest


def named(files):
    return [pytest.param(f, id=str(f.relative_to(PACKAGE))) for f in files]


def test_every_file_has_its_line():
    assert {part_of(f) for f in FILES} == LEVEL.keys() | DOOR


@pytest.mark.parametrize("file", named(f for f in FILES if part_of(f) not in DOOR))
def test_imports_follow_the_layout(file):
    own = LEVEL[part_of(file)]
    against = [
        f"line {line}: {'.'.join(rest)}"
        for line, rest in modules(file)
        if rest[0] in LEVEL and LEVEL[rest[0]] > own
    ]
    assert not against, f"{file.relative_to(PACKAGE)} imports what stands below it: {against}"


@pytest.mark.parametrize("file", named(f for f in FILES if part_of(f) != "cli"))
def test_nobody_imports_the_command_line(file):
    allowed = part_of(file) in DOOR
    assert allowed or not any(rest[0] == "cli" for _, rest in modules(file))


def test_models_know_no_recipe_and_recipes_don_t_know_each_other():
    for file in FILES:
        if part_of(file) != "recipes":
            continue
        own = file.relative_to(PACKAGE).with_suffix("").parts[1]
        others = [rest[1] for _, rest in modules(file) if rest[0] == "recipes" and len(rest) > 1]
        assert {*others} <= {own}, file


# Shared code: all but the recipes themselves, and the quick start, which runs particular ones.
SHARED = [f for f in FILES if part_of(f) not in {"recipes", "quickstart", *DOOR}]


@pytest.mark.parametrize("file", named(SHARED))
def test_shared_code_knows_no_recipe(file):
    """No import of one, and no string that is one's name."""
    tree = ast.parse(file.read_text())
    wrong = [line for line, rest in modules(file) if rest[0] == "recipes" and len(rest) > 1]
    names = set(recipe.installed())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
        and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    wrong += [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names and id(node) not in docs
    ]
    assert not wrong, f"{file.relative_to(PACKAGE)}: a recipe's name in lines {wrong}"


_ASKED = re.compile(r"\b(hasattr|getattr)\(\s*(recipe|recipes|model_cfg|cfg\.model|stream)\b")


@pytest.mark.parametrize("file", named(SHARED))
def test_nothing_is_asked_of_a_recipe_by_hasattr(file):
    """What may be asked of recipes, models and data is in `recipe.py`, and all of them have it."""
    found = [n for n, line in enumerate(file.read_text().splitlines(), 1) if _ASKED.search(line)]
    assert not found, f"{file.relative_to(PACKAGE)}: hasattr or getattr in lines {found}"
