"""A sentence against a reference: BLEU and ROUGE-L, as they are meant and as one paper took them.

    BLEU-n           of words, or of characters: Papineni et al. 2002, one sentence, one reference
    ROUGE-L          of words in their order, as the COCO tools have it (`scorers/captions.py`)
    ROUGE-L of sets  of words that count once, as the package `rouge` 1.0.1 has it

MiniGPT-5 (Zheng et al. 2023, arXiv 2310.02239) handed raw strings to a BLEU that expects lists of
words, and so compared characters; and its ROUGE package counts each word once. Both are kept under
names of their own, because its table was made with them.

BLEU follows nltk's rule for single sentences (no smoothing; without a common word it is 0, without
a longer common n-gram almost 0). It is a few lines here, since nltk would be a dependency for this
one function.
"""

import collections
import math
import string
import sys
from collections.abc import Sequence

_SMALL = 1e-8  # in the denominator of `rouge_of_sets`


def bleu(candidate: Sequence[str], reference: Sequence[str], order: int) -> float:
    """BLEU up to n-grams of this order, 0 to 1; of characters if the arguments are texts."""
    found = [_matches(candidate, reference, n) for n in range(1, order + 1)]
    if not found[0][0]:
        return 0.0
    shares = [right / all_of_them if right else sys.float_info.min for right, all_of_them in found]
    brevity = min(1.0, math.exp(1 - len(reference) / len(candidate)))
    return brevity * math.exp(math.fsum(math.log(share) for share in shares) / order)


def _matches(candidate, reference, n: int) -> tuple[int, int]:
    """(n-grams of the candidate that the reference has, as often as it has them; how many)."""
    ours, theirs = (
        collections.Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        for text in (candidate, reference)
    )
    return sum((ours & theirs).values()), max(1, ours.total())


def rouge_of_sets(candidate: str, reference: str) -> dict[str, float]:
    """{"p", "r", "f"} of ROUGE-L with each word once, 0 to 1.

    Texts are cut into sentences at full stops. Matched are all words that are in the longest common
    subsequence of any two sentences.
    """
    ours, theirs = _sentences(candidate), _sentences(reference)
    words, wanted = ({word for one in text for word in one} for text in (ours, theirs))
    if not words or not wanted:
        return {"p": 0.0, "r": 0.0, "f": 0.0}
    common = {word for a in theirs for b in ours for word in _longest_common(a, b)}
    p, r = len(common) / len(words), len(common) / len(wanted)
    return {"p": p, "r": r, "f": 2 * p * r / (p + r + _SMALL)}


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _longest_common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence; where there are several, the one that the package finds."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            longer = max(lengths[i - 1][j], lengths[i][j - 1])
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if x == y else longer
    found, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def says_something(text: str) -> bool:
    """Whether a text has anything but punctuation."""
    return not all(c in string.punctuation for c in text)
