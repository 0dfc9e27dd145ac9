"""The score of answers: whose side was whose, intervals over units and people, and wrong files."""

import json

import numpy as np
import pytest

from metamorph_jax import cli
from metamorph_jax.errors import DataError, FileError
from metamorph_jax.eval.people import votes
from metamorph_jax.eval.people.votes import LOSS, PREFERRED, TIE, WIN, Vote

ASKED = ["language", "quality", "coherence"]


@pytest.fixture
def key(tmp_path):
    """Two items with the first system on the left, one with the second, which has no text."""
    items = {
        "a": {"question": "1/5", "unit": "1", "asked": ASKED, "left": "first"},
        "b": {"question": "2/4", "unit": "2", "asked": ASKED, "left": "first"},
        "c": {"question": "2/5", "unit": "2", "asked": ASKED[1:], "left": "second"},
    }
    table = {"format": 1, "study": "s1", "systems": {"first": "ours", "second": "theirs"},
             "settings": {}, "items": items}  # fmt: skip
    path = tmp_path / "key.json"
    path.write_text(json.dumps(table))
    return path


def put(tmp_path, by, given, **changes):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    table = {"format": 1, "study": "s1", "rater": by, "answers": given, "seconds": {}}
    path.write_text(json.dumps(table | changes))
    return str(path)


def test_whose_side(key, tmp_path):
    """An answer "left" is a win of whoever was on the left."""
    path = put(tmp_path, " Ann ", {"a": {"language": "left", "quality": "tie"},
                                   "c": {"quality": "left", "coherence": "right"}})  # fmt: skip
    rater, found = votes.read_votes(path, votes.read_key(str(key)))
    assert rater == "Ann"
    assert found == [
        Vote("Ann", "a", "1", "language", WIN), Vote("Ann", "a", "1", "quality", TIE),
        Vote("Ann", "c", "2", "quality", LOSS), Vote("Ann", "c", "2", "coherence", WIN),
    ]  # fmt: skip


def test_the_command(key, tmp_path, capsys):
    first = put(tmp_path, "Ann", {k: dict.fromkeys(ASKED[k == "c" :], "left") for k in "abc"})
    second = put(tmp_path, "Bob", {"a": {"quality": "left"}, "b": {"quality": "right"}})
    out = tmp_path / "scores.json"
    assert cli.main(["eval", "votes", str(key), first, second, "--json", str(out)]) == 0
    told, left = capsys.readouterr()
    assert "Bob left 6 questions open" in left and "Ann" not in left
    assert "ours better" in told and "theirs better" in told
    assert "image quality: 5 answers of 2 people about 2 units, 50 % of pairs agree" in told
    found = json.loads(out.read_text())
    quality = found["scores"]["quality"]
    assert quality["rates"] == pytest.approx({WIN: 3 / 5, TIE: 0, LOSS: 2 / 5, PREFERRED: 3 / 5})
    assert found["scores"]["language"]["rates"][WIN] == 1
    assert found["people"] == 2 and found["first"] == "ours"
    assert cli.main(["eval", "votes", str(key), first]) == 0
    assert "one person answered" in capsys.readouterr().err


def test_intervals_cover_units_and_people():
    """Against the spread of the rate over many studies of the same kind."""
    rng = np.random.default_rng(0)

    def study(units=30, raters=6):
        easy, kind = rng.normal(0, 0.8, units), rng.normal(0.3, 0.5, raters)
        won = easy[:, None] + kind + rng.normal(0, 1, (units, raters)) > 0
        return [Vote(str(r), str(u), str(u), "quality", WIN if won[u, r] else LOSS)
                for u in range(units) for r in range(raters)]  # fmt: skip

    rates = [np.mean([vote.outcome == WIN for vote in study()]) for _ in range(400)]
    inside, widths = [], []
    for _ in range(40):
        low, high = votes.score(study(), 200)["quality"].intervals[WIN]
        inside.append(low <= np.mean(rates) <= high)
        widths.append(high - low)
    assert np.mean(inside) >= 0.85
    assert 3 * np.std(rates) < np.mean(widths) < 6.5 * np.std(rates)


def test_what_is_drawn():
    """Units where there is one person; nothing where there is one of each."""
    alone = [Vote("Ann", str(k), str(k), "quality", WIN if k % 2 else TIE) for k in range(20)]
    found = votes.score(alone)["quality"]
    assert found.raters == 1 and found.units == 20 and found.agreement is None
    low, high = found.intervals[PREFERRED]
    assert low < 0.75 < high and found.rates[PREFERRED] == 0.75
    assert votes.score(alone[:1])["quality"].intervals == {}
    # Two answers about one unit are as sure as one: the same interval as of the units alone.
    twice = [*alone, *(Vote(v.rater, v.item + "x", v.unit, v.question, v.outcome) for v in alone)]
    for outcome, pair in votes.score(twice)["quality"].intervals.items():
        assert pair == pytest.approx(found.intervals[outcome])
    assert votes.score(alone, resamples=0)["quality"].intervals == {}


@pytest.mark.parametrize(
    "answers, changes, message",
    [
        ({}, {"study": "s2"}, "is of another study: s2, and the key is of s1"),
        ({}, {"format": 2}, "format 2, expected 1"),
        ({}, {"rater": " "}, "rater is not a name"),
        ({}, {"answers": []}, "answers is not an object"),
        ({"z": {}}, {}, "item z: the study has no such item"),
        ({"a": "left"}, {}, "item a: 'left', expected an object"),
        ({"c": {"language": "left"}}, {}, "item c: language was not asked; asked were quality"),
        ({"a": {"quality": "first"}}, {}, "item a, quality: 'first', expected left, tie or right"),
    ],
)
def test_wrong_answers(key, tmp_path, answers, changes, message):
    with pytest.raises(FileError, match=message):
        votes.read_votes(put(tmp_path, "Ann", answers, **changes), votes.read_key(str(key)))


def test_wrong_files(key, tmp_path):
    known = votes.read_key(str(key))
    for text, message in (("{", "JSON"), ("[]", "expected answers from a page|object"),
                          ('{"study": "s1"}', "no format, rater, answers")):  # fmt: skip
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(FileError, match=message):
            votes.read_votes(str(path), known)
    pair = [put(tmp_path, "Ann", {"a": {"quality": side}}) for side in ("left", "right")]
    with pytest.raises(FileError, match="are both of Ann: keep one"):
        votes.gather(pair, known)
    with pytest.raises(DataError, match="none of the files has an answer"):
        votes.gather([put(tmp_path, "Bob", {})], known)
    for table in ({"format": 2}, {"systems": {}}, {"items": {"a": {}}}, {"items": []}):
        whole = json.loads(key.read_text()) | table
        (tmp_path / "other.json").write_text(json.dumps(whole))
        with pytest.raises(FileError, match="is not the key of a study"):
            votes.read_key(str(tmp_path / "other.json"))
