"""One conversation with images as the arrays of a row: where text stands, where visual tokens.

With P = 2 (`<` and `>` are the markers around an image, `o` a visual token, A the first image, B
the second, which is to be predicted):

    ids             q  <  S  >  a  <  S  >  e         labels   -  -  -  -  a  <  -  >  e
    tokens          q  <  o  o  >  a  <  o  o  >  e
    image_slots    -1 -1 A0 A1 -1 -1 -1 B0 B1 -1 -1   (A0 = 0, A1 = 1, B0 = 2, B1 = 3)
    text_targets   -1 -1 -1 -1  a  < -1 -1  >  e -1
    visual_targets -1 -1 -1 -1 -1 -1 B0 B1 -1 -1 -1

The state at position p predicts what stands at p + 1, text or visual token alike. Which images are
to be predicted is the recipe's rule, and what stands in an image's place is a `Place`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from metamorph_jax.data.chat import IGNORE, SENTINEL
from metamorph_jax.types import TEXT

# (labels int[n], positions int[k] of the images' sentinels in them) -> bool[k], which images.
Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]


def no_image(labels: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """The rule of models that only read images."""
    return np.zeros(len(sentinels), bool)


def in_answers(labels: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """The rule of models that show what they draw in their answers, and nothing around it."""
    return labels[sentinels] != IGNORE


@dataclasses.dataclass(frozen=True)
class AfterSupervisedStart:
    """The rule of models that decide on their own to draw: an image is to be predicted iff it
    follows a supervised start token.

    Otherwise, and when it comes first or directly after another image, it is context.

    Attributes:
        start: id of the start token.
    """

    start: int

    def __call__(self, labels: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
        """See `Rule`."""
        before = np.maximum(sentinels - 1, 0)
        return (sentinels > 0) & (labels[before] == self.start)


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """What stands where an image is in the text.

    Attributes:
        slots: int32[n] visual tokens of the image or `NEWLINE`; `TEXT` at ordinary tokens.
        tokens: int32[n] ids, 0 at visual tokens.
        views: how many views the slots point into.
        unlearnt: bool[n] which tokens are never predicted, though the image is in an answer; None:
            none of them.
    """

    slots: np.ndarray
    tokens: np.ndarray
    views: int
    unlearnt: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.slots)


def read_place(views: int, slots: np.ndarray) -> Place:
    """An image that is read, from the plan of its views (`data/views.py`)."""
    return Place(np.asarray(slots, np.int32), np.zeros(len(slots), np.int32), views)


def text_place(ids: Sequence[int], unlearnt: Sequence[int] = ()) -> Place:
    """Ordinary tokens in an image's stead: it is drawn, but not read.

    Args:
        ids: of the tokens.
        unlearnt: which of them, counted from 0, are never predicted.
    """
    silent = None
    if unlearnt:
        silent = np.zeros(len(ids), bool)
        silent[list(unlearnt)] = True
    return Place(np.full(len(ids), TEXT, np.int32), np.array(ids, np.int32), 0, silent)


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample, not padded; n positions, k kept images with V views together.

    Attributes:
        tokens, positions, text_targets, image_slots, visual_targets: int32[n], see `Batch`;
            slots and targets count from the sample's own first view.
        image_starts: int32[k] column at which each kept image's place begins. Always the first k
            images of the sample are kept.
        view_starts: int32[V] column of each view's first visual token (of its image's place, if
            none of the view's tokens is read).
        predicted: bool[k] which kept images are to be predicted.
        turns: int32[n] or None, see `Batch`.
        cut: whether the end of the sample was left out, as it did not fit.
    """

    tokens: np.ndarray
    positions: np.ndarray
    text_targets: np.ndarray
    image_slots: np.ndarray
    visual_targets: np.ndarray
    image_starts: np.ndarray
    view_starts: np.ndarray
    predicted: np.ndarray
    turns: np.ndarray | None = None
    cut: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


def build_row(
    ids: np.ndarray,
    labels: np.ndarray | None,
    places: Sequence[Place],
    tokens_per_view: int,
    length: int,
    rule: Rule = no_image,
    turns: np.ndarray | None = None,
    mask_dangling: Sequence[int] = (),
) -> Row:
    """Puts every image into its place and shifts the targets.

    An image that would not fit into `length` is left out together with everything after it; then
    text is cut. The image of a cut sentinel is never kept.

    Args:
        ids: int[n] token ids with -200 for each image.
        labels: int[n], -100 where not supervised, or None (inference: nothing is predicted).
        places: what stands at each sentinel.
        tokens_per_view: P.
        length: most positions of the row.
        rule: which images are to be predicted.
        turns: int[n] from `Chat.conversation(independent=True)`, or None.
        mask_dangling: ids of the marker before an image, which is then not supervised if the image
            did not fit; () supervises it all the same.

    Returns:
        The row.
    """
    ids = np.asarray(ids, np.int32)
    labels = np.full(len(ids), IGNORE, np.int32) if labels is None else np.asarray(labels, np.int32)
    starts, fitting = _fit(ids, places, length)
    cut = fitting < len(places)
    if cut:
        end = np.flatnonzero(ids == SENTINEL)[fitting]
        ids, labels, starts, places = ids[:end], labels[:end], starts[:fitting], places[:fitting]
    predicted = np.asarray(rule(labels, np.flatnonzero(ids == SENTINEL)), bool)

    at = _origins(ids, places)
    cut_text, at = len(at) > length, at[:length]
    in_place = ids[at] == SENTINEL
    tokens, slots = _contents(ids[at], in_place, places, tokens_per_view)

    text = _text_labels(labels[at], in_place, tokens, slots, places)
    if cut and _ends_with(tokens, mask_dangling):
        text[-len(mask_dangling) :] = -1
    text_targets = _shifted(text)
    visual_targets = _shifted(_visual_labels(slots, in_place, places, predicted))
    positions = np.arange(len(at), dtype=np.int32)
    if turns is not None:
        turns = np.asarray(turns, np.int32)[at]
        positions, last = _restart(turns)
        text_targets[last] = visual_targets[last] = -1
    return Row(
        tokens, positions, text_targets, slots, visual_targets, starts,
        _all_view_starts(starts, places, tokens_per_view), predicted, turns, cut or cut_text,
    )  # fmt: skip


