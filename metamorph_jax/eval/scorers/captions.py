"""CIDEr-D, BLEU, ROUGE-L and METEOR of captions, by pycocoevalcap (the COCO caption tools).

Everything is kept per image as numbers of which a corpus score is a function of sums or means, so
that scores of subsets and of resamples need no second run of the tools:

    cider, rouge    the image's own score; the corpus has the mean
    bleu            lengths, n-grams and matches; BLEU is made of their sums
    meteor          words and matches, as METEOR 1.5 finds them; it is made of their sums

CIDEr weighs n-grams by how few *images of the evaluated set* have them in their references, so that
the CIDEr of a subset can't be compared with that of the whole set.

Captions are tokenised first. "ptb" is the tools' own Penn Treebank tokeniser, which needs Java, as
METEOR does; it is what published numbers are made with. "python" is the one below, for machines
without Java: the same on plain captions, but numbers may differ by some tenths, and METEOR is left
out. SPICE needs models from the network, besides Java, and is not offered.
"""

import functools
import math
import re
import shutil
from collections.abc import Sequence
from typing import Any

from metamorph_jax.errors import UserError

TOKENIZERS = ("ptb", "python")
ORDER = 4  # of the longest n-grams
# What the COCO tools drop. Their list has brackets only in capitals, so that -lrb- and such stay.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', "…", "—"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|m|re|ve|ll|d))\b")
_TOKEN = re.compile(
    r"n't\b|'(?:s|m|re|ve|ll|d)\b|(?:[a-z]\.){2,}|\d+(?:[.,:]\d+)+|\w+(?:[-/]\w+)*|-{2,}|[^\w\s]"
)


def check_tools(tokenizer: str) -> None:
    """Raises UserError, saying what to install, if captions can't be scored on this machine."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError as error:
        raise UserError(
            "scores of captions need pycocoevalcap: pip install 'metamorph_jax[eval]'"
        ) from error
    if tokenizer == "ptb" and shutil.which("java") is None:
        raise UserError(
            "tokenizer=ptb and METEOR need Java, and there is no `java`: install a Java runtime "
            "(Debian: apt install default-jre-headless), or use tokenizer=python, whose numbers "
            "may differ by some tenths"
        )


# ---- tokens


def tokenized(captions: Sequence[str], tokenizer: str) -> list[str]:
    """Captions in lower case with spaces between tokens and without punctuation.

    Raises:
        UserError: the tools or Java are missing.
    """
    check_tools(tokenizer)
    lines = [" ".join(caption.split()) for caption in captions]  # one line each
    return _by_ptb(lines) if tokenizer == "ptb" else [_by_python(line) for line in lines]


def _by_ptb(lines: Sequence[str]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    try:
        found = PTBTokenizer().tokenize({k: [{"caption": line}] for k, line in enumerate(lines)})
        return [found[k][0] for k in range(len(lines))]
    except (OSError, KeyError, IndexError) as error:
        raise UserError(
            f"the Penn Treebank tokeniser of pycocoevalcap failed ({type(error).__name__}: "
            f"{error}); it writes into the package's folder; tokenizer=python does without it"
        ) from error


def _by_python(line: str) -> str:
    text = line.lower().translate(str.maketrans("“”‘’", "\"\"''"))
    text = _CLITICS.sub(r" \1", re.sub(r"\bcannot\b", "can not", text))
    tokens = (_BRACKETS.get(token, token) for token in _TOKEN.findall(text))
    return " ".join(token for token in tokens if token not in _DROPPED)


# ---- per image


def measured(
    candidates: Sequence[str], references: Sequence[Sequence[str]], meteor: bool = False
) -> list[dict[str, Any]]:
    """The numbers of each image, see the module's docstring.

    Args:
        candidates: a tokenised caption for each image.
        references: at least one tokenised caption for each image.
        meteor: METEOR's too, which needs Java.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge

    rouge, rows = Rouge(), []
    for candidate, given, cider in zip(
        candidates, references, ciders(candidates, references), strict=True
    ):
        counts = BleuScorer(candidate, list(given), n=ORDER).ctest[0]
        length = counts["testlen"]
        closest = min(counts["reflen"], key=lambda other: (abs(other - length), other))
        rows.append({
            "cider": cider,
            "rouge": float(rouge.calc_score([candidate], list(given))),
            "bleu": [length, closest, *counts["guess"], *counts["correct"]],
        })  # fmt: skip
    if meteor:
        for row, candidate, given in zip(rows, candidates, references, strict=True):
            row["meteor"] = _meteor_statistics(candidate, given)
    return rows


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L of words between blanks, 0 to 1, with the COCO tools' weight of recall (1.2)."""
    check_tools("python")
    from pycocoevalcap.rouge.rouge import Rouge

    ours, theirs = (" ".join(text.split()) for text in (candidate, reference))
    return float(Rouge().calc_score([ours], [theirs]))


