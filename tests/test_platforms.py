import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from metamorph_jax import platforms

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """libtpu is installed, and there is no accelerator: (environment, folder of the devices)."""
    env = {"PATH": "x"}
    monkeypatch.setattr(platforms.os, "environ", env)
    monkeypatch.setattr(platforms, "_TPU", (f"{tmp_path}/accel*",))
    monkeypatch.setattr(platforms, "_GPU", (f"{tmp_path}/nvidia*",))
    monkeypatch.setattr(
        platforms.importlib.util, "find_spec", lambda name: name == "libtpu" or None
    )
    monkeypatch.delitem(platforms.sys.modules, "jax", raising=False)
    return env, tmp_path


def test_cpu_where_no_accelerator_is(bare):
    platforms.leave_tpu_out()
    assert bare[0]["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", ["accel0", "nvidia0"])
def test_an_accelerator_is_left_to_jax(name, bare):
    (bare[1] / name).touch()
    platforms.leave_tpu_out()
    assert "JAX_PLATFORMS" not in bare[0]


@pytest.mark.parametrize("value", ["", "cuda,cpu"])
def test_who_chose_a_platform_keeps_it(value, bare):
    bare[0]["JAX_PLATFORMS"] = value
    platforms.leave_tpu_out()
    assert bare[0]["JAX_PLATFORMS"] == value


def test_without_libtpu_nothing_changes(bare, monkeypatch):
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: None)
    platforms.leave_tpu_out()
    assert "JAX_PLATFORMS" not in bare[0]


@pytest.mark.parametrize("before", ["", "--xla_dump_to=x"])
def test_compiler_option_of_the_cpu(before, bare):
    bare[0]["XLA_FLAGS"] = before
    option = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    for _ in range(2):  # the second call finds it in place
        platforms.tune_cpu()
        assert bare[0]["XLA_FLAGS"] == f"{before} {option}".strip()


def test_who_chose_the_option_keeps_it(bare):
    bare[0]["XLA_FLAGS"] = "--xla_cpu_experimental_ynn_fusion_type="
    platforms.tune_cpu()
    assert bare[0]["XLA_FLAGS"] == "--xla_cpu_experimental_ynn_fusion_type="


@pytest.mark.parametrize("version", ["0.13.1", "1.0.0"])
def test_an_unknown_jaxlib_gets_no_options(version, bare, monkeypatch):
    monkeypatch.setattr(platforms.importlib.metadata, "version", lambda name: version)
    platforms.tune_cpu()
    assert "XLA_FLAGS" not in bare[0]


def test_with_an_accelerator_no_options(bare):
    (bare[1] / "accel0").touch()
    platforms.tune_cpu()
    assert "XLA_FLAGS" not in bare[0]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None
    or any(map(platforms.glob.glob, platforms._TPU + platforms._GPU)),
    reason="needs libtpu (pip install 'metamorph-jax[plan]') and a machine without accelerators",
)
@pytest.mark.parametrize("first", ["import jax", "import sys"])
def test_a_backend_starts_without_a_word(first):
    """Whether JAX was imported before or not."""
    code = (
        f"{first}\nfrom metamorph_jax import platforms\nplatforms.prepare()\n"
        "import jax\nprint(jax.default_backend())"
    )
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("cpu\n", "")
