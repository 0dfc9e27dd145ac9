"""Replies of texts and images in dialogues, against true ones: text scores and MM-Relevance.

A turn is scored where both texts say something (more than punctuation); where only the true one
does, its text scores are 0; where it does not, it has none. Scores are averaged inside a dialogue,
and then over dialogues.

MM-Relevance (Feng et al. 2023, arXiv 2211.05719), as MiniGPT-5 (Zheng et al. 2023, arXiv
2310.02239) takes it: elements are aligned turn by turn, text with text and image with image, by
CLIP's cosines. With S their sum over a dialogue,

    precision = S / (pairs + elements that only the reply has)
    recall    = S / (pairs + elements that only the true turn has)

and F1 of both, 0 where nothing is paired or both are 0. The benchmark's own script aligns across
kinds and multiplies with CLIP's scale, so that its numbers are others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from metamorph_jax.eval.scorers import captions, texts

END, VOKEN = "###", "[IMG0]"
BLEU = ("BLEU-1", "BLEU-2", "BLEU-1 of characters", "BLEU-2 of characters")
ROUGE, ROUGE_OF_SETS = "ROUGE-L", "ROUGE-L of sets (rouge 1.0.1)"
SENTENCES = "sentence similarity"
RELEVANCE = "MM-Relevance"
# An element that only the true turn, or only the reply has, in place of a cosine.
MISSING, EXTRA = "missing", "extra"
Element = float | str


def said(text: str) -> str:
    """What a turn says: without the marks that end turns and stand for images; "" if that is
    nothing but punctuation."""
    text = text.replace(END, "").split(VOKEN)[0].strip()
    return text if texts.says_something(text) else ""


def text_scores(reply: str, true: str) -> dict[str, float]:
    """BLEU and ROUGE-L of a turn, both ways, 0 to 1; {} where the true turn says nothing.

    reply, true: as `said` gives them
    """
    if not true:
        return {}
    if not reply:
        return dict.fromkeys((*BLEU, ROUGE, ROUGE_OF_SETS), 0.0)
    words = reply.split(), true.split()
    found = [texts.bleu(*words, 1), texts.bleu(*words, 2)]
    found += [texts.bleu(reply, true, 1), texts.bleu(reply, true, 2)]
    rouge = captions.rouge_l(reply.lower(), true.lower())
    sets = texts.rouge_of_sets(reply, true)["f"]
    return {**dict(zip(BLEU, found, strict=True)), ROUGE: rouge, ROUGE_OF_SETS: sets}


Compare = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def elements(compare: Compare, replies: Sequence[str], true: Sequence[str]) -> list[Element | None]:
    """A cosine where both are there, else which of them is missing; None: neither is there, or they
    could not be compared.

    Args:
        compare: (of the replies, of the true turns) -> float[N] cosines, NaN where there is none.
        replies, true: texts or files, "" where there is none.
    """
    pairs = list(zip(replies, true, strict=True))
    found: list[Element | None] = [
        (MISSING if b else None) if not a else EXTRA if not b else None for a, b in pairs
    ]
    both = [k for k, (a, b) in enumerate(pairs) if a and b]
    if both:
        cosines = compare([replies[k] for k in both], [true[k] for k in both])
        for k, cosine in zip(both, cosines, strict=True):
            found[k] = None if np.isnan(cosine) else float(cosine)
    return found


def relevance(found: Iterable[Element | None]) -> float:
    """MM-Relevance of the elements of a dialogue, see the module's docstring."""
    kept = [element for element in found if element is not None]
    cosines = [element for element in kept if not isinstance(element, str)]
    total = sum(cosines)
    if not total:
        return 0.0
    precision = total / (len(cosines) + kept.count(EXTRA))
    recall = total / (len(cosines) + kept.count(MISSING))
    return 2 * precision * recall / (precision + recall)


def of_dialogue(turns: Sequence[Mapping]) -> dict[str, float]:
    """The scores of a dialogue: means of its turns' "texts", and MM-Relevance of their "elements",
    where they have such."""
    found: dict[str, list[float]] = {}
    for turn in turns:
        for name, value in turn["texts"].items():
            found.setdefault(name, []).append(value)
    scores = {name: float(np.mean(values)) for name, values in found.items()}
    if all("elements" in turn for turn in turns):
        scores[RELEVANCE] = relevance(element for turn in turns for element in turn["elements"])
    return scores
