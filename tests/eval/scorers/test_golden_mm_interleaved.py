"""The scorers against MM-Interleaved's, case by case, as `metrics.json` lists them."""

import json

import numpy as np
import pytest

from metamorph_jax.eval.scorers import boxes, dialog, vqa
from metamorph_jax.eval.scorers.segmentation import Overlap

pytestmark = pytest.mark.golden

PARTS = {"parse_box", "grounding_iou", "miou", "visdial", "extract_answer", "vqa_accuracy"}


@pytest.fixture(scope="module")
def metrics(golden_root):
    return json.loads((golden_root / "mm_interleaved" / "metrics.json").read_text())


def test_every_part_is_read(metrics):
    assert metrics.keys() <= PARTS


def cases(metrics, part, *keys):
    """The cases of a part; fails if there are none, or one has a field that no test reads."""
    assert metrics[part]
    for case in metrics[part]:
        assert case.keys() == {*keys}, f"{part}: fields that no test reads in {case}"
    return metrics[part]


def test_boxes_of_replies(metrics):
    for case in cases(metrics, "parse_box", "text", "box"):
        # In an image of 999 pixels, thousandths are pixels.
        found = boxes.box_in(case["text"], "thousand", (999, 999)) or boxes.NOTHING
        assert list(found) == pytest.approx(case["box"]), case


def test_overlap_of_boxes(metrics):
    keys = ("pred", "gt", "width", "height", "iou", "correct")
    for case in cases(metrics, "grounding_iou", *keys):
        size = case["width"], case["height"]
        pair = (boxes.scaled(case[key], "thousand", size) for key in ("pred", "gt"))
        overlap = boxes.iou(*pair)
        assert overlap == pytest.approx(case["iou"], abs=1e-5), case
        assert (overlap >= boxes.RIGHT) == case["correct"], case


def test_miou(metrics):
    case = metrics["miou"]
    keys = {"num_classes", "pred_zero_based", "label_zero_is_ignore", "intersection", "union",
            "miou"}  # fmt: skip
    assert case.keys() == keys
    pairs = zip(case["pred_zero_based"], case["label_zero_is_ignore"], strict=True)
    first, *rest = (
        Overlap.of(np.array(predicted) + 1, np.array(truth), case["num_classes"])
        for predicted, truth in pairs
    )
    total = sum(rest, first)
    assert total.intersection.tolist() == case["intersection"]
    assert total.union.tolist() == case["union"]
    assert total.miou() == pytest.approx(case["miou"])


def test_visdial(metrics):
    case = metrics["visdial"]
    assert case.keys() == {"scores", "relevance", "ranks", "ndcg", "target", "sparse"}
    ranks = [dialog.ranks(row) for row in case["scores"]]
    assert ranks == case["ranks"]
    rows = zip(ranks, case["relevance"], strict=True)
    found = [dialog.ndcg(ranked, relevance) for ranked, relevance in rows]
    assert np.mean(found) == pytest.approx(case["ndcg"], abs=1e-6)
    right = [row[k] for row, k in zip(ranks, case["target"], strict=True)]
    ours = dialog.retrieval(right)
    sparse = {key.lower(): 100 * value for key, value in case["sparse"].items() if key != "mean"}
    sparse["mean rank"] = case["sparse"]["mean"]
    assert {key.lower(): value for key, value in ours.items()} == pytest.approx(sparse, abs=1e-4)


def test_short_answers(metrics):
    for case in cases(metrics, "extract_answer", "text", "answer"):
        assert vqa.short_answer(case["text"], "substrings") == case["answer"], case


def test_vqa_accuracy(metrics):
    case = metrics["vqa_accuracy"]
    assert case.keys() == {"gt", "pred", "per_question", "overall"}
    rows = zip(case["pred"], case["gt"], strict=True)
    found = [100 * vqa.vqav2_accuracy(answer, given) for answer, given in rows]
    assert found == pytest.approx(case["per_question"])
    assert np.mean(found) == pytest.approx(case["overall"])
