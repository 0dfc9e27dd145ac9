"""Rows as the published code of MM-Interleaved builds them: documents one after another, and cut.

    document 1              document 2           document 3
    ^ a < o o o b $         ^ < o o o c $        ^ d e f < o o o g $
    row 1 ──────────────────────────────────────────────│ row 2 ────────

Nothing is left out and little is padded, but the tail of a document has to do without its
beginning. A row ends where its length does, with two exceptions:

- An image is never divided. If the end lies inside one, the whole image moves to the next row
  (`cut_at = "image"`), or the whole last document does ("document"). A document that is longer than
  a row on its own can't move, so it is cut before the image, too (the published code fails on it).
- If the row then holds too many images, it ends right after the last one allowed ("image"); or
  where the last document before the first surplus image begins, if that comes after the last image
  allowed, else at the surplus image ("document").

After each document that is added, one row is closed if there is
enough for one, as the published code does it. With many images in short documents the rows are
short, so that more is added than closed; from `_MOST` rows on, more rows are closed at once.
"""

from collections.abc import Sequence

import numpy as np

_MOST = 8


class Concat:
    """The documents of one source that wait for their rows.

    An item, or what is left of it, is a dict as `SampleStream` makes them. "piece" in it says
    which columns of the whole item it has.

    Args:
        length: L, positions of a row.
        images: most images of a row.
        cut_at: "image" or "document".
        before, after: columns of an image before its first visual token, and from there on.
        tokens_per_view: P.
    """

    def __init__(
        self, length: int, images: int, cut_at: str, before: int, after: int, tokens_per_view: int
    ):
        self.length, self.images, self.cut_at = length, images, cut_at
        self.before, self.after, self.P = before, after, tokens_per_view
        self.waiting: list[dict] = []

    def add(self, item: dict) -> list[list[dict]]:
        """Places the item; returns the rows that were closed on the way."""
        self.waiting.append(item)
        rows = [self._row()] if self._total() >= self.length else []
        while self._total() >= _MOST * self.length:
            rows.append(self._row())
        return rows

    def flush(self) -> list[list[dict]]:
        """Closes all rows."""
        rows = []
        while self.waiting:
            rows.append(self._row())
        return rows

    def _total(self) -> int:
        return sum(len(item["tokens"]) for item in self.waiting)

    def _row(self) -> list[dict]:
        """Takes the next row from what waits."""
        end, row = self._end(), []
        while end and self.waiting:
            n = len(self.waiting[0]["tokens"])
            if n > end:
                item = self.waiting[0]
                row.append(part(item, 0, end, self.P))
                self.waiting[0] = part(item, end, n, self.P)
                break
            row.append(self.waiting.pop(0))
            end -= n
        return row

    def _end(self) -> int:
        """Where the next row ends, as a column of what waits."""
        starts, ends, documents = self._layout()
        end = min(self.length, self._total())
        inside = np.flatnonzero((starts < end) & (end < ends))
        if len(inside):
            end = int(starts[inside[0]])
            last = int(documents[documents < end].max(initial=0))
            if self.cut_at == "document" and last > 0:
                end = last
        if (starts < end).sum() <= self.images:
            return end
        surplus = int(starts[self.images])
        if self.cut_at == "image":
            return int(ends[self.images - 1])
        last = int(documents[documents < surplus].max(initial=0))
        return last if last > starts[self.images - 1] else surplus

    def _layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(columns where images begin, their markers included, and where they end; columns where
        documents begin), of the images and documents at the head of what waits."""
        starts, documents, at = [], [], 0
        for item in self.waiting:
            if item.get("piece", (0, 0))[0] == 0:
                documents.append(at)
            starts.append(item["view_starts"] - self.before + at)
            at += len(item["tokens"])
            if at > self.length + self.after:
                break
        images = np.concatenate(starts) if starts else np.zeros(0, int)
        return images, images + self.before + self.after, np.array(documents, int)


class ConcatBySource:
    """Rows of one source each, as the published code has them; takes the place of `FirstFit`.

    Args:
        packers: of every source.
    """

    def __init__(self, packers: Sequence[Concat]):
        self.packers = packers

    @property
    def rows(self) -> list[list[dict]]:
        """The open rows."""
        return [packer.waiting for packer in self.packers if packer.waiting]

    def restore(self, rows: Sequence[Sequence[dict]]) -> None:
        """Sets the open rows."""
        for row in rows:
            self.packers[row[0]["source"]].waiting = list(row)

    def add(self, item: dict) -> list[list[dict]]:
        """Places the item; returns the rows that were closed on the way."""
        return self.packers[item["source"]].add(item)

    def flush(self) -> list[list[dict]]:
        """Closes all rows."""
        return [row for packer in self.packers for row in packer.flush()]


def part(item: dict, start: int, stop: int, tokens_per_view: int) -> dict:
    """Columns from `start` to `stop` of an item; they must not divide an image.

    The last position has no target if the item goes on after it. An image whose marker is the first
    of these columns is not drawn: nothing that it could be drawn from is left.
    """
    views, cached = item["view_starts"], item["cache"]
    inside = (views >= start) & (views < stop)
    made = {**item, "piece": _piece(item, start, stop)}
    for name in ("tokens", "text_targets", "image_slots", "visual_targets"):
        made[name] = item[name][start:stop].copy()
    made["positions"] = np.arange(stop - start, dtype=np.int32)
    if stop < len(item["tokens"]):
        made["text_targets"][-1:] = made["visual_targets"][-1:] = -1
    first = int(np.argmax(inside)) if inside.any() else 0
    for name in ("image_slots", "visual_targets"):
        made[name] -= np.where(made[name] >= 0, first * tokens_per_view, 0).astype(np.int32)
    made["view_starts"], made["cache"] = (views[inside] - start).astype(np.int32), cached[inside]
    if "pixels" in item:
        made["pixels"] = item["pixels"][inside[cached < 0]]
    if "drawing_starts" in item:
        at = item["drawing_starts"]
        kept = (at >= start) & (at < stop) & ((at > start) | (start == 0))
        made["drawing_starts"] = (at[kept] - start).astype(np.int32)
        made |= {name: item[name][kept] for name in ("drawings", "captions") if name in item}
    return made


def _piece(item: dict, start: int, stop: int) -> tuple[int, int]:
    """Which columns of the whole item these are."""
    origin = item.get("piece", (0, 0))[0]
    return origin + start, origin + stop
