"""Beam search: the likeliest replies, several of which are written side by side.

Each request has K beams that read the cache as K rows of the decoding loop do, so that a step reads
each weight once for all of them. Of the continuations of its beams, a request keeps the K likeliest
that go on; those that end are finished replies, of which it keeps the best K by

    score = log p(reply) / length ** length_penalty        (its end counts as a token)

A reply ends with an end id or, where the chat template closes answers by a text, with that text.

    beams      a b | c d        request 0 | request 1, K = 2
    from       0 0 | 1 0        a step continues these beams …
    cache      a a | d c        … so the rows of the cache are put in that order

Order, scores and ends are those of Hugging Face's `generate(num_beams=K)`, tested token for token.
Text only: a policy that emits anything else is refused.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metamorph_jax import sharding
from metamorph_jax.sampling.cached_llm import CachedLLM
from metamorph_jax.sampling.loop import Loop, RowImages, layout, padded
from metamorph_jax.sampling.policy import Policy, TextPolicy, sound
from metamorph_jax.sampling.segments import BROKEN, NOTHING, Result

_NEVER = -1e9  # the score of what can't be chosen
EARLY = (False, True, "never")
MOST = 1024  # beams, each a row of the cache


@dataclasses.dataclass(frozen=True)
class Beams:
    """How a beam search goes.

    Attributes:
        count: K, of each request; 1 is no search.
        length_penalty: scores are divided by length to this power: above 0 prefers long replies.
        early_stopping: when a request with K finished replies ends. True: at once. False: when its
            best beam, as it stands, scores less than the worst of them. "never": when no longer
            reply can score more.
        start_counts: length has one token more where a reply goes on, as in transformers up to 4.31
            for prompts that are given as embeddings: a BOS stands before what they generate, and
            ends are left out. A parity option.
    """

    count: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    start_counts: bool = False

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"beams must be at least 1, not {self.count}")
        if self.count > MOST:
            raise ValueError(f"beams must be at most {MOST}, not {self.count}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, not {self.length_penalty}")
        if self.early_stopping not in EARLY:
            raise ValueError(
                f"early_stopping must be True, False or 'never', not {self.early_stopping!r}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the search carries. B requests, K beams, M places, S slots; row b * K + k is beam k.

    Attributes:
        keys, values: of the rows, see `cached_llm`.
        step: int32[] tokens that each beam has.
        ids: int32[B, K, M] of the beams; scores: float32[B, K] their log probabilities.
        best, best_scores, best_length: of the finished replies, sorted; int32[B, K, M],
            float32[B, K] and int32[B, K], which is 0 where there is none yet.
        searching: bool[B]; broken: bool[B] the logits of a beam were not finite.
        seen: the policy's memory, of the rows.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    step: jax.Array
    ids: jax.Array
    scores: jax.Array
    best: jax.Array
    best_scores: jax.Array
    best_length: jax.Array
    searching: jax.Array
    broken: jax.Array
    seen: Any


def search(
    loop: Loop,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int | Sequence[int],
    policy: Policy,
    beams: Beams,
    prompt_ids: Sequence[np.ndarray] | None = None,
    images: Sequence[RowImages | None] | None = None,
) -> list[Result]:
    """The best reply to each prompt.

    Args:
        loop: whose model decodes.
        prompts, max_new_tokens, prompt_ids, images: see `Loop.prefill`.
        policy: for text, and greedy.

    Raises:
        ValueError: the policy draws images or by chance, or as `Loop.prefill`.
    """
    check(policy)
    lengths, budget, L, capacity = layout(prompts, max_new_tokens, policy)
    with loop.on_mesh():
        state = _search(
            loop.weights["llm"], padded(prompts, L, np.float32, 0), lengths, budget,
            padded(prompt_ids or [()] * len(prompts), L, np.int32, -1),
            np.float32(beams.length_penalty), loop.joined(images), llm=loop.llm, policy=policy,
            count=beams.count, early=beams.early_stopping, capacity=capacity,
            extra=int(beams.start_counts),
        )  # fmt: skip
    best, length = loop.read(*state)
    none = np.zeros((capacity, 0), np.float32)
    records = [ids[:n] for ids, n in zip(best, length, strict=True)]
    return [policy.read(ids, none[: len(ids)], ids[-1] in policy.eos) for ids in records]


def check(policy: Policy) -> None:
    """Raises ValueError, for the user, where beams can't decode what a policy does."""
    if not isinstance(policy, TextPolicy):
        raise ValueError(
            "this model draws images, and beam search writes text only: leave beams at 1"
        )
    if not policy.sampler.greedy:
        raise ValueError("beams take the likeliest tokens: with them, temperature must be 0")


# ---- what is compiled


