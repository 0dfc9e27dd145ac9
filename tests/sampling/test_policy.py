"""Where text ends that no id ends."""

import jax.numpy as jnp
import numpy as np

from metamorph_jax.sampling.policy import Step, StoppingPolicy, TextPolicy, stopping
from metamorph_jax.sampling.text import row_keys


class Says:
    """A model whose rows say what they are told."""

    def __init__(self, ids):
        self.ids = ids

    def logits(self, hidden):
        return jnp.eye(10)[:, jnp.array(self.ids)]

    def embed(self, ids):
        return jnp.zeros((len(ids), 2))


def emitted(policy, rows):
    """bool[n, B]: after which of its ids each row stops."""
    said = np.array(rows).T
    memory, stops = policy.init(len(rows), jnp.full((len(rows), 1), 3), 10), []
    for count, ids in enumerate(said):
        B = len(rows)
        step = Step(jnp.ones(B, bool), jnp.full(B, count), row_keys(jnp.arange(B)),
                    jnp.full(B, -1))  # fmt: skip
        memory, out = policy.emit(memory, jnp.zeros((2, B)), step, Says(ids))
        assert out.ids.tolist() == ids.tolist()
        stops.append(out.stop.tolist())
    return np.array(stops)


def test_a_row_ends_at_ids_one_after_another():
    """`4 5`, `8 1 1` and an eos id end a row; `5 4`, `4 6 5` or a 4 of the prompt don't."""
    rows = [[5, 1, 4, 5], [5, 4, 6, 5], [4, 4, 5, 9], [1, 7, 4, 6], [9, 8, 1, 1], [8, 1, 6, 1]]
    for penalty in (1.0, 1.5):
        policy = StoppingPolicy(eos=(7,), stops=((4, 5), (8, 1, 1)), repetition_penalty=penalty)
        stops = emitted(policy, rows)
        assert [np.flatnonzero(row).tolist() for row in stops.T] == [[3], [], [2], [1], [3], []]


def test_a_stop_of_one_id_is_an_end():
    text = TextPolicy(eos=(7,), min_new_tokens=2)
    assert stopping(text, ((5,),)) == TextPolicy(eos=(5, 7), min_new_tokens=2)
    assert stopping(text, ((5,), (1, 2))) == StoppingPolicy(
        eos=(5, 7), min_new_tokens=2, stops=((1, 2),)
    )
    assert stopping(text, ()) == text


def test_the_text_of_a_reply_leaves_the_stop_out():
    policy = StoppingPolicy(eos=(7,), stops=((6, 6, 6), (4, 5)))
    for record, text, ended in (
        ([1, 2, 4, 5], [1, 2], True),
        ([1, 4], [1, 4], False),
        ([4, 5], [], True),
    ):
        record = np.array(record, np.int32)
        got = policy.read(record, np.zeros((len(record), 0)), False)
        assert [part.ids.tolist() for part in got.segments] == ([text] if text else [])
        assert got.ended == ended and got.record.tolist() == record.tolist()
