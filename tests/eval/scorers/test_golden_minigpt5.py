"""The scorers against what MiniGPT-5's evaluation computed: `metrics.json`, `fid_is_math`."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from metamorph_jax.eval.images import statistics
from metamorph_jax.eval.images.statistics import Gaussian
from metamorph_jax.eval.scorers import replies, texts

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def metrics(golden_root):
    return json.loads((golden_root / "minigpt5" / "metrics.json").read_text())


def test_sentences(metrics):
    assert metrics["sentence_scores"]
    for case in metrics["sentence_scores"]:
        assert case.keys() == {"hyp", "ref", "rouge", "bleu_1_char_level", "bleu_2_char_level",
                               "bleu_1_word_level"}  # fmt: skip
        ours, theirs = case["hyp"], case["ref"]
        # Of the package's three ROUGEs the paper has this one.
        assert texts.rouge_of_sets(ours, theirs) == pytest.approx(case["rouge"]["rouge-l"]), case
        for n in (1, 2):
            wanted = case[f"bleu_{n}_char_level"]
            assert texts.bleu(ours, theirs, n) == pytest.approx(wanted, abs=0), case
        words = texts.bleu(ours.split(), theirs.split(), 1)
        assert words == pytest.approx(case["bleu_1_word_level"]), case


def test_dialogues(metrics):
    """The whole way from rows to means over dialogues, with the networks' vectors given."""
    rows, vectors = metrics["mmdialog_rows"], metrics["clip_features_used"]
    assert rows

    def compare(kind, table):
        look = lambda one: np.array([table[kind + key] for key in one])  # noqa: E731
        return lambda ours, theirs: statistics.cosines(look(ours), look(theirs))

    ours, theirs = ([replies.said(row[key]) for row in rows] for key in ("pred_text", "gt_text"))
    texts_ = replies.elements(compare("t:", vectors), ours, theirs)
    drawn, real = ([row[key] or "" for row in rows] for key in ("pred_image", "gt_image"))
    images = replies.elements(compare("", vectors), drawn, real)
    alike = replies.elements(compare("", metrics["sbert_features"]), ours, theirs)
    dialogues: dict[str, list] = {}
    for k, row in enumerate(rows):
        found = replies.text_scores(ours[k], theirs[k])
        if found:
            found[replies.SENTENCES] = 0.0 if isinstance(alike[k], str) else alike[k]
        turn = {"texts": found, "elements": [texts_[k], images[k]]}
        dialogues.setdefault(row["task_name"].split("_")[0], []).append(turn)
    scores = [replies.of_dialogue(turns) for turns in dialogues.values()]
    names = {
        "overall_bleu_score_1": replies.BLEU[2], "overall_bleu_score_2": replies.BLEU[3],
        "overall_rouge_l_score": replies.ROUGE_OF_SETS, "overall_sbert_score": replies.SENTENCES,
        "overall_clip_f1": replies.RELEVANCE,
    }  # fmt: skip
    assert metrics["result"].keys() == names.keys()
    for key, name in names.items():
        mean = np.mean([score[name] for score in scores])
        assert mean == pytest.approx(metrics["result"][key], rel=1e-6), key


def test_distance_and_inception_score(golden_root):
    tensors = load_file(golden_root / "minigpt5" / "fid_is_math.safetensors")
    names = {"in.real_features", "in.fake_features", "in.logits", "out.fid",
             "out.inception_score_1_split"}  # fmt: skip
    assert tensors.keys() == names
    real, drawn = tensors["in.real_features"], tensors["in.fake_features"]
    wanted = pytest.approx(float(tensors["out.fid"]), rel=1e-9)
    assert statistics.frechet_distance(Gaussian.of(drawn), Gaussian.of(real)) == wanted
    assert statistics.frechet_distance_of_few(drawn, real) == wanted
    mean, _ = statistics.inception_score(tensors["in.logits"], splits=1)
    assert mean == pytest.approx(float(tensors["out.inception_score_1_split"]), rel=1e-5)
