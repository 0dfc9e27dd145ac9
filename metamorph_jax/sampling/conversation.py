"""A conversation with a model: each turn is appended to the cache, so nothing is read twice."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from metamorph_jax.errors import WeightError
from metamorph_jax.sampling.generator import Drawn, Generator
from metamorph_jax.sampling.options import DEFAULTS, Options
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import Reply
from metamorph_jax.sampling.text import row_keys


class Conversation:
    """Turns of a user and a model, which sees all that came before.

    Attributes:
        options: of the next replies; see `change`.
        used: positions of the context that are taken, of `generator.prompts.length`.

    Raises:
        ValueError: the options ask for beams or several samples: a conversation continues one row
            of the cache.
    """

    def __init__(self, generator: Generator, options: Options = DEFAULTS):
        self.generator, self.used = generator, 0
        self._state, self._closed, self._before = None, False, []
        self._maps: list = []
        self.change(options)

    @property
    def turns(self) -> int:
        """Of the user so far."""
        return len(self._before)

    def change(self, options: Options) -> None:
        """Takes these options from the next turn on.

        Raises:
            ValueError: they ask for beams or several samples, or for another repetition penalty
                than before.
        """
        if options.beams > 1:
            raise ValueError("a conversation is decoded without beams: leave beams at 1")
        if options.best_of > 1:
            raise ValueError("a conversation continues one reply: leave best_of at 1")
        penalty = options.repetition_penalty
        if self.turns and penalty != self.options.repetition_penalty:
            raise ValueError("repetition_penalty can't change within a conversation")
        self.options = options
        self._policy = self.generator.policy_of(options)

    def undo(self) -> None:
        """Takes the last turn and its reply back; the cache keeps what came before.

        Raises:
            ValueError: there is none.
        """
        if not self.turns:
            raise ValueError("there is no turn to take back")
        before = self._before.pop()
        self.used, self._closed, self._maps = before.used, before.closed, before.maps
        if not self.turns:
            self._state = None
            return
        parts = {name: jnp.asarray(value) for name, value in before.parts.items()}
        if self._state.images is not None:
            parts["images"] = self._state.images.until(parts["length"])
        self._state = dataclasses.replace(self._state, **parts)

    def say(
        self,
        request: Request,
        stream: Callable[[np.ndarray], None] | None = None,
        draw: bool = False,
    ) -> Reply:
        """The reply to the next turn, which is then part of the conversation.

        Args:
            request: its text, images and video; with another `sample`, chance gives another reply.
            stream: see `Generator.generate`.
            draw: the reply begins with an image: its start is put there for the model.

        Raises:
            ValueError, BadSample: the turn can't be read, or the context has no room for it; the
                conversation stays as it was.
            WeightError: the logits or an image of the reply are not finite; so may be what the
                cache holds, so the conversation begins anew.
        """
        generator, loop = self.generator, self.generator.loop
        budget = generator.budget(self.options)
        first = self._state is None
        forced = self._forced(draw)
        row, pixels = generator.prompts.row(
            request, budget, None if first else self._next, self.used + (not first)
        )
        embeds, ids, images = generator.reader.embedded(row, pixels)
        images = None if images is None else [images]
        seed = self.options.seed_of(dataclasses.replace(request, id=str(self.turns)))
        seeds = np.array([seed], np.uint32)
        before = self._now()
        if first:
            slots = generator.prompts.length + self._policy.extra_steps
            state = loop.prefill(
                [embeds], budget, self._policy, seeds=seeds, prompt_ids=[ids], slots=slots,
                forced_ids=forced, images=images, places=generator.places,
            )  # fmt: skip
        else:
            state = self._fresh(seeds, forced, budget + self._policy.extra_steps)
            state = loop.extend(state, [embeds], [0], self._policy, budget, images=images)
        own = Drawn(seed, self._maps + (images[0].each() if images else []))
        self._state = generator.finish(
            state, self._policy, [own], self.options, stream and (lambda new: stream(new[0]))
        )
        (result,) = loop.results(self._state, self._policy)
        self._before.append(before)
        self.used = int(loop.read(self._state.length)[0][0])
        self._closed, self._maps = generator.prompts.chat.is_closed(result.ids), own.maps
        try:
            return generator.reply(result, self.options, seed, own=own)
        except WeightError as error:
            self.used, self._state, self._closed, self._before = 0, None, False, []
            self._maps = []
            raise WeightError(f"{error}; the conversation begins anew") from error

    def _now(self) -> "_Before":
        """What `undo` needs to come back here."""
        state, names = self._state, ("length", "embed", "unread")
        values = () if state is None else self.generator.loop.read(
            *(getattr(state, name) for name in names)
        )  # fmt: skip
        return _Before(dict(zip(names, values, strict=False)), self.used, self._closed, self._maps)

    def _fresh(self, seeds, forced: np.ndarray, places: int):
        """The state with these seeds and forced ids, and at least so many places in its record."""
        state = self._state
        more = max(-(-places // 8) * 8 - state.record.shape[1], 0)
        wider = lambda x: jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
        asked = np.full((1, state.forced.shape[1] + more), -1, np.int32)
        asked[:, : forced.shape[1]] = forced
        return dataclasses.replace(
            state, rng=row_keys(jnp.asarray(seeds)), forced=jnp.asarray(asked),
            record=wider(state.record), recorded=wider(state.recorded),
        )  # fmt: skip

    def _forced(self, draw: bool) -> np.ndarray:
        """int32[1, n] ids that the reply begins with."""
        if draw and not self.generator.draws:
            raise ValueError("this model writes text only: it can't be asked to draw")
        return np.array([self.generator.image_start if draw else ()], np.int32)

    def _next(self, turns) -> np.ndarray:
        ((_, text),) = turns
        return self.generator.prompts.chat.next_prompt(text, self._closed)


@dataclasses.dataclass(frozen=True)
class _Before:
    """Where a conversation stood before a turn: parts of `loop.State`, and its own."""

    parts: dict[str, np.ndarray]
    used: int
    closed: bool
    maps: list