def _fit(ids: np.ndarray, places: Sequence[Place], length: int) -> tuple[np.ndarray, int]:
    """(column at which each place begins, how many of them, from the first, fit into `length`)."""
    sentinels = np.flatnonzero(ids == SENTINEL)
    if len(sentinels) != len(places):
        raise ValueError(f"{len(sentinels)} images in the text, places for {len(places)}")
    widths = np.array([len(place) for place in places], np.int64)
    ends = np.cumsum(widths) + sentinels - np.arange(len(places))
    starts = (ends - widths).astype(np.int32)
    return starts, int(np.searchsorted(ends, length, side="right"))


def _origins(ids: np.ndarray, places: Sequence[Place]) -> np.ndarray:
    """Which of the ids stands at each position; those of a place share its sentinel."""
    widths = np.ones(len(ids), np.int64)
    widths[ids == SENTINEL] = [len(place) for place in places]
    return np.repeat(np.arange(len(ids)), widths)


def _all_view_starts(starts, places: Sequence[Place], P: int) -> np.ndarray:
    """int32[V] columns, see `Row`."""
    views = [start + _view_starts(place, P) for start, place in zip(starts, places, strict=True)]
    return np.concatenate(views) if views else np.zeros(0, np.int32)


@functools.lru_cache(maxsize=64)  # where images have one view, they share one place
def _view_starts(place: Place, P: int) -> np.ndarray:
    """int32[views] where in the place each view's first visual token is; 0 if none is read."""
    starts = np.zeros(place.views, np.int32)
    columns = np.flatnonzero(place.slots >= 0)
    views, first = np.unique(place.slots[columns] // P, return_index=True)
    starts[views] = columns[first]
    return starts


def _contents(tokens, in_place, places, P: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, image_slots), int32[n] each."""
    slots = np.full(len(tokens), TEXT, np.int32)
    if places:
        view, moved = 0, []
        for place in places:
            offset = view * P
            moved.append(np.where(place.slots >= 0, place.slots + offset, place.slots))
            view += place.views
        slots[in_place] = np.concatenate(moved)
        tokens[in_place] = np.concatenate([place.tokens for place in places])
    return tokens, slots


def _text_labels(labels, in_place, tokens, slots, places: Sequence[Place]) -> np.ndarray:
    """int32[n]: the token that the state before is to predict, -1 for none.

    Tokens in an image's stead are supervised where the image's sentinel is, unless they are never
    predicted (`Place.unlearnt`).
    """
    here = np.where(in_place & (labels != IGNORE), tokens, labels)
    text = np.where((slots == TEXT) & (here >= 0), here, -1).astype(np.int32)
    if any(place.unlearnt is not None for place in places):
        text[np.flatnonzero(in_place)[_unlearnt(places)]] = -1
    return text


def _unlearnt(places: Sequence[Place]) -> np.ndarray:
    """bool[n] of all positions in places, one place after another: see `Place`."""
    none = lambda place: np.zeros(len(place), bool)  # noqa: E731
    return np.concatenate([none(p) if p.unlearnt is None else p.unlearnt for p in places])


def _ends_with(tokens: np.ndarray, ids: Sequence[int]) -> bool:
    return len(ids) > 0 and tokens[-len(ids) :].tolist() == list(ids)


def _visual_labels(slots, in_place, places: Sequence[Place], predicted) -> np.ndarray:
    """int32[n]: the visual token that the state before is to predict, -1 for none."""
    visual = np.full(len(slots), -1, np.int32)
    if predicted.any():
        answers = np.repeat(predicted, [len(place) for place in places])
        visual[in_place] = np.where(answers & (slots[in_place] >= 0), slots[in_place], -1)
    return visual


def _shifted(labels: np.ndarray) -> np.ndarray:
    """What the state at each position is to predict: the label of the next one."""
    targets = np.full(len(labels), -1, np.int32)
    targets[:-1] = labels[1:]
    return targets


def _restart(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions of a row with independent turns, bool: the last position of a turn).

    Every turn continues the positions of the prefix (turn 0, one stretch at the start). From its
    last position nothing is predicted: what follows belongs to a turn that does not see it.
    """
    positions = np.arange(len(turns), dtype=np.int32)
    prefix = int((turns == 0).sum())
    first = np.zeros(len(turns), bool)
    first[1:] = turns[1:] != turns[:-1]
    origin = np.maximum.accumulate(np.where(first, positions, 0))
    last = np.append(first[1:], False)[: len(turns)] & (turns > 0)
    return np.where(turns > 0, positions - origin + prefix, positions).astype(np.int32), last
