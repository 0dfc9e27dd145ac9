"""Runs on 1, 2 and 4 real processes: the same batches, losses and parameters; checkpoints that any
number of processes goes on from; and what happens when one of them ends or vanishes."""

import json
import pathlib
import shutil
import signal
import sys

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from metamorph_jax import distributed  # noqa: E402
from metamorph_jax.convert import specs  # noqa: E402
from metamorph_jax.train.checkpoint import Checkpoints, read_export  # noqa: E402
from tests.train import forked  # noqa: E402

pytestmark = pytest.mark.e2e


def toy(**changes):
    base = dict(
        recipe="tests.train.toy", stage="all", steps=6, batch_size=8, data_shards=4,
        model={"noise": 0.1}, data={}, initial_batches=2, log_every=1, checkpoint_every=2,
        optim={"learning_rate": 0.02, "warmup": 2, "schedule": "constant"},
        tensorboard=False,
        compilation_cache="",
    )  # fmt: skip
    return base | changes


def write_pictures(folder):
    """24 records, of which four can't be used: a host alone has to skip what the others skip."""
    r = np.random.default_rng(0)
    lines = []
    for i in range(24):
        Image.fromarray(r.integers(0, 256, (12, 16, 3), np.uint8)).save(folder / f"{i}.png")
        answer = "<image>" if i % 2 else "noise " * (1 + i % 5)
        turns = [{"from": "human", "value": "<image>\nwhat?" if not i % 2 else "draw it"},
                 {"from": "gpt", "value": answer}]  # fmt: skip
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "conversations": turns}))
    for i in (3, 4, 11):
        (folder / f"{i}.png").write_bytes(b"no picture")
    (folder / "16.png").unlink()
    (folder / "data.jsonl").write_text("\n".join(lines))
    return str(folder / "data.jsonl")


def pictures(path, golden_root, **changes):
    tokenizer = str(golden_root / "metamorph" / "tokenizer.json")
    vocab = specs.tokenizer(tokenizer).convert_tokens_to_ids("<image_start>")
    model = {"llm": "tiny", "vision": {"tower": "siglip-tiny", "tokens": 4}, "text_chunk": 16,
             "tokenizer": tokenizer, "llm_options": {"vocab_size": vocab}}  # fmt: skip
    data = {"sources": [{"path": path, "name": "pairs"}], "row": {"length": 96, "images": 3}}
    return dict(
        recipe="tests.distributed.tiny", stage="vpit", steps=3, batch_size=4, data_shards=4,
        model=model, data=data, initial_batches=1,
        # Without the large epsilon, rounding in gradients near 0 decides steps of full size.
        optim={"learning_rate": 0.01, "warmup": 0, "eps": 1e-3},
        log_every=1, checkpoint_every=100, tensorboard=False, compilation_cache="",
    ) | changes  # fmt: skip


def numbers(workdir):
    """Of every step, what doesn't depend on time."""
    timing = ("second", "wait", "estimate", "goodput", "hbm", "time", "chip", "mfu")
    rows = map(json.loads, (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not any(t in k for t in timing)} for row in rows]


def same_run(a, b, tolerance=1e-5):
    """Equal batches, losses and parameters."""
    for x, y in zip(numbers(a), numbers(b), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            close = 0 if name.startswith("seen") else tolerance
            assert x[name] == pytest.approx(y[name], rel=close, abs=close), (name, x["step"])
    one, two = read_export(a), read_export(b)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=tolerance, atol=tolerance)


def start(workdir, *steps):
    """One run after the other in the same workdir: (hosts, config)."""
    for hosts, cfg in steps:
        runs = [forked.Run(cfg, workdir)] if hosts == 1 else forked.together(hosts, cfg, workdir)
        forked.finish(runs)
        loud = [run for run in runs if "step " in run.said]
        assert loud == runs[:1], "the first host talks, and no other"
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return start(tmp_path_factory.mktemp("toy") / "one", (1, toy()))


def test_toy_on_two_and_from_two_to_four(whole, tmp_path):
    """2 hosts do 2 steps, 4 hosts go on from their checkpoint: as if one had done all six."""
    start(tmp_path / "w", (2, toy(steps=2)))
    shutil.rmtree(tmp_path / "w/final")
    start(tmp_path / "w", (4, toy()))
    same_run(whole, tmp_path / "w")


def test_checkpoint_of_four_read_by_one_and_back(whole, tmp_path):
    start(tmp_path / "w", (4, toy(steps=2)), (1, toy(steps=4)), (4, toy()))
    same_run(whole, tmp_path / "w")


def test_hosts_that_share_rows(whole, tmp_path):
    """Tensor parallel over two hosts: both need all rows."""
    start(tmp_path / "t", (2, toy(mesh={"tensor": 2})))
    same_run(whole, tmp_path / "t")


@pytest.mark.golden  # takes the small tokenizer from there
def test_metamorph_on_four(tmp_path, golden_root):
    path = write_pictures(tmp_path)
    runs = [
        start(tmp_path / f"n{n}", (n, pictures(path, golden_root, mesh=mesh)))
        for n, mesh in ((1, {"fsdp": -1}), (4, {"fsdp": 2, "data": 2}))
    ]
    assert len({row["seen_pixels"] for row in numbers(runs[0])}) == 3
    same_run(*runs)
    # Where each data_shard stands, and what it skipped, is the same whoever read it.
    states = [Checkpoints(run)._describe(3)[1]["data"] for run in runs]
    assert states[0] == states[1]
    assert sum(sum(data_shard["counts"].values()) for data_shard in states[0]) >= 3


def test_sigterm_on_one_host_stops_all(tmp_path):
    cfg = toy(data={"pause": 0.1}, checkpoint_every=1000, steps=1000)
    runs = forked.together(2, cfg, tmp_path / "w")
    runs[0].until(lambda: "step 1/1000" in runs[0].said)
    runs[1].signal(signal.SIGTERM)
    forked.finish(runs, 143)
    assert all("checkpoint saved" in run.said for run in runs)
    steps = numbers(tmp_path / "w")[-1]["step"] + 1
    for folder in ("w", "alone"):
        start(tmp_path / folder, (1, cfg | {"steps": steps}))
    same_run(tmp_path / "alone", tmp_path / "w")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="dies"),
        pytest.param(signal.SIGSTOP, id="falls silent", marks=pytest.mark.slow),
    ],
)
def test_a_host_vanishes(number, tmp_path):
    """The other ends by itself, soon, and says so."""
    cfg = toy(data={"pause": 0.05}, steps=2000, checkpoint_every=5)
    runs = forked.together(2, cfg, tmp_path / "w", "--heartbeat=10")
    runs[0].until(lambda: (tmp_path / "w/checkpoints/5").is_dir())
    runs[1].signal(number)
    try:
        code = runs[0].wait(300)
    finally:
        runs[1].kill()
    told = ("lost contact with another host", "Terminating process because the JAX distributed")
    assert code in (distributed.LOST_HOST, -signal.SIGABRT), runs[0].said
    assert any(text in runs[0].said for text in told), runs[0].said
    start(tmp_path / "w", (1, toy(data={"pause": 0.05}, steps=6, checkpoint_every=5)))


def test_says_what_to_check(tmp_path):
    flags = (f"--coordinator=localhost:{forked.free_port()}", "--processes=2", "--process=0")
    run = forked.Run(toy(), tmp_path / "w", *flags, "--hint-after=0.1", "--join-timeout=2")
    assert run.wait(300) == 2
    assert "1 of 2 hosts joined; missing: process 1. Check: was the same command" in run.said
