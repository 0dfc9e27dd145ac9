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
    keys = zip(of_image.tolist(), learnt.tolist(), strict=True)
    for (view, taught), group in itertools.groupby(enumerate(keys), key=lambda pair: pair[1]):
        at = [position for position, _ in group]
        if view < 0:
            text = _text(stream.chat, item["tokens"][at].tolist())
            yield f"  {'learns' if taught else 'reads':<7}{shown(repr(text), _MOST)}"
        else:
            verb = "draws" if taught else "sees"
            yield f"  {verb:<7}{_name(sample, view, item)} ({len(at)} visual tokens)"


def _name(sample, view: int, item: dict) -> str:
    """The image that a view belongs to, where each image has one; else the number of the view."""
    if len(item["view_starts"]) != len(sample.images) and view >= len(sample.images):
        return f"view {view}"
    ref = sample.images[view]
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
