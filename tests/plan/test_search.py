"""`metamorph plan --search` finds the largest batch that leaves enough memory, in few compiles."""

import types

import pytest
from ml_collections import ConfigDict

from metamorph_jax.plan import command


@pytest.mark.parametrize(
    ("share", "best", "compiled"),
    [
        pytest.param(lambda rows: 0.1 * rows, 8, 4, id="line"),
        pytest.param(lambda rows: 0.05 + 0.04 * rows, 21, 3, id="line with a start"),
        pytest.param(lambda rows: 0.2 + 0.01 * rows if rows < 9 else 2, 8, 10, id="a jump"),
        pytest.param(lambda rows: 0.5 * rows, 1, 2, id="two are too much"),
        pytest.param(lambda rows: 2 * rows, 1, 1, id="nothing fits"),
    ],
)
def test_largest_batch(share, best, compiled, monkeypatch):
    """share: rows -> part of the memory that they take; above 1 they don't fit."""

    def plan(config, topology, name, rows, *rest, **options):
        found = {"rows": rows, "hbm_capacity_bytes": 2**40, "fits": share(rows) <= 1}
        if found["fits"]:
            found |= {"free_share": 1 - share(rows), "mfu_bound": 0.5}
            found["total_bytes"] = share(rows) * 2**40
        return found

    monkeypatch.setattr(command, "plan", plan)
    args = types.SimpleNamespace(config="x", what="decode", length=1, free=0.1, weights="auto")
    found = command.search(args, ConfigDict({"model": {}}), None)
    assert found["rows"] == best
    assert len(found["search"]) == compiled
