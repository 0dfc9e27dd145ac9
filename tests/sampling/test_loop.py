"""The mechanics of the loop, with policies that only tests have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.models.llm import llama
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop
from metamorph_jax.sampling.policy import Step, TextPolicy
from metamorph_jax.sampling.segments import BROKEN, NOTHING
from metamorph_jax.sampling.text import Sampler

PAUSE = 7


@dataclasses.dataclass(frozen=True)
class Pausing(TextPolicy):
    """Text, but a row pauses once `PAUSE` is to be emitted, and emits nothing then."""

    def emit(self, memory, hidden, step: Step, model):
        memory, out = super().emit(memory, hidden, step, model)
        pause = out.ids == PAUSE
        return memory, dataclasses.replace(
            out, ids=jnp.where(pause, NOTHING, out.ids), pause=pause, stop=out.stop & ~pause
        )


@pytest.fixture(scope="module")
def loop():
    llm = llama.Llama(llama.SIZES["tiny"], rngs=nnx.Rngs(0))
    nnx.update(llm, jax.tree.map(lambda x: x * 8, nnx.state(llm, nnx.Param)))
    return Loop(*take_over(llm))


def prompts(loop, *lengths):
    rng = np.random.default_rng(0)
    return [loop.embed(rng.integers(10, 320, n)) for n in lengths]


def test_a_paused_row_continues_after_what_is_appended(loop):
    """It emits what it would with one long prompt; the other row does not notice."""
    policy, plain = Pausing(), TextPolicy()
    a, b, image = prompts(loop, 6, 9, 4)
    forced = np.full((2, 10), -1)
    forced[0, 2] = PAUSE
    state = loop.prefill([a, b], 10, policy, forced_ids=forced, slots=64)
    state = loop.advance(state, policy)
    paused, done, count = loop.read(state.paused, state.done, state.count)
    assert paused.tolist() == [True, False] and done.tolist() == [False, True]
    assert count.tolist() == [2, 10]
    (first, other) = loop.results(state, policy)
    # The second place of the record is free again: what is forced there must go.
    state = dataclasses.replace(state, forced=state.forced.at[0, 2].set(-1))
    state = loop.extend(state, [image], [0], policy)
    state = loop.advance(state, policy)
    (whole, same) = loop.results(state, policy)
    np.testing.assert_array_equal(same.record, other.record)
    np.testing.assert_array_equal(whole.record[:2], first.record)
    assert len(whole.record) == 10
    (alone,) = loop([b], 10, plain)
    np.testing.assert_array_equal(other.record, alone.record)
    long = np.concatenate([a, loop.embed(first.record), image])
    (expected,) = loop([long], 8, plain)
    np.testing.assert_array_equal(whole.record[2:], expected.record)


def test_a_next_turn_reads_all_that_came_before(loop):
    policy = TextPolicy()
    a, b, question = prompts(loop, 5, 8, 3)
    state = loop.advance(loop.prefill([a, b], 6, policy, slots=64), policy)
    before = loop.results(state, policy)
    state = loop.extend(state, [question], [1], policy, max_new_tokens=4)
    state = loop.advance(state, policy)
    (kept, turn) = loop.results(state, policy)
    np.testing.assert_array_equal(kept.record, before[0].record)
    (expected,) = loop([np.concatenate([b, loop.embed(before[1].record), question])], 4, policy)
    np.testing.assert_array_equal(turn.record, expected.record)


def test_what_does_not_fit_is_said(loop):
    policy = TextPolicy()
    (a, long) = prompts(loop, 5, 60)
    state = loop.prefill([a], 8, policy, slots=64)
    with pytest.raises(ValueError, match="don't fit the cache, which has 64 slots"):
        loop.extend(state, [long], [0], policy)
    with pytest.raises(ValueError, match="8 places, not 9"):
        loop.extend(state, [a], [0], policy, max_new_tokens=9)
    with pytest.raises(ValueError, match="nothing to append to row 0"):
        loop.extend(state, [a[:0]], [0], policy)
    with pytest.raises(ValueError, match="20 positions don't fit 16 slots"):
        loop.prefill([a], 15, policy, slots=16)


def test_minimum_length_and_penalty_are_those_of_hugging_face():
    torch = pytest.importorskip("torch", reason="needs the oracle extra")
    from transformers import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 12)).astype(np.float32)
    ids = np.array([[1, 5, 5, 2], [0, 3, 11, 4]])
    for count in (1, 3):
        theirs = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.7),
                MinNewTokensLengthLogitsProcessor(4 - count, 3, [2, 9], device="cpu"),
            ]
        )(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
        policy = TextPolicy(Sampler(), (2, 9), min_new_tokens=3, repetition_penalty=1.7)
        seen = policy.init(2, jnp.asarray(ids), 12)
        ours = policy.scores(jnp.asarray(logits), seen, jnp.array([count, count]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_bad_options():
    with pytest.raises(ValueError, match="min_new_tokens"):
        TextPolicy(min_new_tokens=-1)
    with pytest.raises(ValueError, match="repetition_penalty"):
        TextPolicy(repetition_penalty=0)


@pytest.mark.parametrize("policy", [TextPolicy(), TextPolicy(Sampler(0.7), (1,), 2, 1.1)])
def test_a_row_whose_logits_are_not_finite_ends_there(loop, policy):
    """The others go on as if it were not there."""
    good, bad = prompts(loop, 6, 9)
    (alone, _) = loop([good, bad], 5, policy)
    bad[3] = np.nan
    same, broken = loop([good, bad], 5, policy)
    np.testing.assert_array_equal(same.record, alone.record)
    assert broken.record.tolist() == [BROKEN] and not len(broken.ids) and not broken.segments
