"""Judges: how questions are written, verdicts read, and failures told."""

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.endpoint import Completion
from metamorph_jax.errors import RequestRefused, UserError
from metamorph_jax.eval.images import judging
from metamorph_jax.eval.judges import EndpointModel
from metamorph_jax.sampling.likelihood import Likelihood


class Comparing:
    """A generator that finds "Yes" as likely as the question has letters; "?" it can't read."""

    def __init__(self):
        self.seen = []

    def likelihoods(self, requests, answers, failed, batch_size=8):
        for request in reversed(list(requests)):  # in any order
            self.seen.append((request.prompt, request.images, answers[request.id]))
            if request.prompt.startswith("?"):
                failed(request, ValueError("no such question"))
                continue
            yes = len(request.prompt.partition("\n")[0]) / 10
            yield request, [Likelihood(yes, 1), Likelihood(0.5, 3)]


def test_likelihoods_of_yes_and_no(capsys):
    generator = Comparing()
    judge = judging.LikelihoodJudge(generator)
    found = judge(["a.png", "b.png", "c.png"], ["Red?", "?", "Longer?"])
    expected = [1 / (1 + np.exp(0.1)), np.nan, 1 / (1 + np.exp(-0.2))]
    np.testing.assert_allclose(found, expected)
    assert ("Red?\nAnswer with yes or no.", ("a.png",), ("Yes", "No")) in generator.seen
    told = capsys.readouterr().err
    assert "judge: no such question" in told and "1 questions could not be asked" in told


@pytest.mark.parametrize("reply, value", [
    ("Yes", 1), ("yes, it is red.", 1), ("**No**.", 0), (" no", 0), ("No, yes", 0),
    ("nothing of it", None), ("It is red", None), ("", None), ("Yesterday", None),
])  # fmt: skip
def test_verdicts_in_words(reply, value):
    found = judging.verdict(reply)
    assert np.isnan(found) if value is None else found == value


def test_an_endpoint_is_asked_with_the_image(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    class Client:
        def complete(self, messages, *, model, temperature, max_tokens, seed):
            image, text = messages[0]["content"]
            assert model == "m" and temperature == 0 and max_tokens == 16
            assert image["image_url"]["url"].startswith("data:image/png;base64,")
            if "refuse" in text["text"]:
                raise RequestRefused("no such thing")
            return Completion("Yes." if "red" in text["text"] else "I see none")

    judge = judging.WordsJudge(EndpointModel(Client(), "m", 2))
    paths = [str(tmp_path / "a.png")] * 3 + [str(tmp_path / "gone.png")]
    found = judge(paths, ["Is it red?", "Is it blue?", "refuse", "Is it red?"])
    np.testing.assert_array_equal(found, [1, np.nan, np.nan, np.nan])
    told = capsys.readouterr().err
    assert "no such thing" in told and "gone.png" in told and "2 questions could not" in told


def test_answers_are_remembered(tmp_path, monkeypatch):
    """Also those before a judge died; what had no answer is asked again."""
    monkeypatch.setattr(judging, "_CHUNK", 2)
    asked = []

    def judge(images, questions):
        asked.extend(zip(images, questions, strict=True))
        if "dies" in questions:
            raise UserError("it died")
        return np.array([np.nan if q == "none" else len(q) / 10 for q in questions])

    remembered = judging.Remembered(judge, tmp_path, "a")
    with pytest.raises(UserError, match="it died"):
        remembered(["x", "x", "y", "x"], ["one?", "none", "dies", "three"])
    asked.clear()
    again = judging.Remembered(judge, tmp_path, "a")
    found = again(["x", "x", "y", "x", "x"], ["one?", "none", "one?", "three", "one?"])
    np.testing.assert_array_equal(found, [0.4, np.nan, 0.4, 0.5, 0.4])
    assert asked == [("x", "none"), ("y", "one?"), ("x", "three")]
    with pytest.raises(UserError, match="other settings"):
        judging.Remembered(judge, tmp_path, "b")


def test_no_judge_is_an_error():
    with pytest.raises(UserError, match="no judge: give the workdir"):
        judging.open_judge("")
