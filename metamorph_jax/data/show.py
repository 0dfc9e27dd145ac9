"""Samples as a model reads them, for people: `metamorph data check --show 3`."""

import itertools
import os
from collections.abc import Iterator

import numpy as np

from metamorph_jax.data.chat import END_TOKEN, START_TOKEN
from metamorph_jax.data.stream import SampleStream
from metamorph_jax.files import shown
from metamorph_jax.types import TEXT

_MOST = 2000  # characters of a stretch of text


def lines(stream: SampleStream, n: int) -> Iterator[str]:
    """Sample n of a stream, a line for each stretch of text and each image.

    "reads" is what is given, "learns" what the model is trained to say; likewise "sees" and "draws"
    for images. Texts are escaped.
    """
    item, sample, _ = stream.read(n)
    size = f"{len(item['tokens'])} positions" + (", cut here" if item["cut"] else "")
    yield f"{sample.where} ({stream.sources[item['source']].name}, {sample.kind}): {size}"
    learnt = np.zeros(len(item["tokens"]), bool)
    targets = (item["text_targets"] >= 0) | (item["visual_targets"] >= 0)
    learnt[1:] = targets[:-1]  # the state before predicts it
    of_image = np.full(len(learnt), -1)
    inside = item["image_slots"] != TEXT
    starts = inside & ~np.roll(inside, 1)
    starts[:1] = inside[:1]
    starts[item["view_starts"][item["view_starts"] < len(learnt)]] = True
    of_image[inside] = np.cumsum(starts & inside)[inside] - 1
    for at in item.get("drawing_starts", np.zeros(0, int)) + 1:
        if at < len(learnt) and of_image[at] >= 0:  # it is read as well
            learnt[of_image == of_image[at]] = True
    unread = _unread(stream, item)
    for k, columns in unread.items():
        of_image[columns], learnt[columns] = -2 - k, True
    keys = zip(of_image.tolist(), learnt.tolist(), strict=True)
    for (view, taught), group in itertools.groupby(enumerate(keys), key=lambda pair: pair[1]):
        at = [position for position, _ in group]
        if view < -1:
            name = _named(sample.images[-2 - view])
            yield f"  draws  {name} ({len(at)} tokens in its stead)"
        elif view < 0:
            text = _text(stream.chat, item["tokens"][at].tolist())
            yield f"  {'learns' if taught else 'reads':<7}{shown(repr(text), _MOST)}"
        else:
            verb = "draws" if taught else "sees"
            read = [ref for k, ref in enumerate(sample.images) if k not in unread]
            yield f"  {verb:<7}{_name(read, view, item)} ({len(at)} visual tokens)"


def _unread(stream: SampleStream, item: dict) -> dict[int, slice]:
    """Which images of a sample are drawn but not read -> columns of the tokens in their stead."""
    drawings = stream.spec.drawings
    if drawings is None or not drawings.ids or "drawn" not in item:
        return {}
    starts = (item["drawing_starts"] + 1).tolist()
    pairs = zip(item["drawn"].tolist(), starts, strict=True)
    return {k: slice(start, start + len(drawings.ids)) for k, start in pairs}


def _name(read, view: int, item: dict) -> str:
    """The image, of those that are read, that a view belongs to, where each has one; else the
    number of the view."""
    if len(item["view_starts"]) != len(read) and view >= len(read):
        return f"view {view}"
    return _named(read[view])


def _named(ref) -> str:
    """The file of an image, and which part of it."""
    frame = f" frame {ref.frame}" if ref.frame is not None else ""
    box = f" box {ref.box}" if ref.box else " with boxes" if ref.marks else ""
    return shown(os.path.basename(ref.name) + frame + box)


def _text(chat, ids: list[int]) -> str:
    """Ids as text, with the names of special tokens and of the markers around images."""
    names = {id_: str(token) for token, id_ in chat.specials.items()}
    names |= dict.fromkeys(chat.markers.before, START_TOKEN)
    names |= dict.fromkeys(chat.markers.after, END_TOKEN)
    text = ""
    for special, group in itertools.groupby(ids, key=lambda id_: id_ in names):
        part = list(group)
        text += "".join(names[i] for i in part) if special else chat.tokenizer.decode(part)
    return text
