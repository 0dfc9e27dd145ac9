"""Scores of captions: equal to the COCO tools', and functions of what is kept per image."""

import importlib.util
import shutil

import pytest

from metamorph_jax.errors import UserError
from metamorph_jax.eval.scorers import captions

needs_tools = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap"
)
CANDIDATES = [
    "a dog runs on the beach", "cat red", "a man rides a brown horse near the sea", "",
    "the red dog", "sunny",
]  # fmt: skip
REFERENCES = [
    ["a dog running on a beach", "the dog is on the beach"],
    ["a red cat"],
    ["a man riding a horse by the ocean", "man on horse"],
    ["a thing"],
    ["the red dog"],
    ["a rainy day"],
]


def as_tools_have_it():
    return dict(enumerate(REFERENCES)), {k: [text] for k, text in enumerate(CANDIDATES)}


@needs_tools
def test_scores_are_those_of_the_tools():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scores = captions.corpus_scores(captions.measured(CANDIDATES, REFERENCES))
    bleus, _ = Bleu(4).compute_score(*as_tools_have_it(), verbose=0)
    assert scores == pytest.approx({
        "CIDEr": 100 * Cider().compute_score(*as_tools_have_it())[0],
        **{f"BLEU-{n}": 100 * value for n, value in enumerate(bleus, 1)},
        "ROUGE-L": 100 * Rouge().compute_score(*as_tools_have_it())[0],
    })  # fmt: skip


@needs_tools
def test_part_of_the_images_keeps_their_numbers():
    rows = captions.measured(CANDIDATES, REFERENCES)
    assert captions.corpus_scores(rows[:1])["CIDEr"] == pytest.approx(100 * rows[0]["cider"])
    assert captions.ciders([], []) == [] and captions.corpus_scores([]) == {}


PLAIN = [
    ("A man's dog, running on the beach.", "a man 's dog running on the beach"),
    ('It isn\'t a U.S. flag (red-white) - "blue"!', "it is n't a u.s. flag -lrb- red-white -rrb- "
     "blue"),
    ("", ""),
    ("Two dogs; 3.5 m tall & 1,000 people", "two dogs 3.5 m tall & 1,000 people"),
    ("ice-cream can't won't I'm they're", "ice-cream ca n't wo n't i 'm they 're"),
    ("cat/dog $5 50% 5:30 p.m. hello...", "cat/dog $ 5 50 % 5:30 p.m. hello"),
    ("A WOMAN\nholding a “quoted” sign’s", "a woman holding a quoted sign 's"),
    ("cannot dogs' 'single' end a--b a_b", "can not dogs single end a b a_b"),
]  # fmt: skip


@needs_tools
def test_tokens_in_python():
    texts = [text for text, _ in PLAIN]
    assert captions.tokenized(texts, "python") == [tokens for _, tokens in PLAIN]


@needs_tools
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_tokens_and_meteor_of_the_java_tools():
    from pycocoevalcap.meteor.meteor import Meteor

    texts = [text for text, _ in PLAIN]
    assert captions.tokenized(texts, "ptb") == [tokens for _, tokens in PLAIN]
    rows = captions.measured(CANDIDATES, REFERENCES, meteor=True)
    expected = 100 * Meteor().compute_score(*as_tools_have_it())[0]
    assert captions.corpus_scores(rows)["METEOR"] == pytest.approx(expected)


@needs_tools
def test_without_java_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="there is no `java`: install .* or use tokenizer=python"):
        captions.tokenized(["x"], "ptb")
