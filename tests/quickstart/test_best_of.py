"""The gain of drawing N and keeping what the model confirms, as the report has it."""

import itertools

import numpy as np
import pytest

from metamorph_jax.eval import probe, report
from metamorph_jax.quickstart import best_of, evaluate
from metamorph_jax.quickstart import data as qdata
from metamorph_jax.sampling.likelihood import Likelihood
from metamorph_jax.sampling.results import ImagePart, Reply

COLOR, SHAPE = qdata.COLORS, qdata.SHAPES


def test_yes_to_both_questions_says_what_the_image_is():
    for color, shape in itertools.product(COLOR, SHAPE):
        asked = best_of.questions(color, shape)
        assert qdata.image_labels([(question, "yes") for question in asked]) == (color, shape)


def test_shares_are_means_over_all_choices():
    """Counted one by one; of whole choices there is nothing left to choose."""
    rng = np.random.default_rng(0)
    right, scores = rng.random((5, 8)) < 0.4, rng.normal(size=(5, 8))
    scores[2, 3:] = -np.inf
    found = best_of.gain(right, scores)["counts"]
    for N in best_of.COUNTS:
        choices = [list(c) for c in itertools.combinations(range(8), N)]
        kept = [[row[c][s[c].argmax()] for c in choices]
                for row, s in zip(right, scores, strict=True)]  # fmt: skip
        one = found[str(N)]
        assert one["kept"] == pytest.approx(np.mean(kept))
        assert one["any"] == pytest.approx(np.mean([[row[c].any() for c in choices]
                                                    for row in right]))  # fmt: skip
        assert one["gain"] == pytest.approx(one["kept"] - found["1"]["kept"])
        assert one["interval"][0] <= one["kept"] <= one["interval"][1]
    assert found["8"]["kept"] == right[np.arange(5), scores.argmax(axis=1)].mean()
    perfect = best_of.gain(right, right.astype(float))["counts"]
    assert all(one["kept"] == pytest.approx(one["any"]) for one in perfect.values())


class Scripted:
    """A generator whose sample k of a request shows what was asked for, or the next color if k is
    odd; it answers questions about it rightly. Sample 5 has no image."""

    feature_shape = (1, len(COLOR) + len(SHAPE))

    def __init__(self, requests):
        self.requests = requests

    def replies(self, asked, options, failed, draw):
        for request in asked:
            wanted = self.requests[int(request.id)]
            features = np.zeros(self.feature_shape, np.float32)
            color = COLOR.index(wanted["color"]) + request.sample % 2
            features[0, color % len(COLOR)] = 1
            features[0, len(COLOR) + SHAPE.index(wanted["shape"])] = 1
            part = ImagePart(features, request.sample != 5, {})
            yield request, Reply((part,), True)

    def likelihoods_about(self, images, question, answers, batch_size):
        for name in (*COLOR, *SHAPE):
            if name in question:
                shown = images[:, 0, (*COLOR, *SHAPE).index(name)]
        sign = np.array([1 if answer.lower() == "yes" else -1 for answer in answers])
        return [[Likelihood(float(x), 1) for x in 2 * sign * (one - 0.5)] for one in shown]


def test_the_report_of_a_model_that_knows_what_it_drew():
    requests = qdata.draw_requests()
    wanted = (np.array([COLOR.index(r["color"]) for r in requests]),
              np.array([SHAPE.index(r["shape"]) for r in requests]))  # fmt: skip
    n, width = len(requests), Scripted.feature_shape[1]
    reader = probe.LinearProbe(
        np.zeros(width), np.eye(width), np.zeros(width), (len(COLOR), len(SHAPE))
    )
    said, generator = [], Scripted(requests)
    features, whole = evaluate.ask_for_images(generator, [r["prompt"] for r in requests], 8)
    assert not whole[:, 5].any() and whole.sum() == 7 * n
    color, shape = (x.reshape(whole.shape) for x in reader.predict(features.reshape(8 * n, 1, -1)))
    right = whole & (color == wanted[0][:, None]) & (shape == wanted[1][:, None])
    result = best_of.measure(generator, requests, features, whole, right, said.append)
    assert f"{8 * n} samples" in said[0]
    counts = result["counts"]
    assert counts["1"]["kept"] == pytest.approx(0.5) and counts["8"]["kept"] == 1
    assert counts["8"]["interval"] == pytest.approx([n / (n + 1.96**2), 1], abs=1e-3)
    for one in counts.values():
        assert one["kept"] == pytest.approx(one["any"])
    page = report.as_page(report.Report("", more={"Best of N": best_of.blocks(result)}))
    (section,) = page.sections
    text, charts = section.blocks
    assert section.title == "Best of N" and "+50.0 points" in text.text
    assert "N = 8" in charts.charts[0].svg
