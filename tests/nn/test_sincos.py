"""Sin-cos tables and their resize, against the reference's arrays and torch's rule."""

import numpy as np
import pytest

from metamorph_jax.nn import sincos
from tests.recipes.mm_interleaved import golden


@pytest.mark.golden
def test_tables_and_their_resize_equal_the_reference(golden_root):
    case = golden.Case(golden_root, "pos_embed")
    size, dim = case.config, case.config["dim"]
    plain, classed = (sincos.table_2d(size["grid"], dim, extra=k) for k in (0, 1))
    found = {
        "out/sincos1d": sincos.table_1d(size["len"], dim),
        "out/sincos2d": plain,
        "out/sincos2d_cls": classed,
    }
    for side in size["targets"]:
        found[f"out/abs_pos_to_{side}x{side}"] = sincos.resize_table(plain, side)
        found[f"out/abs_pos_cls_to_{side}x{side}"] = sincos.resize_table(classed, side, extra=1)
    for name in {*found} & {*case.arrays}:
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], case[name], atol=1e-5, err_msg=name)
    case.check_all_read()


def test_aligned_corners_keep_the_corners_and_straight_lines():
    ramp = np.add.outer(np.arange(5.0), 2 * np.arange(5.0)).reshape(25, 1)
    same = sincos.resize_table(ramp, 9, weights=sincos.aligned_bicubic).reshape(9, 9)
    # Between the samples, away from the clamped border, a cubic through a straight line is one.
    wanted = np.add.outer(np.arange(9) / 2, np.arange(9.0))
    np.testing.assert_allclose(same[2:-2, 2:-2], wanted[2:-2, 2:-2], atol=1e-12)
    np.testing.assert_allclose(same[::2, ::2], wanted[::2, ::2], atol=1e-12)
    halves = sincos.resize_table(ramp, 9).reshape(9, 9)
    assert abs(halves[0, 0] - wanted[0, 0]) > 0.1


def test_what_cannot_be_a_table_is_named():
    with pytest.raises(ValueError, match="width 6"):
        sincos.table_2d(3, 6)
    with pytest.raises(ValueError, match="10 rows is not a square plus 2"):
        sincos.resize_table(np.zeros((10, 4)), 3, extra=2)