def _run(
    weights, embeds, lengths, budget, prompt_ids, power, images=None,
    *, llm, policy, count, early, capacity, extra,
):  # fmt: skip
    """(int32[B, M] best replies, int32[B] their lengths); `BROKEN` alone where logits were."""
    B, K, L = len(lengths), count, embeds.shape[1]
    embeds = sharding.constrain(embeds.astype(weights["table"].dtype), "act_batch", None, None)
    placed = None if images is None else llm.place(weights, *images[:3])
    keys, values, hidden = llm.read_prompts(weights, embeds, lengths, L + capacity, placed)
    rows = np.repeat(np.arange(B), K)
    placed = None if placed is None else placed.of_rows(rows)  # those of all beams of a request
    # At first all beams of a request are alike: only the first one may be continued.
    apart = jnp.where(jnp.arange(K) == 0, 0.0, _NEVER)
    state = State(
        keys=[llm.take_rows(x, rows, B) for x in keys],
        values=[llm.take_rows(x, rows, B) for x in values],
        step=jnp.int32(0),
        ids=jnp.full((B, K, capacity), NOTHING, jnp.int32),
        scores=jnp.broadcast_to(apart, (B, K)),
        best=jnp.full((B, K, capacity), NOTHING, jnp.int32),
        best_scores=jnp.full((B, K), _NEVER),
        best_length=jnp.zeros((B, K), jnp.int32),
        searching=jnp.ones(B, bool),
        broken=jnp.zeros(B, bool),
        seen=TextPolicy.init(policy, B * K, prompt_ids[rows], llm.cfg.tokens),
    )
    choose = _Choice(llm, policy, count, early, power, extra)
    state, order = choose(weights, state, hidden[:, rows], budget)

    def body(carry):
        s, order = carry
        last = lax.dynamic_index_in_dim(s.ids, s.step - 1, 2, keepdims=False).reshape(-1)
        keys = [llm.take_rows(x, order, B) for x in s.keys]
        values = [llm.take_rows(x, order, B) for x in s.values]
        keys, values, hidden = llm.read_token(
            weights, keys, values, lengths[rows] + s.step - 1, llm.embed(weights, last), placed
        )
        s = dataclasses.replace(s, keys=keys, values=values)
        return choose(weights, s, hidden, budget)

    state, _ = lax.while_loop(lambda carry: carry[0].searching.any(), body, (state, order))
    best, broken = state.best[:, 0], state.broken
    best = jnp.where(broken[:, None], BROKEN, best)
    return best, jnp.where(broken, 1, state.best_length[:, 0])


STATIC = ("llm", "policy", "count", "early", "capacity", "extra")
_search = jax.jit(_run, static_argnames=STATIC)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """One step of the search: from hidden states to the next token of every beam."""

    llm: CachedLLM
    policy: TextPolicy
    count: int
    early: bool | str
    power: jax.Array
    extra: int

    def __call__(self, weights, s: State, hidden, budget) -> tuple[State, jax.Array]:
        """(state, int32[B * K] the rows that the beams continue), from float[D, B * K]."""
        K = self.count
        logits = self.llm.logits(weights, hidden).T
        broken = ~sound(logits, axis=-1).reshape(-1, K).all(axis=1)
        s = dataclasses.replace(s, broken=s.broken | (s.searching & broken))
        scores, beam, token = self.candidates(s, logits)
        ids = _take(s.ids, beam)
        ids = lax.dynamic_update_index_in_dim(ids, token, s.step, 2)
        own = self.policy.ends(token) | self.policy.completes(ids, s.step + 1)
        ends = own | (s.step + 1 >= budget)[:, None]
        s = self.keep_finished(s, ids, scores, ends, s.step + 1 + self.extra * ~own)
        scores, going_on = lax.top_k(jnp.where(ends, scores + _NEVER, scores), K)
        beam, token = _take(beam, going_on), _take(token, going_on)
        order = (beam + K * jnp.arange(len(beam))[:, None]).reshape(-1)
        seen = None if s.seen is None else s.seen[order]
        s = dataclasses.replace(
            s,
            step=s.step + 1,
            ids=_take(ids, going_on),
            scores=scores,
            seen=TextPolicy.remember(self.policy, seen, token.reshape(-1)),
        )
        return dataclasses.replace(s, searching=self.goes_on(s, budget)), order

    def candidates(self, s: State, logits):
        """The likeliest continuations of each request, sorted: [B, n] scores, beams and tokens.

        There are so many that K of them go on even if all that end are among them.
        """
        B, K = s.scores.shape
        count = jnp.broadcast_to(s.step, (B * K,))
        log_p = self.policy.scores(jax.nn.log_softmax(logits, axis=-1), s.seen, count)
        n = max(2, 1 + self.policy.endings) * K
        # The best n of each beam first: so the whole vocabulary is sorted where it lies.
        few, token = lax.top_k(log_p, min(n, log_p.shape[1]))
        total = s.scores[:, :, None] + few.reshape(B, K, -1)
        total, place = lax.top_k(total.reshape(B, -1), min(n, total[0].size))
        beam = place // few.shape[1]
        return total, beam, jnp.take_along_axis(token.reshape(B, -1), place, axis=1)

    def keep_finished(self, s: State, ids, scores, ends, length) -> State:
        """Adds the candidates that end, of the K best, to the finished replies; their scores are
        for this length, int32[B, n]."""
        K, n = self.count, s.step + 1
        scores = scores / length.astype(jnp.float32) ** self.power
        counts = ends & (jnp.arange(ends.shape[1]) < K) & s.searching[:, None]
        scores = jnp.where(counts, scores, scores + _NEVER)
        merged, place = lax.top_k(jnp.concatenate([s.best_scores, scores], axis=1), K)
        both = lambda a, b: _take(jnp.concatenate([a, b], axis=1), place)  # noqa: E731
        return dataclasses.replace(
            s,
            best=both(s.best, ids),
            best_scores=merged,
            best_length=both(s.best_length, jnp.where(counts, n, 0)),
        )

    def goes_on(self, s: State, budget) -> jax.Array:
        """bool[B]: whether a request is still searching."""
        full = (s.best_length > 0).all(axis=1)
        longest = s.step
        if self.early == "never":
            longest = jnp.where(self.power > 0, budget, s.step)
        hope = s.scores[:, 0] / (longest + self.extra).astype(jnp.float32) ** self.power
        beaten = full & (hope <= s.best_scores[:, -1])
        done = full if self.early is True else beaten
        return s.searching & ~(done | beaten | s.broken) & (s.step < budget)


def _take(x, places):
    """x[b, places[b, j], ...] of x: [B, n, ...] and int32[B, m] places."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)
