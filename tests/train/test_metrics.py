import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import chips
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import metamorph
from metamorph_jax.sharding import make_mesh
from metamorph_jax.train import metrics
from metamorph_jax.train.metrics import Logger
from metamorph_jax.types import Batch, Images


def report(loss=1.0):
    return {
        "loss": loss, "sums": {"text": 6.0}, "counts": {"text": 3.0},
        "metrics": {"right": (1.0, 4.0)}, "grad_norm": 5.0, "norms": {"llm": 3.0, "head": 4.0},
        "rate": 0.01,
    }  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    return clock


def steps(logger, clock, numbers, seconds=2.0, wait=0.5):
    line = None
    for step in numbers:
        clock.now += seconds
        line = logger.step(step, report(step), {"positions": 1000, "images": 10}, wait)
    return line


def test_speed_leaves_out_start_saving_and_pauses(tmp_path, clock):
    logger = Logger(tmp_path, 8, every=4, tensorboard=False, devices=2)
    clock.now += 60  # compilation, with the first step
    logger.restart_clock()
    logger.step(1, report(1), {"positions": 1000, "images": 10}, 50.0)
    line = steps(logger, clock, (2, 3, 4))
    assert line["loss"] == 2.5 and line["text_loss"] == 2.0 and line["right"] == 0.25
    assert line["grad_norm/llm"] == 3.0 and line["grad_norm/head"] == 4.0
    assert line["seconds_per_step"] == 2.0 and line["data_wait"] == 0.25
    assert line["positions_per_second"] == 500 and line["positions_per_second_per_chip"] == 250
    assert line["images_per_second"] == 5 and line["seconds_left"] == 8
    clock.now += 30
    logger.saved(4, 30)
    clock.now += 7
    logger.pause(7)
    line = steps(logger, clock, (5, 6, 7, 8))
    assert line["seconds_per_step"] == 2.0 and line["checkpoint_seconds"] == 30
    logger.close()
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [4, 8]


def test_mfu_of_a_known_chip(tmp_path, clock, monkeypatch, capsys):
    """Four v5e chips that do 4 * 197e12 * 40 % of model FLOPs in a second."""
    monkeypatch.setattr(metrics.chips, "find", lambda kind: chips.CHIPS["v5e"])
    monkeypatch.setattr(metrics, "memory_peak", lambda: 12.345)
    logger = Logger(tmp_path, 4, every=2, tensorboard=False, devices=4)
    logger.flops_per_step = 2.0 * 4 * 197e12 * 0.4
    line = steps(logger, clock, (1, 2))
    assert line["mfu"] == pytest.approx(0.4)
    assert line["tflops_per_second_per_chip"] == pytest.approx(197 * 0.4)
    said = capsys.readouterr().out
    for text in (
        "MFU 40.0%",
        "125 tokens/s/chip",
        "HBM peak 12.35 GiB",
        "data wait 25%",
        "2 s/step",
    ):
        assert text in said, said
    # Half chips count as half: tpu7x shows each as two devices.
    monkeypatch.setattr(metrics.chips, "find", lambda kind: chips.CHIPS["tpu7x"])
    logger = Logger(tmp_path, 4, tensorboard=False, devices=8)
    assert logger.chips == 4 and logger.peak == 4 * 2307e12


def test_nothing_is_said_of_what_is_not_known(tmp_path, clock, capsys):
    logger = Logger(tmp_path, 2, every=1, tensorboard=False)
    line = steps(logger, clock, (1,))
    assert not {"mfu", "goodput", "tflops_per_second_per_chip"} & set(line)
    assert ("hbm_peak_gib" in line) == (metrics.memory_peak() is not None)
    assert "MFU" not in capsys.readouterr().out


def test_memory_peak_is_of_the_fullest_device(monkeypatch):
    made = [{"peak_bytes_in_use": 2**30}, {"peak_bytes_in_use": 3 * 2**30}, None]
    devices = [SimpleNamespace(memory_stats=lambda x=x: x) for x in made]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert metrics.memory_peak() == 3.0


def test_flops_are_those_of_a_plan():
    """6 per weight and position, and half of all pairs of the attention."""
    cfg = metamorph.Config(llm="tiny", vision=VisionConfig("none", feature_width=32))
    model = nnx.eval_shape(lambda: metamorph.create(cfg, nnx.Rngs(0)))
    llm = model.llm.cfg
    L, rows = 64, 6  # two rows are here, the whole batch has six
    zeros = np.zeros((2, L), np.int32)
    batch = Batch(
        tokens=zeros, positions=zeros, segments=zeros, text_targets=zeros, image_slots=zeros,
        visual_targets=zeros, sources=zeros,
        images=Images(np.zeros((2, 0), bool), np.zeros((2, 0), np.int32)),
    )  # fmt: skip
    names = [".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(model))]
    mesh = make_mesh(devices=jax.devices()[:1])
    found = metrics.flops_per_step(model, batch, rows, names, mesh)
    weights = sum(
        np.prod(v.shape) for p, v in nnx.to_flat_state(nnx.state(model.llm))
        if len(v.shape) > 1 and "embed_tokens" not in p and "norm" not in str(p)
    )  # fmt: skip
    if llm.tied:
        weights += llm.tokens * llm.width
    attention = 4 * llm.heads * llm.head_dim * llm.layers * L / 2
    assert found == pytest.approx(rows * L * (6 * weights + 3 * attention), rel=0.02)
