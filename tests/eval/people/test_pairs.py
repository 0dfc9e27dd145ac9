"""A study from two results to a page: what people see, and what they don't."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import cli
from metamorph_jax.errors import DataError, FileError
from metamorph_jax.eval.people import documents, study
from metamorph_jax.eval.people.documents import Document, Part
from tests.data.sets import made
from tests.eval.tasks import painter

SPEC = "vist:frames=2+5,history=true"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(folder of one model, of another that left out an image) of the same stories."""
    out = tmp_path_factory.mktemp("results")
    root, folders = made.vist(out / "vist"), []
    for name, model in (("alpha", painter.Painter(text="so")),
                        ("beta", painter.Painter(fails={"2/5"}, text="and"))):  # fmt: skip
        painter.run(SPEC, root, out / name, model)
        folders.append(next((out / name).iterdir()))
    return folders


def texts(parts):
    return [part.text or "(image)" for part in parts]


def test_documents_of_stories(results):
    found = documents.read(results[0])
    assert list(found) == ["1/2", "1/5", "2/2", "2/5"]
    one = found["1/2"]
    assert texts(one.given) == ["[male] saw 100 .", "(image)", "[male] saw 101 ."]
    assert texts(one.made) == ["so", "(image)", "so 0"] and one.unit == "1"
    whole = documents.read(results[0], whole=True)
    assert list(whole) == ["1", "2"]
    assert texts(whole["1"].made) == [*texts(one.made), "[male] saw 104 .", "so", "(image)", "so 0"]
    assert not documents.read(results[1])["2/5"].has_image


