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


def test_the_best_policy_and_batch_are_named(monkeypatch):
    """dots bounds MFU highest but takes too much memory with more than one row."""

    def plan(config, topology, name, rows, *rest, **options):
        policy = config.model.remat
        taken = {"none": 2, "dots": 0.5 * rows}.get(policy, 0.05 * rows)
        found = {"rows": 64 * rows, "hbm_capacity_bytes": 2**40, "fits": taken <= 1}
        if not found["fits"]:
            return found
        bound = {"dots": 0.96, "full": 0.76}.get(policy, 0.5)
        return found | {"remat": policy, "free_share": 1 - taken, "mfu_bound": bound,
                        "total_bytes": taken * 2**40}  # fmt: skip

    monkeypatch.setattr(command, "plan", plan)
    args = types.SimpleNamespace(config="x", what="train", length=1, free=0.1, weights="auto")
    found = command.search(args, ConfigDict({"model": {"remat": "full"}}), None)
    assert found["use"] == "--config.model.remat=dots --config.batch_size=64"
