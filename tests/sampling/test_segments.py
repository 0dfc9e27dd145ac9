"""Records of the decoding loop and what they say; P = 2, `<` is 8, `>` is 9, eos 7."""

import numpy as np
import pytest

from metamorph_jax.sampling.segments import NOTHING, VISUAL, Text, VisualTokens, read_record

V, N = VISUAL, NOTHING


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([1, 2, 7, N, N], [[1, 2]]),
        ([1, 8, V, V, 9, 2, 7], [[1], 2, [2]]),
        ([8, V, V, 9, 8, V, V, 9], [2, 2]),
        ([8, V, V, 1], [2, [1]]),  # no end id: P tokens are an image
        ([1, 8, V, N], [[1], 1]),  # the budget ended inside
        ([8, 9, 1], [0, [1]]),  # under parity: ended before the first token
        ([8, V, 3, 4], [1, [3, 4]]),  # under parity: text once the count was exhausted
        ([7, N], []),
    ],
)
def test_read_record(record, said):
    record = np.array(record, np.int32)
    vectors = np.arange(len(record), dtype=np.float32)[:, None]
    real = record != N
    result = read_record(record[real], vectors[real], True, P=2, start=8, end=9, eos=(7,))
    found, seen = [], []
    for segment in result.segments:
        if isinstance(segment, Text):
            found.append(segment.ids.tolist())
        else:
            assert isinstance(segment, VisualTokens)
            assert segment.complete == (len(segment.features) == 2)
            found.append(len(segment.features))
            seen.append(segment.features)
    assert found == said and result.ended
    np.testing.assert_array_equal(result.ids, record[record >= 0])
    np.testing.assert_array_equal(result.record, record[record != N])
    np.testing.assert_array_equal(result.vectors[:, 0], np.flatnonzero(record == V))
    np.testing.assert_array_equal(np.concatenate([result.vectors[:0], *seen]), result.vectors)
