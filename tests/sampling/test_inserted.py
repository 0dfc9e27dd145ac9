"""Decoding with a model whose layers look at images, against the forward pass of training."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.sampling import beam, likelihood
from metamorph_jax.sampling.beam import Beams
from metamorph_jax.sampling.cached_llm import PlacedImages
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop, RowImages
from metamorph_jax.sampling.policy import TextPolicy
from tests.devices import virtual
from tests.sampling import inserted
from tests.sampling.inserted import ROWS
from tests.sampling.test_mesh import ROOT

ON_A_MESH = """
import jax
import numpy as np
from metamorph_jax import sharding
from tests.sampling.inserted import check_states, make_model, rounded, whole_rows

mesh = sharding.make_mesh({"tensor": 2, "data": 4})
expected, plain = (whole_rows(m) for m in (rounded(make_model(), "int8"), make_model()))
with jax.set_mesh(mesh):
    np.testing.assert_allclose(whole_rows(make_model(mesh)), plain, atol=1e-4)
    weights = check_states(expected, make_model(mesh), "int8", mesh)
value = weights["inserts"][0]["attn"]["value_proj"]["kernel"][...]
assert 2 * value.addressable_shards[0].data.size == value.size
print("same")
"""


@pytest.fixture(autouse=True)
def quickly_compiled():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_states_are_those_of_whole_rows():
    llm = inserted.make_model()
    expected = inserted.whole_rows(inserted.rounded(llm, "nf4"))
    inserted.check_states(expected, llm, "nf4")


def test_states_on_eight_devices():
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **virtual(8)}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], capture_output=True, text=True, env=env
    )
    assert "same" in done.stdout, done.stderr[-3000:]


# ---- the loop


def part(row: int, first: int, last: int) -> RowImages:
    """The images and documents of a row that begin in these columns."""
    starts, documents = ROWS[row]
    chosen = [i for i, s in enumerate(starts) if first <= s < last]
    maps = tuple(x[chosen] for x in inserted.maps_of(row))
    begins = [d - first for d in documents if first <= d < last]
    return RowImages(maps, [starts[i] - first for i in chosen], begins)


def replies(loop: Loop, rows, places: int = 4) -> list[list[int]]:
    """Ids after a prompt of 5 columns, three tokens, and a block that begins at column 8."""
    x, policy = inserted.embeds(), TextPolicy()
    state = loop.prefill(
        [x[row, :5] for row in rows], 7, policy, slots=40,
        images=[part(row, 0, 5) for row in rows], places=places,
    )  # fmt: skip
    state = loop.advance(state, policy, 2)
    longer = [i for i, row in enumerate(rows) if row != 2]
    state = loop.extend(
        state, [x[rows[i], 8:14] for i in longer], longer, policy,
        images=[part(rows[i], 8, 14) for i in longer],
    )  # fmt: skip
    return [result.record.tolist() for result in loop.results(loop.finish(state, policy), policy)]


class Whole:
    """What the forward pass of training says after a row and ids, each row alone."""

    def __init__(self, llm, length: int = 20):
        graph, self.state = nnx.split(inserted.copy(llm))
        self.length, holder = length, llm.embed_tokens
        self.table = np.concatenate([holder.embedding[...], holder.added[...]])

        @inserted.fast
        def log_p(state, read, maps, shown):
            llm = nnx.merge(graph, state)
            positions, mask = np.arange(length)[None], np.tri(length, dtype=bool)[None]
            logits = llm.logits(llm(read, positions, mask, (maps, shown)))
            return jax.nn.log_softmax(logits, -1)[0]

        self.log_p = log_p

    def after(self, row: int, columns: list, documents=None) -> np.ndarray:
        """float32[n, V] log probabilities after columns: embeddings, or ids."""
        starts, begins = ROWS[row]
        maps = tuple(level[None] for level in inserted.padded_maps(inserted.maps_of(row), 3))
        begins = begins if documents is None else documents
        shown = inserted.visible(starts, begins, self.length, 3)[None]
        read = np.zeros((1, self.length, 64), np.float32)
        for i, column in enumerate(columns):
            read[0, i] = self.table[column] if np.ndim(column) == 0 else column
        return np.asarray(self.log_p(self.state, read, maps, shown))[: len(columns)]

    def replies(self, row: int) -> list[int]:
        """As `replies`."""
        x, ids = inserted.embeds(), []
        columns, documents = [*x[row, :5]], [d for d in ROWS[row][1] if not 5 <= d < 8]
        while len(ids) < 7:
            if len(ids) == 3 and row != 2:
                columns += [*x[row, 8:14]]
            ids.append(int(np.argmax(self.after(row, columns, documents)[-1])))
            columns.append(ids[-1])
        return ids

    def beams(self, row: int, length: int, count: int) -> list[int]:
        """The likeliest two ids after so many columns, of the `count` likeliest first ones."""
        columns = [*inserted.embeds()[row, :length]]
        first, found = self.after(row, columns)[-1], []
        for id in np.argsort(-first)[:count]:
            second = self.after(row, [*columns, int(id)])[-1]
            found.append((first[id] + second.max(), [int(id), int(np.argmax(second))]))
        return max(found)[1]


def test_replies():
    """Greedy replies, beams and likelihoods of a batch, as the forward pass of training has them
    for each row alone."""
    llm, x, rows = inserted.make_model(), inserted.embeds(), list(range(len(ROWS)))
    whole, loop = Whole(llm), Loop(*take_over(llm))
    found = replies(loop, rows)
    assert found == [whole.replies(row) for row in rows]
    assert len({tuple(ids) for ids in found}) == len(rows)

    lengths = (12, 11, 7, 10)
    prompts = [x[row, :n] for row, n in enumerate(lengths)]
    images = [part(row, 0, n) for row, n in enumerate(lengths)]
    found = beam.search(loop, prompts, 2, TextPolicy(), Beams(2), images=images)
    expected = [whole.beams(row, n, 2) for row, n in enumerate(lengths)]
    assert [result.record.tolist() for result in found] == expected

    block = likelihood.Block(np.array([7, 300, 21]), np.array([True, False, True]))
    found = likelihood.of_batch(loop, prompts, [[block]] * len(rows), images)
    for row, n in enumerate(lengths):
        log_p = whole.after(row, [*x[row, :n], 7, 300])
        expected = log_p[n - 1, 7] + log_p[n + 1, 21]
        np.testing.assert_allclose(found[row][0].total, expected, atol=1e-3)


def test_the_oldest_images_make_room():
    never = 2**31 - 1

    def placed(*starts):
        starts = jnp.array([starts])
        return PlacedImages((10 * starts[:, :, None],), starts, starts + 100)

    one = placed(1, never, never).and_then(placed(4, never))
    full = placed(1, 2, never).and_then(placed(5, never)).and_then(placed(7, 8))
    np.testing.assert_array_equal(one.start, [[1, 4, never]])
    np.testing.assert_array_equal(full.start, [[5, 7, 8]])
    np.testing.assert_array_equal(full.end, [[105, 107, 108]])
    np.testing.assert_array_equal(full.values[0][0, :, 0], [50, 70, 80])


def test_images_need_a_place_and_a_model_that_looks():
    model, weights = take_over(inserted.make_model())
    loop, policy, x = Loop(model, weights), TextPolicy(), inserted.embeds()
    state = loop.prefill([x[0, :5]], 4, policy, slots=40)
    with pytest.raises(ValueError, match="2 images don't fit the 0 places"):
        loop.extend(state, [x[0, 5:9]], [0], policy, images=[RowImages((), [1, 2])])