def test_documents_of_other_tasks(tmp_path):
    """With what the task says was given, or else the prompt."""
    row = {"id": "1", "unit": "1", "prompt": "<image>Draw it.", "images": ["a.png", "b.png"],
           "reply": "Here."}  # fmt: skip
    given = row | {"id": "2", "more": {"given": [["hello", "a.png"], ["you", ""]]},
                   "drawn": ["c.png"], "document": "<image> Here."}  # fmt: skip
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, given)))
    first, second = documents.read(tmp_path).values()
    assert first.given == (Part(image="a.png"), Part(image="b.png"), Part("Draw it."))
    assert first.made == (Part("Here."),)
    assert second.given == (Part("hello"), Part(image="a.png"), Part("you"))
    assert second.made == (Part(image="c.png"), Part("Here."))
    for text, message in (("", "is empty"), ('{"id": "1"}\n', "no prompt"),
                          (json.dumps(row | {"more": 3}), "not a file of records")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(FileError, match=message):
            documents.read(tmp_path)


def documents_of(name, count):
    return {str(k): Document(str(k), str(k // 2), (Part("q"),), (Part(f"{name} {k}"),))
            for k in range(count)}  # fmt: skip


def test_order_and_sides():
    """Drawn by the seed; each system is on the left of half of the items."""
    pair = documents_of("a", 40), documents_of("b", 40)
    chosen = study.items(*pair, study.Settings(items=0))
    assert sum(item.swapped for item in chosen) == 20
    order = [item.first.id for item in chosen]
    assert sorted(order, key=int) == list(pair[0]) and order != list(pair[0])
    assert chosen == study.items(*pair, study.Settings(items=0))
    other = study.items(*pair, study.Settings(items=0, seed=1))
    assert [item.first.id for item in other] != order
    assert len({item.id for item in chosen} | {item.id for item in other}) == 80
    for item in chosen:
        left, right = item.sides
        assert (left is item.second) == item.swapped and right is not left
    assert len(study.items(*pair, study.Settings(items=7))) == 7
    with pytest.raises(DataError, match="none is the same question"):
        study.items(pair[0], {"x": pair[1]["0"]}, study.Settings())


def test_only_questions_that_make_sense():
    text, image, nothing = (Part("t"),), (Part(image="i.png"),), ()
    for first, second, asked in (
        (text, nothing, ["language", "coherence"]), (image, image, ["quality", "coherence"]),
        (image, text, ["language", "quality", "coherence"]),
    ):  # fmt: skip
        pair = (Document("1", "1", (), made) for made in (first, second))
        assert list(study.Item("x", *pair, False).asked) == asked
    empty = {"1": Document("1", "1", (), ())}
    with pytest.raises(DataError):
        study.items(empty, empty, study.Settings())


def data_of(html):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1]
    )


def test_the_page(results, tmp_path, capsys):
    argv = ["eval", "pairs", *map(str, results), "--out", str(tmp_path / "study"), "--side", "16"]
    assert cli.main(argv) == 0
    assert "(4 pairs" in capsys.readouterr().out
    html = (tmp_path / "study" / "page.html").read_text()
    key = json.loads((tmp_path / "study" / "key.json").read_text())
    data = data_of(html)
    # Blind: neither systems nor questions nor folders are named, and nothing is fetched.
    for secret in ("alpha", "beta", "1/2", "2/5", "swapped", "first", str(tmp_path)):
        assert secret not in html.replace("firstElementChild", ""), secret
    assert not re.search(r"https?:|//[a-z]+\.", re.sub(r'data:[^"]*', "", html))
    # The policy lets this script run, and no other.
    script = re.search(r"<script>(.*?)</script>", html, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    assert f"{policy}script-src 'sha256-{digest}'" in html

    # What the script looks for is there.
    assert {*re.findall(r'at\("([\w-]+)"\)', script)} <= {*re.findall(r'id="([\w-]+)"', html)}

    assert data["study"] == key["study"]
    assert [item["id"] for item in data["items"]] == list(key["items"])
    assert key["systems"] == {"first": str(results[0]), "second": str(results[1])}
    for item in data["items"]:
        entry = key["items"][item["id"]]
        left = {"first": "so", "second": "and"}[entry["left"]]
        assert item["left"][0]["text"] == left
        assert item["given"][0]["text"] == f"[male] saw {entry['unit']}00 ."
        assert entry["question"].split("/")[0] == entry["unit"] and item["asked"] == entry["asked"]
    for uri in data["images"].values():
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            assert image.format == "JPEG" and max(image.size) == 16
    # Four drawn ones (both models draw alike) and four true ones of each story, each once.
    assert len(data["images"]) == 4 + 2 * 4

    assert cli.main(argv) == 2
    assert "holds a study, whose answers need its key" in capsys.readouterr().err


def test_one_system_only_and_bad_options(results, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    lines = (results[1] / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:3]))
    argv = ["eval", "pairs", str(results[0]), str(folder)]
    assert cli.main([*argv, "--out", str(tmp_path / "a")]) == 0
    assert "1 questions have an answer of one system only" in capsys.readouterr().err
    for more, message in ((["--names", "x", "x"], "the same name"), (["--items", "-1"], "--items"),
                          (["--side", "3"], "--side")):  # fmt: skip
        assert cli.main([*argv, "--out", str(tmp_path / "b"), *more]) == 2
        assert message in capsys.readouterr().err
    row = json.loads(lines[0]) | {"drawn": [str(tmp_path / "gone.png")]}
    (folder / "records.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main([*argv, "--out", str(tmp_path / "c")]) == 2
    assert "gone.png can't be shown" in capsys.readouterr().err


def test_texts_of_models_stay_texts(tmp_path):
    """Whatever a model writes, no tag of it becomes part of the page."""
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }}"
    pair = ({"1": Document("1", "1", (Part(nasty),), (Part(nasty),))} for _ in range(2))
    settings = study.Settings(title="<b>Which?</b>")
    page, _ = study.write(tmp_path, study.items(*pair, settings), ("a", "b"), settings)
    html = page.read_text()
    assert html.count("<script") == 2 and "<img" not in html and "<b>" not in html
    assert data_of(html)["items"][0]["left"][0]["text"] == nasty
    assert np.all([part["text"] == nasty for part in data_of(html)["items"][0]["given"]])
