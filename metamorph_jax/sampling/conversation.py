"""A conversation with a model: each turn is appended to the cache, so nothing is read twice."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from metamorph_jax.sampling.generator import DEFAULTS, Generator, Options
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import Reply
from metamorph_jax.sampling.text import row_keys


class Conversation:
    """Turns of a user and a model, which sees all that came before.

    Attributes:
        turns: of the user so far.
        used: positions of the context that are taken, of `generator.prompts.length`.

    Raises:
        ValueError: the options ask for beams: a conversation continues one row of the cache.
    """

    def __init__(self, generator: Generator, options: Options = DEFAULTS):
        if options.beams > 1:
            raise ValueError("a conversation is decoded without beams: leave beams at 1")
        self.generator, self.options = generator, options
        self.turns = self.used = 0
        self._policy = generator.policy(options.text(generator.prompts.eos))
        self._state, self._closed = None, False

    def say(self, request: Request, stream: Callable[[np.ndarray], None] | None = None) -> Reply:
        """The reply to the next turn, which is then part of the conversation.

        Args:
            request: its text, images and video.
            stream: see `Generator.generate`.

        Raises:
            ValueError, BadSample: the turn can't be read, or the context has no room for it; the
                conversation stays as it was.
            WeightError: an image of the reply has values that are not finite.
        """
        generator, loop = self.generator, self.generator.loop
        budget = generator.budget(self.options)
        first = self._state is None
        row, pixels = generator.prompts.row(
            request, budget, None if first else self._next, self.used + (not first)
        )
        embeds, ids = generator.embedded(row, pixels)
        seed = self.options.seed_of(dataclasses.replace(request, id=str(self.turns), sample=0))
        seeds = np.array([seed], np.uint32)
        if first:
            slots = generator.prompts.length + self._policy.extra_steps
            state = loop.prefill(
                [embeds], budget, self._policy, seeds=seeds, prompt_ids=[ids], slots=slots
            )
        else:
            fresh = dataclasses.replace(self._state, rng=row_keys(jnp.asarray(seeds)))
            state = loop.extend(fresh, [embeds], [0], self._policy, budget)
        self._state = loop.finish(state, self._policy, stream and (lambda new: stream(new[0])))
        (result,) = loop.results(self._state, self._policy)
        self.turns += 1
        self.used = int(loop.read(self._state.length)[0][0])
        self._closed = bool(len(result.ids)) and result.ids[-1] == generator.prompts.chat.close
        return generator.reply(result, self.options, seed)

    def _next(self, turns) -> np.ndarray:
        ((_, text),) = turns
        return self.generator.prompts.chat.next_prompt(text, self._closed)
