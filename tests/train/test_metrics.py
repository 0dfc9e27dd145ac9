import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax import chips
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import build
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipe import Shown
from metamorph_jax.recipes import metamorph
from metamorph_jax.sharding import make_mesh
from metamorph_jax.train import boards, loop, metrics
from metamorph_jax.train.metrics import Logger
from metamorph_jax.types import Batch, Images
from tests.train.test_loop import config


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
    for text in ("MFU 40.0%", "125 tok/s/chip", "  wait 25%", "2 s/step", "lr 0.01", "text 2"):
        assert text in said, said
    assert line["hbm_peak_gib"] == 12.345 and max(map(len, said.splitlines())) <= 100
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
    model = nnx.eval_shape(lambda: metamorph.create(cfg, build.rngs(0)))
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


def long_line(**more):
    """As a run of many sources and parts logs it: some 430 characters if all of it is printed."""
    line = {"loss": -12.3456, "text_loss": 1.23456, "visual_loss": -0.98765, "text_accuracy": 0.5}
    for source in ("cambrian", "obelics", "video", "vstar", "visual_cot", "draw"):
        line |= {f"text_loss/{source}": 1.23456, f"visual_loss/{source}": -0.98765}
    for part in ("llm", "connector", "head", "tokens"):
        line[f"grad_norm/{part}"] = 123.456
    line |= {
        "grad_norm": 123.4, "learning_rate": 3.74e-5, "seconds_per_step": 12.34, "mfu": 0.4321,
        "positions_per_second": 1e6, "images_per_second": 1234.5, "data_wait": 0.01,
        "seconds_left": 86399.0, "positions_per_second_per_chip": 7012.3, "hbm_peak_gib": 94.21,
        "checkpoint_seconds": 12.0, "goodput": 0.98, "goodput_restarts": 12.0,
        "data/cambrian/missing": 12.0,
    }  # fmt: skip
    return line | more


def test_a_line_fits_a_terminal_and_starts_with_what_matters():
    said = metrics.format_line(10460, 10460, long_line())
    assert len(said) <= 100
    start = "step 10460/10460  23:59:59 left  loss -12.35  text 1.235  visual -0.9877  lr 3.74e-05"
    assert said.startswith(start)
    assert metrics.format_line(1, 2, long_line(skipped_steps=3)).split("  ")[3] == "skipped_steps 3"


def test_evaluations_are_in_lines_that_fit_and_everything_is_in_metrics(tmp_path, capsys):
    logger = Logger(tmp_path, 8, tensorboard=False)
    values = {f"evals.heldout.{name}": 0.123456 for name in ("loss", "text_loss", "visual_loss")}
    values |= {f"evals.{name}.score": 0.5 for name in ("questions", "drawings", "captions")}
    values["evals.heldout.text_loss/cambrian"] = 1.0
    logger.evaluated(4, values, 1.0)
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and "cambrian" not in "".join(lines)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 4, **values}


SHOWN = [Shown("a <b>", {"answer": "<script>"}, {"drawn": np.full((4, 6, 3), 7, np.uint8)})]


def test_samples_are_on_tensorboard_and_in_the_workdir(tmp_path):
    logger = Logger(tmp_path, 8)
    logger.show(4, {"look": SHOWN})
    logger.close()
    board = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert b"look/0_drawn" in board and b"<script>" in board and b"\x89PNG" in board
    table = json.loads((tmp_path / "samples" / "look-00000004.json").read_text())
    (one,) = table["samples"]
    assert one["text"] == {"answer": "<script>"}
    pixels = np.asarray(Image.open(tmp_path / "samples" / one["images"]["drawn"]))
    assert (pixels == SHOWN[0].images["drawn"]).all()


def test_other_processes_write_nothing(tmp_path):
    logger = Logger(tmp_path, 8, active=False)
    logger.show(4, {"look": SHOWN})
    logger.close()
    assert not list(tmp_path.iterdir())


# ---- Weights & Biases, with a module in its place


class StandIn(SimpleNamespace):
    """What of the package wandb a run uses."""

    def __init__(self, key="key"):
        super().__init__(api=SimpleNamespace(api_key=key), runs=[], logged=[], finished=0)

    def Image(self, image, caption):
        return ("image", image.shape, caption)

    def init(self, **options):
        self.runs.append(options)
        return SimpleNamespace(
            id=options["id"] or "id-1", log=self.logged.append, finish=self._finish,
            define_metric=lambda name, step_metric: None,
        )  # fmt: skip

    def _finish(self):
        self.finished += 1


def test_wandb_gets_everything_and_resumes_its_run(tmp_path, clock, monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for first in (0, 2):
        logger = Logger(tmp_path, 8, first, 2, tensorboard=False, wandb="mine", config={"seed": 3})
        steps(logger, clock, (first + 1, first + 2))
        logger.show(first + 2, {"look": SHOWN})
        logger.close()
    assert [(r["project"], r["id"], r["resume"]) for r in stand_in.runs] == [
        ("mine", None, "allow"), ("mine", "id-1", "allow"),
    ]  # fmt: skip
    assert stand_in.runs[0]["config"] == {"seed": 3} and stand_in.finished == 2
    assert stand_in.logged[0]["step"] == 2 and stand_in.logged[0]["loss"] == 1.5
    assert stand_in.logged[1]["look/0 drawn"] == ("image", (4, 6, 3), "answer: <script>")


def test_wandb_is_off_by_default_and_says_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    Logger(tmp_path, 8, tensorboard=False).close()
    with pytest.raises(ConfigError, match=r"pip install 'metamorph-jax\[wandb\]'"):
        boards.require_wandb()
    monkeypatch.setitem(sys.modules, "wandb", StandIn(key=None))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match="wandb login"):
        boards.require_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert boards.require_wandb()


def test_a_run_without_wandb_stops_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    table = config(wandb="mine")
    with pytest.raises(ConfigError, match="wandb"):
        loop.train(table, tmp_path / "w")
    assert not (tmp_path / "w").exists()
