"""What a row of the decoding loop emitted: its record, read as texts and images."""

import dataclasses

import numpy as np

# In the record of what a row emitted; BROKEN: its logits were not finite, and it ended there.
VISUAL, NOTHING, BROKEN = -1, -2, -3
WHY_BROKEN = (
    "the model's logits are not finite (damaged weights, or numbers too large for its dtype)"
)


@dataclasses.dataclass(frozen=True)
class Text:
    """Ids without the start and end of images and without the end of the sequence."""

    ids: np.ndarray

    @classmethod
    def of(cls, ids: list[int]) -> "Text":
        return cls(np.array(ids, np.int32))


@dataclasses.dataclass(frozen=True)
class VisualTokens:
    """float32[n, C] visual tokens of an image; `complete` when n is P."""

    features: np.ndarray
    complete: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """What one row emitted.

    Attributes:
        segments: texts and images in order.
        ids: int32[n] all text ids, with those of start, end and eos.
        vectors: float32[m, C] all visual tokens.
        record: int32[n + m] the steps in order: an id, or VISUAL; BROKEN as the last one.
        ended: whether an eos id ended the row (otherwise the budget did).
    """

    segments: tuple[Text | VisualTokens, ...]
    ids: np.ndarray
    vectors: np.ndarray
    record: np.ndarray
    ended: bool


def read_record(record, vectors, ended, *, P: int, start: int, end: int, eos) -> Result:
    """The `Result` of one row whose images stand between two ids.

    Args:
        record: int32[n] the steps in order: an id, VISUAL or BROKEN.
        vectors: float32[n, C], where a step emitted a visual token.
        ended: whether an eos id ended the row.
        P: tokens of a whole image; start, end: ids around one; eos: ids that end a row.
    """
    vectors = vectors[record == VISUAL]
    segments, text, image, used = [], [], None, 0

    def flush():
        nonlocal image
        if text:
            segments.append(Text.of(text))
            text.clear()
        if image is not None:
            begin, n = image
            segments.append(VisualTokens(vectors[begin : begin + n], n == P))
            image = None

    for token in record.tolist():
        if token == VISUAL:
            if image is None:
                flush()
                image = (used, 0)
            used += 1
            image = (image[0], image[1] + 1)
            if image[1] == P:
                flush()
            continue
        if token == start or image is not None:
            flush()
        if token == start:
            image = (used, 0)
        elif token >= 0 and token != end and token not in eos:
            text.append(token)
    flush()
    return Result(tuple(segments), record[record >= 0], vectors, record, bool(ended))
