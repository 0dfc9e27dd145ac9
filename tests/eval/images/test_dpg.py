"""DPG-Bench: dependencies, both modes, categories and grids, against scores worked out by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import cli
from metamorph_jax.errors import ConfigError, DataError, FileError
from metamorph_jax.eval.images import dpg, judging
from metamorph_jax.eval.images.dpg import Judged

HEAD = ("item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
        "question_natural_language\n")  # fmt: skip
CSV = (
    HEAD
    + """cup,"A red cup…",,1,0,entity,whole,entity - whole (cup),Is there a cup?
cup,"A red cup…",,2,1,attribute,color,"attribute - color (cup, red)",Is the cup red?
cup,"A red cup…",,3,2,attribute,shade,"attribute - color (cup, dark red)",Is it dark red?
cup,"A red cup…",,4,0,global,,global (photo),Is it a photo?
sky,A sky,,1,0,entity,whole,entity - whole (sky),Is there a sky?
sky,A sky,,2,"1, 3",relation,spatial,"relation - spatial (bird, sky)",Is the bird in the sky?
sky,A sky,,3,0,entity,whole,entity - whole (bird),Is there a bird?
"""
)  # noqa: E501
# Question -> yes, of each of two images.
CUP = [{1: False, 2: True, 3: True, 4: True}, {1: True, 2: True, 3: False, 4: True}]
SKY = [{1: True, 2: True, 3: True}, {1: True, 2: True, 3: False}]


@pytest.fixture
def csv(tmp_path):
    (tmp_path / "dpg_bench.csv").write_text(CSV)
    return str(tmp_path / "dpg_bench.csv")


def test_questions_and_what_they_depend_on(csv):
    items = dpg.read_items(csv)
    assert list(items) == ["cup", "sky"] and list(items["cup"]) == [1, 2, 3, 4]
    assert items["cup"][3] == dpg.Question("Is it dark red?", (2,), "attribute - color")
    assert items["sky"][2].parents == (1, 3)
    official = dpg.read_items(csv, "official")  # the first row is lost
    assert list(official["cup"]) == [2, 3, 4] and official["sky"] == items["sky"]


def test_a_no_goes_down_to_all_that_depends_on_it(csv):
    item = dpg.read_items(csv)["cup"]
    assert dpg.zeroed(item, CUP[0]) == {1: False, 2: False, 3: False, 4: True}
    assert dpg.image_scores(Judged(item, CUP)) == [0.25, 0.75]


def test_strict_scores(csv):
    items = dpg.read_items(csv)
    found = dpg.summary([Judged(items["cup"], CUP), Judged(items["sky"], SKY)])
    # cup (1/4 + 3/4)/2; sky (1 + 1/3)/2. Categories over all images, after dependencies.
    assert found["DPG"] == pytest.approx(100 * (0.5 + 2 / 3) / 2)
    assert found["entity"] == found["entity - whole"] == pytest.approx(100 * (1 + 3) / 6)
    expected = {"attribute": 25, "attribute - color": 25, "global": 100, "relation": 50}
    assert {name: found[name] for name in expected} == expected and "lost prompts" not in found


def test_official_scores(csv):
    """The cup is lost with the first row, which its other questions depend on; categories are those
    of the last image, before dependencies."""
    items = dpg.read_items(csv, "official")
    cup = [{id: yes for id, yes in one.items() if id != 1} for one in CUP]
    found = dpg.summary([Judged(items["cup"], cup), Judged(items["sky"], SKY)], "official")
    assert found.pop("lost prompts") == 1
    assert found == pytest.approx({
        "DPG": 100 * 2 / 3, "entity": 50, "entity - whole": 50,
        "relation": 100, "relation - spatial": 100,
    })  # fmt: skip


def test_dependencies_on_nothing_are_told(csv, tmp_path, capsys):
    (tmp_path / "odd.csv").write_text(CSV.replace(",4,0,global", ',4,"9, 1",global'))
    items = dpg.read_items(str(tmp_path / "odd.csv"))
    assert items["cup"][4].parents == (1,) and "questions [4] of cup" in capsys.readouterr().err
    for old, new, message in (
        (",3,2,attribute", ",3,two,attribute", "row 4: invalid literal"),
        (",3,2,attribute", ",2,1,attribute", "row 4: cup has question 2 twice"),
        ("dependency", "depends", "line 1: no dependency"),
    ):
        (tmp_path / "odd.csv").write_text(CSV.replace(old, new))
        with pytest.raises(FileError, match=message):
            dpg.read_items(str(tmp_path / "odd.csv"))
    with pytest.raises(ConfigError, match="none of strict, official"):
        dpg.read_items(csv, "lenient")


def test_grids_are_cut_as_they_are_made(tmp_path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (90, 90, 90)]
    samples = [Image.new("RGB", (20, 30), colour) for colour in colours]
    dpg.grid(samples, 16).save(tmp_path / "grid.png")
    for count in (1, 2, 4):
        found = dpg.crops(str(tmp_path / "grid.png"), count)
        assert len(found) == count
        if count > 1:
            assert [image.getpixel((8, 8)) for image in found] == colours[:count]
            assert all(image.size == (16, 16) for image in found)
    assert dpg.grid(samples[:1], 16).size == (16, 16)


@pytest.mark.parametrize("mode, score", [("strict", 100 * (0.75 + 1) / 2), ("official", 100)])
def test_images_that_somebody_drew(csv, tmp_path, monkeypatch, capsys, mode, score):
    """A judge who sees only whether there is red: the cup is dark red in one image of two."""
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    red, dark = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (120, 0, 0))
    dpg.grid([red, dark, dark, dark], 8).save(drawn / "cup.png")
    dpg.grid([red] * 4, 8).save(drawn / "sky.png")
    (drawn / "notes.png").write_bytes(b"of no item")

    def judge(images, questions):
        dark = np.array([Image.open(path).getpixel((4, 4))[0] < 200 for path in images])
        return np.where([q == "Is it dark red?" for q in questions], dark, True).astype(float)

    monkeypatch.setattr(judging, "open_judge", lambda spec, config: judge)
    words = ["score", drawn, "--dpg", csv, "--judge", "red", "--json", tmp_path / "s", "--samples",
             "1", "--dpg-mode", mode]  # fmt: skip
    assert cli.main(list(map(str, words))) == 0  # one image each: the whole grid, red in the middle
    found = json.loads((tmp_path / "s").read_text())
    assert found["settings"]["mode"] == mode and found["left_out"] == 0
    assert found["scores"]["DPG"] == pytest.approx(score)
    (drawn / "cup.png").write_bytes(b"broken")
    words[words.index("1")] = "4"
    assert cli.main(list(map(str, words))) == 0
    assert "1 were left out" in capsys.readouterr().err
    for file in drawn.iterdir():
        file.unlink()
    assert cli.main(list(map(str, words))) == 2
    assert "has the name of an item, such as cup.png" in capsys.readouterr().err
    with pytest.raises(DataError):
        dpg.find_images(drawn, dpg.read_items(csv))
