import math

import pytest

from metamorph_jax.errors import FileError, MissingFile
from metamorph_jax.train.metrics_file import read_metrics


def test_read_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3.0, "note": "x", "flag": true}\n'
        '{"step": 2, "loss": 2.0}\n'
        '{"step": 2, "loss": 1.5}\n'  # written again after a resume
        '{"step": 3, "loss": NaN}\n'
        '{"step": 4, "loss": "inf"}\n'
        '{"step": 5, "lo'
    )
    assert read_metrics(path) == {"loss": ([1, 2], [3.0, 1.5])}
    steps, values = read_metrics(path, finite=False)["loss"]
    assert steps == [1, 2, 3, 4] and math.isnan(values[2]) and values[3] == math.inf
    with pytest.raises(MissingFile):
        read_metrics(tmp_path / "none")


@pytest.mark.parametrize("line", ["not json", '{"loss": 9.0}', "[1]", '{"step": 1.5}', "{}", ""])
def test_only_the_last_line_may_be_incomplete(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n' + line + '\n{"step": 2, "loss": 2.0}\n')
    with pytest.raises(FileError, match="metrics.jsonl, line 2"):
        read_metrics(path)
