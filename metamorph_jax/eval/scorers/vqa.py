"""Answers to open questions with several human answers: VQAv2, OK-VQA, VizWiz, TextVQA, ST-VQA.

Two normalisers are in use, and their results differ. `classic` is that of the public VQA tools,
for VQAv2 and OK-VQA. `evalai` lower-cases first and splits off a possessive; TextVQA scores with
it, and answer files for the EvalAI server are written with it. Both keep two slips of the original
code that scores depend on: every full stop that no digit follows is deleted, so "3." becomes "3",
but only the first 32 of them; and contractions with a capital letter are never restored.

The soft accuracy of an answer is its mean over all leave-one-out sets of the human answers of
min(1, matches / 3). With ten answers, 0, 1, 2, 3, 4 matches give 0, 0.3, 0.6, 0.9, 1.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_REMOVED = 32
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
# Words whose apostrophe people leave out. Of a word with two, either may be missing.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
""".split()
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTED
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


# ---- normalisers


def classic(answer: str) -> str:
    """An answer as the VQA tools compare it: white space, punctuation, then words."""
    return _words(classic_punctuation(_one_line(answer)))


def classic_punctuation(answer: str) -> str:
    """Marks deleted or made spaces, and full stops deleted. Its spaces are not tidied.

    A mark is deleted where it stands next to a space anywhere in the answer, or where the answer
    has a comma between digits; otherwise it becomes a space."""
    comma = _DIGITS_WITH_COMMA.search(answer) is not None
    out = answer
    for mark in _MARKS:
        delete = comma or f"{mark} " in answer or f" {mark}" in answer
        out = out.replace(mark, "" if delete else " ")
    return _FULL_STOP.sub("", out, count=_FULL_STOPS_REMOVED)


def evalai(answer: str) -> str:
    """An answer as TextVQA compares it and as the EvalAI server expects it."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(classic_punctuation(_one_line(text.strip())))


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _words(answer: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes put back."""
    words = [_NUMBERS.get(word, word) for word in answer.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


# ---- the answer in a reply, as MM-Interleaved takes it out

EXTRACTS = ("none", "words", "substrings")
_BEFORE, _AFTER = ("is", "are", "a", "an", "the"), (" of", " or ", " and ")


def short_answer(reply: str, extract: str) -> str:
    """The answer in a reply that says more: "The answer is a red car." -> "red car".

    The reply is cut at its first line's end, ".", "," or "!", and then to what follows "is", "are",
    "a", "an", "the" and comes before "of", "or", "and", one after another, in lower case.

    Args:
        extract: "none" gives the reply as it is; "words" looks for whole words, and for marks that
            are not inside a number; "substrings" is the published code, which looks for letters:
            "sea of love" becomes "of love" (it has "a "), "3.5" becomes "3".
    """
    if extract == "none":
        return reply
    text = reply.replace('"', "").strip()
    if extract == "words":
        text = re.split(r"\n|!|[.,](?!\d)", text)[0].lower()
        for word in _BEFORE:
            text = re.split(rf"(?:^|\s){word}\s", text, maxsplit=1)[-1]
        for word in _AFTER:
            text = re.split(rf"\s{word.strip()}(?:\s|$)", text, maxsplit=1)[0]
        return text.strip()
    for mark in ("\n", ".", ",", "!"):
        text = text.split(mark)[0]
    text = text.lower()
    for word in _BEFORE:
        if f"{word} " in text:
            text = text.split(f"{word} ")[1]
    for word in _AFTER:
        text = text.split(word)[0]
    return text.strip()


# ---- soft accuracy


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy in [0, 1] of an answer, both sides as they are compared; 0 without references."""
    if not references:
        return 0.0
    n, k = len(references), sum(reference == answer for reference in references)
    return (k * min(1, (k - 1) / 3) + (n - k) * min(1, k / 3)) / n


def soft_scores(references: Sequence[str]) -> dict[str, float]:
    """The accuracy that each of the answers would have, by its EvalAI form."""
    normal = [evalai(reference) for reference in references]
    return {answer: soft_accuracy(answer, normal) for answer in dict.fromkeys(normal)}


def textvqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Soft accuracy in [0, 1] after the EvalAI normaliser."""
    return soft_accuracy(evalai(answer), [evalai(reference) for reference in references])


def stvqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references after the EvalAI normaliser, else 0."""
    return float(evalai(answer) in {evalai(reference) for reference in references})


def vqav2_accuracy(answer: str, references: Sequence[str]) -> float:
    """Soft accuracy in [0, 1] as the public VQA tools have it.

    They normalise only where the annotators differ. Where all agree, the texts must be equal but
    for white space: "Yes" is wrong where everybody wrote "yes"."""
    answer, given = _one_line(answer), [_one_line(reference) for reference in references]
    if len(set(references)) > 1:
        answer, given = classic(answer), [classic(reference) for reference in given]
    return soft_accuracy(answer, given)


# ---- answer files


def vqav2_submission(question_ids: Iterable, replies: Mapping) -> list[dict]:
    """Rows of the server's file: every question, "" where there is no reply."""
    return [{"question_id": key, "answer": evalai(replies.get(key, ""))} for key in question_ids]


def vizwiz_submission(images: Iterable[str], replies: Mapping[str, str]) -> list[dict]:
    """Rows of the server's file, by the image's name, which is the question's id."""
    return [{"image": image, "answer": evalai(replies.get(image, ""))} for image in images]


# ---- TextVQA: which question an answer belongs to


def textvqa_question(prompt: str) -> str:
    """The question that a prompt of the LLaVA question files asks, in lower case.

    Three forms: "OCR tokens: … Question: … Short answer:"; three lines, one of them "Reference OCR
    token: …"; two lines, the question first.

    Raises:
        ValueError: the prompt has none of these forms.
    """
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found.group(1).lower()
    lines = prompt.split("\n")
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(
        f"no known form of a TextVQA prompt: {prompt[:200]!r}; expected 'OCR tokens: … Question: … "
        "Short answer:', three lines with 'Reference OCR token: …', or the question and one "
        "instruction"
    )
