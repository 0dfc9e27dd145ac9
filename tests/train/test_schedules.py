"""Learning-rate multipliers of the diffusion visualiser."""

import numpy as np
import pytest

from metamorph_jax.train.schedules import lr_finetune, lr_scratch


@pytest.mark.golden
@pytest.mark.parametrize(
    "name, steps, function",
    [("lr_finetune", "lr_steps", lr_finetune), ("lr_scratch", "lr_scratch_steps", lr_scratch)],
)
def test_golden(golden_root, name, steps, function):
    data = np.load(golden_root / "metamorph" / "visualizer.npz")
    np.testing.assert_allclose(function(data[steps]), data[name], rtol=1e-5, atol=1e-6)


def test_length_is_an_argument():
    assert lr_finetune(10, warmup=10, total=20) == 1
    assert lr_finetune(20, warmup=10, total=20) == 0 == lr_finetune(99, warmup=10, total=20)
