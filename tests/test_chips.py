import pytest

from metamorph_jax import chips


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("h100", "h100"),
        ("cpu", None),
    ],
)
def test_device_kinds(kind, name):
    found = chips.find(kind)
    assert (found and found.name) == name


def test_units():
    """A wrong power of ten in a row of the table."""
    for name, chip in chips.CHIPS.items():
        assert chips.find(name) is chip
        assert 1e14 < chip.flops < 3e15 and 15 < chip.hbm_bytes / chips.GiB < 200
        assert 50 < chip.flops / chip.hbm_bandwidth < 600  # FLOPs a byte of HBM has to be worth
        assert 3 < chip.hbm_bandwidth / chip.ici_bandwidth < 15
    assert chips.CHIPS["tpu7x"].flops_per_device == 2307e12 / 2
