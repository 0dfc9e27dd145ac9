"""README and docs: every command in them exists with its options, and what they link to is there.

Commands that finish in seconds are run by the tests of their own part (`metamorph quickstart
--smoke` runs every stage); here each command line is parsed by the program itself, its config is
loaded with the changes it makes, and scripts are run with --help.
"""

import pathlib
import re
import shlex
import subprocess

import pytest

from metamorph_jax import cli
from metamorph_jax.config import load_config
from metamorph_jax.train.config import resolve

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_VARIABLES = {"$stage": "vpit", '"${more[@]}"': "", "$NAME": "vpit-8b-v5e-64"}


def blocks(page: pathlib.Path, language: str):
    """(line number, text) of the fenced blocks of a language."""
    text = page.read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
        yield text[: match.start()].count("\n") + 2, match[1]


def commands():
    """(page:line, words) of every command line in a bash block."""
    for page in PAGES:
        for first, block in blocks(page, "bash"):
            joined = re.sub(r"\\\n\s*", lambda m: " ", block)
            for line in joined.splitlines():
                for variable, value in _VARIABLES.items():
                    line = line.replace(variable, value)
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, id=f"{page.name}:{first}:{' '.join(words)[:60]}")


ALL = list(commands())


def test_pages_have_commands():
    assert len(ALL) > 25 and {p.name for p in PAGES} >= {"README.md", "recipes.md", "paper.md"}


def nested(words: list[str]) -> list[str]:
    """The metamorph command that a line runs, directly or through a launcher after `--`."""
    if words[0] == "metamorph":
        return words[1:]
    if "--" in words and words[words.index("--") + 1 :][:1] == ["metamorph"]:
        return words[words.index("--") + 2 :]
    return []


@pytest.mark.parametrize("words", [p for p in ALL if nested(p.values[0])])
def test_metamorph_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = nested(words)
    if not argv[1:]:
        return  # the end of a launcher's --prefix
    _, args = cli.parse([a.split("]")[0] for a in argv])
    spec = vars(args).get("config")
    if spec and spec.startswith("configs/"):
        resolve(load_config(spec, args.overrides))


@pytest.mark.parametrize("words", [p for p in ALL if p.values[0][0] in ("bash", "python")])
def test_scripts_exist_and_know_their_options(words):
    script = ROOT / words[1]
    assert script.is_file(), words
    done = subprocess.run(
        [*words[:1], script, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    known = script.read_text() + done.stdout
    for word in words[2:]:
        if word == "--":
            break
        if word.startswith("--"):
            assert word.split("=")[0].lstrip("-") in known, word


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(
            r"`((?:metamorph_jax|configs|launch|tests|benchmarks|notebooks)/"
            r"[\w/.-]+\.(?:py|sh|md|ipynb))`",
            page.read_text(),
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_that_pages_name_exist(page):
    """`config.a.b` and the cells of option tables."""
    config = load_config(f"{ROOT}/configs/metamorph/vpit.py:smoke")
    decoder = load_config(f"{ROOT}/configs/metamorph/decoder.py:smoke")
    llava = load_config(f"{ROOT}/configs/llava/stage2.py:smoke")
    mm_interleaved = load_config(f"{ROOT}/configs/mm_interleaved/sft.py:smoke")
    minigpt5 = load_config(f"{ROOT}/configs/minigpt5/stage2.py:smoke")

    def known(path):
        nodes = [config, decoder, llava, mm_interleaved, minigpt5]
        for part in path.split("."):
            nodes = [n.get(part) for n in nodes if hasattr(n, "get") and part in n]
        return bool(nodes)

    for path in re.findall(r"`config\.(?!json`)([a-z_]\w*(?:\.[a-z_]\w*)*)", page.read_text()):
        assert known(path), f"{page.name}: config.{path}"


def test_one_owner_of_the_repository():
    """README and notebook name the same one, so that it can't be replaced in one place only."""
    pages = (ROOT / "README.md", ROOT / "notebooks/quickstart.ipynb")
    found = [re.findall(r"github(?:\.com)?/([\w-]+)/metamorph_jax", p.read_text()) for p in pages]
    assert all(found) and len({owner for owners in found for owner in owners}) == 1


def test_readme_is_short():
    assert 100 <= len((ROOT / "README.md").read_text().splitlines()) <= 150
