"""Beam search against Hugging Face's, token for token, and what it refuses."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import cli
from metamorph_jax.convert.llama import config_from_hf, load_llama
from metamorph_jax.models.llm import llama
from metamorph_jax.sampling import beam, generate
from metamorph_jax.sampling.beam import Beams
from metamorph_jax.sampling.conversation import Conversation
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.policy import StoppingPolicy, TextPolicy
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.segments import BROKEN
from metamorph_jax.sampling.text import Sampler

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
MANY = (3, 17, 29, 41)  # end ids of which replies of all lengths hit one


@pytest.fixture(scope="module")
def pair():
    """(transformers' Llama, our loop over the same random weights)."""
    torch = pytest.importorskip("torch", reason="needs the oracle extra")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    llm = llama.Llama(config_from_hf(model.config.to_dict()), rngs=nnx.Rngs(0))
    load_llama(llm, {k: v.numpy() for k, v in model.state_dict().items()})
    return model, Loop(*take_over(llm))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    quick = jax.jit(beam._run, static_argnames=beam.STATIC, compiler_options=FAST)
    monkeypatch.setattr(beam, "_search", quick)


def theirs(model, prompts, budget: int, beams: Beams, policy: TextPolicy, stopping=None):
    """The ids of Hugging Face's best replies, with their ends and what pads them."""
    import torch

    L = max(map(len, prompts))
    ids = np.stack([np.pad(p, (L - len(p), 0)) for p in prompts])
    mask = np.stack([np.arange(L) >= L - len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long(), do_sample=False,
            num_beams=beams.count, length_penalty=beams.length_penalty, pad_token_id=59,
            early_stopping=beams.early_stopping, max_new_tokens=budget,
            eos_token_id=list(policy.eos) or None, repetition_penalty=policy.repetition_penalty,
            min_new_tokens=policy.min_new_tokens or None, stopping_criteria=stopping,
        )[:, L:].tolist()  # fmt: skip
    ends = [next((n + 1 for n, i in enumerate(row) if i in policy.eos), budget) for row in out]
    return [row[:n] for row, n in zip(out, ends, strict=True)]


def ours(loop, prompts, budget, beams, policy):
    embeds = [loop.embed(p) for p in prompts]
    return beam.search(loop, embeds, budget, policy, beams, prompts)


CASES = {
    "plain": (Beams(4), 16, MANY),
    "no end id": (Beams(3), 8, ()),
    "one end id": (Beams(2), 24, (17,)),
    "one token": (Beams(4), 1, MANY),
    "short wins": (Beams(4, -1.0), 16, MANY),
    "long wins": (Beams(4, 2.0), 16, MANY),
    "no penalty, never early": (Beams(4, 0.0, "never"), 16, MANY),
    "long wins, never early": (Beams(4, 2.0, "never"), 16, MANY),
    "at once": (Beams(4, 1.0, True), 16, MANY),
    "at once, long wins": (Beams(4, 2.0, True), 16, MANY),
}


def drawn_prompts(seed=1, lengths=(7, 3, 12, 5)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 59, n) for n in lengths]


@pytest.mark.parametrize("name", CASES)
def test_replies_are_those_of_hugging_face(pair, name):
    """Prompts of different lengths in one batch."""
    model, loop = pair
    beams, budget, eos = CASES[name]
    policy, prompts = TextPolicy(eos=eos), drawn_prompts()
    expected = theirs(model, prompts, budget, beams, policy)
    got = ours(loop, prompts, budget, beams, policy)
    assert [r.record.tolist() for r in got] == expected
    assert [r.ended for r in got] == [row[-1] in eos for row in expected]


@pytest.mark.parametrize("eos", [(), (17,)])
def test_a_beam_ends_with_its_stop(pair, eos):
    """As with a stopping criterion of Hugging Face's that looks at the last ids of each beam."""
    import torch

    model, loop = pair
    prompts = [np.arange(1, 6), np.arange(20, 32), np.arange(5, 9)]
    beams, budget = Beams(3), 14
    free = theirs(model, prompts, budget, beams, TextPolicy(eos=eos))
    stop = tuple(free[0][3:5])  # what the first reply has in its middle

    def criterion(ids, scores):
        return torch.tensor([tuple(row[-2:]) == stop for row in ids.tolist()])

    wanted = theirs(model, prompts, budget, beams, TextPolicy(eos=eos), [criterion])
    found = ours(loop, prompts, budget, beams, StoppingPolicy(eos=eos, stops=(stop,)))
    for row, reply in zip(wanted, found, strict=True):
        n = len(reply.record)
        assert reply.record.tolist() == row[:n] and {*row[n:]} <= {-1, 59}  # its padding
    assert any(tuple(r.record.tolist()[-2:]) == stop and r.ended for r in found)


def test_each_request_has_a_budget_of_its_own(pair):
    model, loop = pair
    prompts, budgets, policy = drawn_prompts(), [16, 1, 6, 11], TextPolicy(eos=MANY)
    got = ours(loop, prompts, budgets, Beams(4), policy)
    for prompt, budget, result in zip(prompts, budgets, got, strict=True):
        (alone,) = theirs(model, [prompt], budget, Beams(4), policy)
        assert result.record.tolist() == alone


def test_cases_differ(pair):
    """Beams and penalties matter on these prompts; else the tests above would show little."""
    _, loop = pair
    policy = TextPolicy(eos=MANY)
    one, *found = (
        tuple(tuple(r.record.tolist()) for r in ours(loop, drawn_prompts(), 16, beams, policy))
        for beams in (Beams(1), Beams(4), Beams(4, -1.0), Beams(4, 2.0, "never"))
    )
    assert len({one, *found}) == 4
    assert len({len(reply) for replies in found for reply in replies}) > 3
    greedy = loop([loop.embed(p) for p in drawn_prompts()], 16, policy)
    assert one == tuple(tuple(r.record.tolist()) for r in greedy)


def test_penalty_and_minimum_length(pair):
    model, loop = pair
    prompts = drawn_prompts(2, (6, 6, 6))  # Hugging Face counts ids of padding as seen
    policy = TextPolicy(eos=MANY, min_new_tokens=5, repetition_penalty=1.4)
    got = ours(loop, prompts, 12, Beams(4), policy)
    assert [r.record.tolist() for r in got] == theirs(model, prompts, 12, Beams(4), policy)
    assert all(len(r.record) > 5 for r in got)
    milder = ours(loop, prompts, 12, Beams(4), dataclasses.replace(policy, repetition_penalty=1.1))
    assert got[0].record.tolist() != milder[0].record.tolist()


def test_a_generator_with_beams(generator, image_files):
    """Requests in batches, one of them with an image, as the search by itself answers them."""
    writer = copy.copy(generator)
    writer.policy = lambda text: text
    asked = [Request("a", "Hello"), Request("b", "What?", (str(image_files / "a.png"),)),
             Request("c", "Who are you, and why?")]  # fmt: skip
    options = Options(6, batch_size=2, beams=3, length_penalty=0.5)
    seen = []
    replies = writer.generate(asked, options)
    (alone,) = writer.generate(asked[1:2], options, stream=lambda ids: seen.extend(ids.tolist()))
    policy = TextPolicy(eos=writer.prompts.eos)
    for request, reply in zip(asked, replies, strict=True):
        prompt = writer.prompt(request, 6)
        (whole,) = beam.search(writer.loop, [prompt.embeds], 6, policy, Beams(3, 0.5))
        ids = [i for part in reply.segments for i in part.ids]
        assert ids == [i for i in whole.record.tolist() if i not in policy.eos]
    assert alone == replies[1] and [i for i in seen if i not in policy.eos] == list(
        alone.segments[0].ids
    )


def test_what_beams_can_t_do_is_said(generator, monkeypatch, capsys):
    with pytest.raises(ValueError, match="draws images, and beam search writes text only"):
        generator.generate([Request("0", "Hello")], Options(6, beams=2))
    with pytest.raises(ValueError, match="without beams"):
        Conversation(generator, Options(beams=2))
    with pytest.raises(ValueError, match="temperature must be 0"):
        beam.check(TextPolicy(Sampler(0.5)))
    for wrong, why in (
        ({"beams": 0}, "beams must be at least 1"),
        ({"beams": 2, "temperature": 1.0}, "temperature must be 0"),
        ({"length_penalty": float("nan")}, "length_penalty must be finite"),
        ({"early_stopping": "soon"}, "True, False or 'never'"),
    ):
        with pytest.raises(ValueError, match=why):
            Options(**wrong)
    monkeypatch.setattr(generate, "load", lambda args: generator)
    words = ["generate", "--workdir", ".", "--prompt", "Hello", "--beams", "2"]
    assert cli.main(words) == 2
    assert "draws images" in capsys.readouterr().err
    assert cli.main([*words, "--temperature", "1"]) == 2
    assert "temperature must be 0" in capsys.readouterr().err


def test_beams_whose_logits_are_not_finite_end_there(pair):
    """Only those of that request; the other finds its reply."""
    _, loop = pair
    policy, beams = TextPolicy(eos=MANY), Beams(3)
    good, bad = loop.embed(np.arange(5, 9)), loop.embed(np.arange(9, 14))
    alone, _ = beam.search(loop, [good, bad], 6, policy, beams)
    bad[2] = np.nan
    same, broken = beam.search(loop, [good, bad], 6, policy, beams)
    np.testing.assert_array_equal(same.record, alone.record)
    assert broken.record.tolist() == [BROKEN]
