"""One conversation with pictures as the arrays of a row: where text stands, where visual tokens.

With P = 2 (`<` and `>` are the start and end tokens, `o` a visual token, A the first picture,
B the second, which is an answer):

    ids             q  <  S  >  a  <  S  >  e         labels   -  -  -  -  a  <  -  >  e
    tokens          q  <  o  o  >  a  <  o  o  >  e
    image_slots    -1 -1 A0 A1 -1 -1 -1 B0 B1 -1 -1   (A0 = 0, A1 = 1, B0 = 2, B1 = 3)
    text_targets   -1 -1 -1 -1  a  < -1 -1  >  e -1
    visual_targets -1 -1 -1 -1 -1 -1 B0 B1 -1 -1 -1

The state at position p predicts what stands at p + 1, text or visual token alike.
"""

import dataclasses

import numpy as np

from metamorph_jax.data.chat import IGNORE, SENTINEL


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample, not padded; n positions, k kept pictures.

    Attributes:
        tokens, positions, text_targets, image_slots, visual_targets: int32[n], see `Batch`;
            slots and targets count from the sample's own first kept picture.
        kept: int32[k] which pictures of the sample are in the row (always the first k).
        answers: bool[k] which kept pictures are answers (predicted), not context.
        turns: int32[n] or None, see `Batch`.
    """

    tokens: np.ndarray
    positions: np.ndarray
    text_targets: np.ndarray
    image_slots: np.ndarray
    visual_targets: np.ndarray
    kept: np.ndarray
    answers: np.ndarray
    turns: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def build_row(
    ids: np.ndarray,
    labels: np.ndarray | None,
    tokens_per_image: int,
    max_length: int,
    image_start: int,
    turns: np.ndarray | None = None,
    mask_dangling_start: bool = False,
) -> Row:
    """Puts `tokens_per_image` visual tokens at every sentinel and shifts the targets.

    A picture is an answer iff the token just before its sentinel is a supervised `image_start`;
    otherwise, and when it comes first or right behind another picture, it is context. A picture
    that would not fit into `max_length` is left out together with everything behind it; then text
    is cut. The picture of a cut sentinel is never kept.

    Args:
        ids: int[n] token ids with -200 for each picture.
        labels: int[n], -100 where not supervised, or None (inference: all pictures are context).
        tokens_per_image: P.
        max_length: most positions of the row.
        image_start: id of the start token.
        turns: int[n] from `Chat.conversation(independent=True)`, or None.
        mask_dangling_start: don't supervise a start token whose picture did not fit.

    Returns:
        The row.
    """
    ids = np.asarray(ids, np.int32)
    P = tokens_per_image
    sentinels = np.flatnonzero(ids == SENTINEL)
    if labels is None:
        labels = np.full(len(ids), IGNORE, np.int32)
    else:
        labels = np.asarray(labels, np.int32)

    # Picture k starts at position s_k + k (P - 1) of the expanded row; it fits or all ends there.
    starts = sentinels + np.arange(len(sentinels)) * (P - 1)
    count = int(np.searchsorted(starts, max_length - P, side="right"))
    dropped = count < len(sentinels)
    if dropped:
        ids, labels = ids[: sentinels[count]], labels[: sentinels[count]]
        sentinels = sentinels[:count]

    before = np.maximum(sentinels - 1, 0)
    answers = (sentinels > 0) & (labels[before] == image_start)
    repeats = np.ones(len(ids), np.int64)
    repeats[sentinels] = P
    n = min(int(repeats.sum()), max_length)
    where = np.repeat(np.arange(len(ids)), repeats)[:n]  # position -> index into ids
    visual = ids[where] == SENTINEL
    tokens = np.where(visual, 0, ids[where]).astype(np.int32)
    image_slots = np.full(n, -1, np.int32)
    image_slots[visual] = np.arange(count * P, dtype=np.int32)
    labels_at = np.where(visual | (labels[where] < 0), -1, labels[where]).astype(np.int32)
    if mask_dangling_start and dropped and n and labels_at[-1] == image_start:
        labels_at[-1] = -1

    text_targets = np.full(n, -1, np.int32)
    text_targets[:-1] = labels_at[1:]
    visual_targets = np.full(n, -1, np.int32)
    wanted = visual & np.repeat(answers, P)[np.maximum(image_slots, 0)] if count else visual
    visual_targets[:-1] = np.where(wanted[1:], image_slots[1:], -1)

    positions = np.arange(n, dtype=np.int32)
    if turns is not None:
        turns = np.asarray(turns, np.int32)[where]
        prefix = int((turns == 0).sum())  # the prefix is one stretch at the start
        first = np.zeros(n, bool)
        first[1:] = turns[1:] != turns[:-1]
        origin = np.maximum.accumulate(np.where(first, positions, 0))
        positions = np.where(turns > 0, positions - origin + prefix, positions).astype(np.int32)
        # Nobody predicts over the border between two turns that don't see each other.
        border = np.zeros(n, bool)
        border[:-1] = (turns[1:] != turns[:-1]) & (turns[:-1] > 0)
        text_targets[border] = -1
        visual_targets[border] = -1
    kept = np.arange(count, dtype=np.int32)
    return Row(tokens, positions, text_targets, image_slots, visual_targets, kept, answers, turns)
