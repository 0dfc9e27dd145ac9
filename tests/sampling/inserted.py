"""A small language model that looks at images, and rows of images and documents for it to read."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.models import build
from metamorph_jax.models.llm import llama
from metamorph_jax.models.llm.llama import Insert, Llama
from metamorph_jax.models.mmfs import LLMBlock, MMFSConfig
from metamorph_jax.nn import quantized
from metamorph_jax.sampling.llm_weights import take_over

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
fast = partial(jax.jit, compiler_options=FAST)
L, SIDES = 16, (4, 2)
# Per row: where its images start, and where its documents begin.
ROWS = (([2, 9], [0]), ([1, 6, 10], [0, 5]), ([], [0]), ([0, 4, 9], [7]))


def make_model(mesh=None, **options) -> Llama:
    """With random weights in every part."""
    cfg = dataclasses.replace(
        llama.SIZES["tiny"], layers=3, tied=False, added_tokens=2, head_bias=True, **options
    )
    block = MMFSConfig(64, 8, 64, 16, 2, 3, SIDES, 4, relative_rows=6)
    insert = Insert(2, LLMBlock, block)
    llm = nnx.eval_shape(lambda: Llama(cfg, rngs=build.rngs(0), insert=insert))
    rng = np.random.default_rng(0)

    def fill(variable):
        value = jnp.asarray(0.3 * rng.normal(size=variable.shape), jnp.float32)
        if mesh is not None:
            value = jax.device_put(value, sharding.variable_sharding(variable, mesh))
        return variable.replace(value)

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    nnx.update(llm, jax.tree.map(fill, nnx.state(llm), is_leaf=is_variable))
    return llm


def copy(llm: Llama) -> Llama:
    """Variables of its own over the same arrays."""
    graph, state = nnx.split(llm)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))


def rounded(llm: Llama, method: str) -> Llama:
    """With the kernels of its layers as decoding keeps them in few bits."""
    llm = copy(llm)
    for _, linear in quantized.linears(llm.layers):
        kernel = linear.kernel[...]
        packed = quantized.pack(kernel, method)
        linear.kernel.set_raw_value(quantized.unpack(packed, kernel.shape[-2]))
    return llm


def maps_of(row: int) -> tuple[np.ndarray, ...]:
    rng, n = np.random.default_rng(row), len(ROWS[row][0])
    return tuple(rng.normal(size=(n, s, s, 8)).astype(np.float32) for s in SIDES)


def embeds() -> np.ndarray:
    return np.random.default_rng(9).normal(size=(len(ROWS), L, 64)).astype(np.float32)


def visible(starts, documents, length: int, places: int) -> np.ndarray:
    """bool[L, places]: from its first position on, until a document begins."""
    shown = np.zeros((length, places), bool)
    for i, start in enumerate(starts):
        for t in range(start, length):
            if any(start <= begin <= t for begin in documents):
                break
            shown[t, i] = True
    return shown


def padded_maps(maps, places: int):
    return tuple(np.pad(x, [(0, places - len(x))] + [(0, 0)] * 3) for x in maps)


def whole_rows(llm: Llama) -> np.ndarray:
    """float[B, L, D]: the states of the forward pass of training."""
    maps = [padded_maps(maps_of(row), 3) for row in range(len(ROWS))]
    maps = tuple(np.stack(level) for level in zip(*maps, strict=True))
    shown = np.stack([visible(*row, L, 3) for row in ROWS])
    positions = np.tile(np.arange(L), (len(ROWS), 1))
    mask = np.tile(np.tri(L, dtype=bool), (len(ROWS), 1, 1))
    graph, state = nnx.split(llm)
    run = lambda state, *a: nnx.merge(graph, state)(*a)  # noqa: E731
    return np.asarray(fast(run)(state, embeds(), positions, mask, (maps, shown)))


def images_between(first: np.ndarray, last: np.ndarray):
    """Maps, start and end of each row's images that start there, as `CachedLLM.place` takes them;
    and where the first document begins between."""
    never, B = 2**31 - 1, len(ROWS)
    maps = tuple(np.zeros((B, 3, s, s, 8), np.float32) for s in SIDES)
    start, end = np.full((2, B, 3), never, np.int32)
    begin = np.full(B, never, np.int32)
    for b, (starts, documents) in enumerate(ROWS):
        chosen = [i for i, s in enumerate(starts) if first[b] <= s < last[b]]
        for j, i in enumerate(chosen):
            start[b, j] = starts[i]
            end[b, j] = min((d for d in documents if starts[i] <= d < last[b]), default=never)
            for to, x in zip(maps, maps_of(b), strict=True):
                to[b, j] = x[i]
        begin[b] = min((d for d in documents if first[b] <= d < last[b]), default=never)
    return maps, start, end, begin


def check_states(expected: np.ndarray, llm: Llama, weights: str, mesh=None, atol=1e-4) -> dict:
    """The weights that decoding keeps, after a check that prompts, then single positions, then
    blocks have the states of the whole rows."""
    model, kept = take_over(llm, weights, mesh)
    x, rows = embeds(), np.arange(len(ROWS))

    @fast
    def prompts(kept, x, length, images):
        placed = model.place(kept, *images[:3])
        return placed, *model.read_prompts(kept, x, length, L, placed)

    @fast
    def block(kept, keys, values, length, x, more, placed, images):
        placed = placed.before(images[3]).and_then(model.place(kept, *images[:3]))
        out = model.read_block(kept, keys, values, length, x, more, placed)
        whole = model.read_whole_block(kept, keys, values, length, x, more, placed)
        return placed, *out, whole

    token = fast(model.read_token)

    def same(hidden, length, rows=rows):
        for row in rows:
            found = np.asarray(hidden)[:, row]
            np.testing.assert_allclose(found, expected[row, length[row] - 1], atol=atol)

    length = np.array([5, 4, 3, 6])
    placed, keys, values, hidden = prompts(
        kept, x[:, :6], length, images_between(0 * length, length)
    )
    same(hidden, length)
    for _ in range(2):  # a document begins at a single position: the images are told so before
        placed = placed.before(images_between(length, length + 1)[3])
        keys, values, hidden = token(kept, keys, values, length, x[rows, length], placed)
        length = length + 1
        same(hidden, length)
    more = np.array([6, 7, 0, 5])
    new = np.stack([np.pad(x[b, n : n + k], [(0, 7 - k), (0, 0)])
                    for b, (n, k) in enumerate(zip(length, more, strict=True))])  # fmt: skip
    images = images_between(length, length + more)
    placed, keys, values, hidden, whole = block(
        kept, keys, values, length, new, more, placed, images
    )
    for b, k in enumerate(more):
        states = np.asarray(whole)[:k, :, b]
        np.testing.assert_allclose(states, expected[b, length[b] : length[b] + k], atol=atol)
    length = length + more
    same(hidden, length, rows[more > 0])
    keys, values, hidden = token(kept, keys, values, length, x[rows, length], placed)
    same(hidden, length + 1)
    return kept