def ciders(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each image (0 to 10), with the document frequencies of these images."""
    from pycocoevalcap.cider.cider import Cider

    if not candidates:
        return []
    given = {k: list(captions) for k, captions in enumerate(references)}
    _, scores = Cider().compute_score(given, {k: [c] for k, c in enumerate(candidates)})
    return [float(score) for score in scores]


# ---- of a corpus


# What `corpus_scores` may give.
NAMES = ("CIDEr", *(f"BLEU-{n}" for n in range(1, ORDER + 1)), "METEOR", "ROUGE-L")


def corpus_scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """CIDEr, BLEU-1 to BLEU-4, ROUGE-L and, where it was measured, METEOR; all × 100."""
    if not rows:
        return {}
    scores = {"CIDEr": sum(row["cider"] for row in rows) / len(rows)}
    scores |= {f"BLEU-{n}": value for n, value in enumerate(_bleu(rows), 1)}
    if "meteor" in rows[0]:
        scores["METEOR"] = _meteor([row["meteor"] for row in rows])
    scores["ROUGE-L"] = sum(row["rouge"] for row in rows) / len(rows)
    return {name: 100 * value for name, value in scores.items()}


def _bleu(rows) -> list[float]:
    """BLEU of order 1 to 4, with the tools' way to avoid a division by zero."""
    length, closest, *counts = (
        sum(column) for column in zip(*(row["bleu"] for row in rows), strict=True)
    )
    guesses, matches = counts[:ORDER], counts[ORDER:]
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, found = 1.0, []
    for n, (right, all_of_them) in enumerate(zip(matches, guesses, strict=True), 1):
        product *= (right + 1e-15) / (all_of_them + 1e-9)
        found.append(brevity * product ** (1 / n))
    return found


# ---- METEOR 1.5: matches by the tool, scores from them by its formula for English

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCHERS = (1.0, 0.6, 0.8, 0.6)  # weights of exact, stem, synonym and paraphrase matches
# Places in the statistics. They start with the words of caption and reference and how many of these
# are function words; then, for each matcher, content words of both and function words of both.
_WORDS, _CHUNKS, _MATCHED = slice(0, 4), 20, slice(21, 23)


@functools.cache
def _tool():
    """The running tool; it takes seconds to load its tables, and ends with this process."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def _meteor_statistics(candidate: str, references: Sequence[str]) -> list[float]:
    """Those of the reference that fits best."""
    process = _tool().meteor_p
    parts = [part.replace("|||", " ") for part in ("SCORE", *references, candidate)]
    try:
        process.stdin.write((" ||| ".join(parts) + "\n").encode())
        process.stdin.flush()
        said = process.stdout.readline().decode()
    except OSError:
        said = ""
    if not said.strip():
        raise UserError("METEOR, a Java program, ended early; it needs 2 GB of memory")
    return [float(number) for number in said.split()]


def _meteor(rows: Sequence[Sequence[float]]) -> float:
    """The score of a corpus, from the sums of its statistics."""
    total = [sum(column) for column in zip(*(_counted(row) for row in rows), strict=True)]
    words, reference_words, function, reference_function = total[_WORDS]
    found = [0.0, 0.0]  # weighted matches in the captions, and in the references
    for number, weight in enumerate(_MATCHERS):
        counts = total[4 + 4 * number : 8 + 4 * number]
        for side in (0, 1):
            content, other = counts[side], counts[2 + side]
            found[side] += weight * (_DELTA * content + (1 - _DELTA) * other)
    length = _DELTA * (words - function) + (1 - _DELTA) * function
    reference_length = (
        _DELTA * (reference_words - reference_function) + (1 - _DELTA) * reference_function
    )
    if not all((*found, length, reference_length)):
        return 0.0
    precision, recall = found[0] / length, found[1] / reference_length
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    penalty = _GAMMA * (total[_CHUNKS] / (sum(total[_MATCHED]) / 2)) ** _BETA
    return (1 - penalty) * mean


def _counted(row: Sequence[float]) -> list[float]:
    """The statistics of one caption; one that matches all through has no chunks."""
    row = list(row)
    if row[_CHUNKS] == 1 and row[_MATCHED] == row[:2]:
        row[_CHUNKS] = 0.0
    return row
