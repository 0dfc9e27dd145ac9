"""What a row of the decoding loop said: its record, read as texts and pictures."""

import dataclasses

import numpy as np

VISUAL, NOTHING = -1, -2  # in the record of what a row emitted


@dataclasses.dataclass(frozen=True)
class Text:
    """Ids without the start and end of pictures and without the end of the sequence."""

    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Picture:
    """float32[n, C] visual tokens; `complete` when n is P."""

    features: np.ndarray
    complete: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """What one row said.

    Attributes:
        segments: texts and pictures in order.
        ids: int32[n] all text ids, with those of start, end and eos.
        vectors: float32[m, C] all visual tokens.
        record: int32[n + m] the steps in order: an id, or VISUAL.
        ended: whether an eos id ended the row (otherwise the budget did).
    """

    segments: tuple[Text | Picture, ...]
    ids: np.ndarray
    vectors: np.ndarray
    record: np.ndarray
    ended: bool


def read_record(record, vectors, ended, *, P: int, start: int, end: int, eos) -> Result:
    """The `Result` of one row.

    Args:
        record: int32[M] the steps in order: an id, VISUAL or NOTHING.
        vectors: float32[M, C], where a step emitted a visual token.
        ended: whether an eos id ended the row.
        P: tokens of a whole picture; start, end: ids around one; eos: ids that end a row.
    """
    record = record[record != NOTHING]
    vectors = vectors[: len(record)][record == VISUAL]
    segments, text, picture, used = [], [], None, 0

    def flush():
        nonlocal picture
        if text:
            segments.append(Text(np.array(text, np.int32)))
            text.clear()
        if picture is not None:
            begin, n = picture
            segments.append(Picture(vectors[begin : begin + n], n == P))
            picture = None

    for token in record.tolist():
        if token == VISUAL:
            if picture is None:
                flush()
                picture = (used, 0)
            used += 1
            picture = (picture[0], picture[1] + 1)
            if picture[1] == P:
                flush()
            continue
        if token == start or picture is not None:
            flush()
        if token == start:
            picture = (used, 0)
        elif token != end and token not in eos:
            text.append(token)
    flush()
    return Result(tuple(segments), record[record >= 0], vectors, record, bool(ended))
