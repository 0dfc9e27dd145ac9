"""Plans that are kept in benchmarks/plans: two are compiled anew, all must meet their goals."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STORED = {f.stem: json.loads(f.read_text()) for f in (ROOT / "benchmarks/plans").glob("*.json")}


def run(*arguments):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "metamorph_jax", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def needs_compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is missing: pip install 'metamorph-jax[plan]'")


@pytest.mark.parametrize(
    ("name", "config", "topology"),
    [
        ("vpit-smoke-v5e-8", "configs/metamorph/vpit.py:smoke", "v5e-8"),
        ("decoder-smoke-v5e-4", "configs/metamorph/decoder.py:smoke", "v5e-4"),
    ],
)
def test_compiled_anew(name, config, topology):
    needs_compiler()
    if name not in STORED:
        pytest.skip(f"nothing to compare with: python benchmarks/plan.py --make {name}")
    kept = STORED[name]
    rows = f"--rows-per-device={kept['rows_per_device']:g}"
    done = run(f"--config={config}", f"--topology={topology}", rows, "--json=-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["devices"] == kept["devices"]
    assert found["parameters"] == kept["parameters"]
    assert found["model_flops"] == kept["model_flops"]
    assert found["argument_bytes"] == pytest.approx(kept["argument_bytes"], rel=0.05)
    same = all(metadata.version(p) == v for p, v in kept["versions"].items())
    # Another compiler may do it another way, but not a very different one.
    close = 0.02 if same else 0.5
    for key in ("peak_bytes", "total_wire_bytes"):
        assert found[key] == pytest.approx(kept[key], rel=close), key


def test_out_of_memory_says_what_to_do():
    needs_compiler()
    done = run(
        "--config=configs/metamorph/vpit.py:smoke", "--topology=v5e-4", "--rows-per-device=16",
        "--config.data.row.length=8192", "--config.data.row.independent_turns=True", "--json=-",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    why = found["out_of_memory"]
    assert not found["fits"] and why["needed_bytes"] > found["hbm_capacity_bytes"]
    assert any("config.model.remat=full" in text for text in why["advice"])
    assert any("accumulate" in text for text in why["advice"])


def test_decoding_reads_packed_weights_as_they_are():
    needs_compiler()
    smoke = "--config=configs/metamorph/vpit.py:smoke", "--topology=v5e:1x1", "--what=generate"
    kept = {}
    for weights in ("bfloat16", "int8"):
        done = run(*smoke, "--rows-per-device=2", "--length=64", f"--weights={weights}", "--json=-")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["what"], found["weights"], found["rows"]) == ("generate", weights, 2)
        assert found["total_wire_bytes"] == 0
        assert found["total_bytes"] >= found["loading_bytes"] > found["beside_bytes"] > 0
        kept[weights] = found["arguments_by_part"]["weights"]
    assert kept["int8"] < 0.9 * kept["bfloat16"]  # tables and connector stay


def test_wrong_topology_is_one_message():
    done = run("--config=configs/metamorph/vpit.py:smoke", "--topology=v5e-63")
    assert done.returncode == 2 and "known names are v5e-1" in done.stderr
    assert "Traceback" not in done.stderr


LEVERS = ("vpit-8b-v5e-64-", "decode-")  # what an option does; one of them doesn't fit
FULL = [n for n in STORED if "8b-" in n or "70b" in n or "sd15" in n or "llava" in n]


@pytest.mark.parametrize("name", [n for n in FULL if not n.startswith(LEVERS)])
def test_goals(name):
    plan = STORED[name]
    assert plan["fits"] and plan["free_share"] >= 0.1
    assert plan["mfu_bound"] >= (0.5 if "v6e" in name else 0.6)
    assert plan["loops_of_unknown_length"] == 0


def test_traffic_grows_little_from_64_to_256_chips():
    small, large = STORED.get("vpit-8b-v5e-64"), STORED.get("vpit-8b-v5e-256")
    if not (small and large):
        pytest.skip("python benchmarks/plan.py --make vpit-8b-v5e-64 vpit-8b-v5e-256")
    assert large["total_wire_bytes"] < 1.1 * small["total_wire_bytes"]
