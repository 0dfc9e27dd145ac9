"""`Prompts`: requests as rows of ids and pixels, written as the samples of training are."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import MAX_FRAMES, ImageConfig
from metamorph_jax.data.interleave import build_row, read_place
from metamorph_jax.data.sources.base import Turn
from metamorph_jax.data.views import Views
from metamorph_jax.sampling.requests import Request, as_sample


@dataclasses.dataclass(frozen=True)
class Prompts:
    """How requests become rows, as in training.

    Attributes:
        chat: template, tokenizer and markers.
        views: how an image becomes views.
        images: limits of images that are read.
        length: most positions of prompt and reply together.
        think: text of a question -> the question that asks for the relevant detail first; None:
            the model was not trained to do so.
        frames: most frames of a video.
        ends: further ids that end a reply, of the model's generation config.
    """

    chat: Chat
    views: Views
    images: ImageConfig
    length: int
    think: Callable[[str], str] | None = None
    frames: int = MAX_FRAMES
    ends: tuple[int, ...] = ()

    @property
    def tokenizer(self):
        return self.chat.tokenizer

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a reply."""
        ends = {self.chat.close, self.tokenizer.eos_token_id, *self.ends}
        ends |= {stop[0] for stop in self.chat.stops if len(stop) == 1}
        return tuple(sorted(ends - {None}))

    def row(
        self,
        request: Request,
        max_new_tokens: int,
        write: Callable[[Sequence[Turn]], np.ndarray] | None = None,
        used: int = 0,
    ):
        """(`interleave.Row`, uint8[views, h, w, 3] or None) of a request.

        Args:
            write: the ids of its turns; None: `Chat.prompt`, a conversation that begins.
            used: positions that the conversation has taken so far.

        Raises:
            ValueError, BadSample: with a message for the user.
        """
        if request.think and self.think is None:
            raise ValueError("this model was not trained to draw a detail before it answers")
        sample = as_sample(request, self.think, self.frames, self.chat.template.lead)
        refs, ids = sample.images, (write or self.chat.prompt)(sample.turns)
        loaded = self.images.load(refs)
        places = [read_place(*self.views.plan(image.size)) for image in loaded]
        sizes = [len(place.slots) for place in places]
        need, room = len(ids) - len(refs) + sum(sizes), self.length - used
        if need > room - max_new_tokens:
            raise ValueError(_too_long(sizes, len(ids) - len(refs), max_new_tokens, room))
        row = build_row(ids, None, places, self.views.tokens, max(need, 1))
        pixels = [self.views.pixels(image) for image in loaded]
        return row, np.concatenate(pixels) if pixels else None


def _too_long(sizes: list[int], words: int, max_new_tokens: int, length: int) -> str:
    room = max(length - max_new_tokens, 0)
    advice = "shorten the prompt or --max-new-tokens"
    if sizes:
        fit = int((np.cumsum(sizes) + words <= room).sum())
        advice = f"{fit} images fit"
    return (
        f"{len(sizes)} images and {words} text tokens make {sum(sizes) + words} positions, but "
        f"beside {max_new_tokens} new tokens the context of {length} has room for {room}: {advice}"
    )
