import os
import pathlib
import subprocess
import sys

import pytest

from metamorph_jax import cli

ROOT = pathlib.Path(__file__).parents[1]


def test_help_and_import_load_nothing_heavy():
    """No torch, TensorFlow or wandb, and no JAX backend."""
    code = (
        "import sys, metamorph_jax, metamorph_jax.cli as cli\n"
        "assert cli.main(['--help']) == 0\n"
        "heavy = {'torch', 'tensorflow', 'wandb', 'jax', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import metamorph_jax.config, metamorph_jax.types, metamorph_jax.sharding\n"
        "import metamorph_jax.train.loop, metamorph_jax.recipes.metamorph\n"
        "heavy = {'torch', 'tensorflow', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import jax._src.xla_bridge as bridge\n"
        "assert not bridge._backends, bridge._backends\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    for command in cli.COMMANDS:
        assert command in done.stdout


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "metamorph_jax", "trian"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "did you mean train?" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=no.py"], "no config file no.py"),
        (["--config.optim.learning_rat=1"], "did you mean config.optim.learning_rate?"),
        (["--config.steps=many"], "config.steps must be int, not 'many'"),
        (["--config.mesh.fsdp=7"], "config.mesh"),
    ],
)
def test_wrong_input_is_one_message(args, message, tmp_path, capsys):
    config = ROOT / "configs/metamorph/vpit.py"
    first = [] if args[0].startswith("--config=") else [f"--config={config}:smoke"]
    assert cli.main(["train", *first, f"--workdir={tmp_path}", *args]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_unknown_option(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--config=x", f"--workdir={tmp_path}", "--stpes=3"])
    assert "--stpes=3" in capsys.readouterr().err


def test_overrides():
    found, others = cli._take_overrides(
        ["--config.a.b=1", "x", "--config.c", "d=e", "-y", "--config.f", "-1", "--config.on", "--z"]
    )
    assert found == {"a.b": "1", "c": "d=e", "f": "-1", "on": "true"}
    assert others == ["x", "-y", "--z"]


def test_config_lists_every_option(capsys):
    config = ROOT / "configs/metamorph/vpit.py"
    args = ["config", f"--config={config}:smoke", "--config.optim.b2=0.5", "--config.log_every=7"]
    assert cli.main(args) == 0
    listed = capsys.readouterr().out
    for line in (
        "--config.log_every=7   (int)",
        "--config.optim.clip_norm=1.0   (float or None)",
        "# --config.model.lora.rank=16   (int)",
        "    optimizer steps of the whole run.",
    ):
        assert f"{line}\n" in listed, line
    assert cli.main([*args, "weight_decay"]) == 0
    assert len(listed) > 20 * len(capsys.readouterr().out)
    assert cli.main([*args, "--config.batch_size=0"]) == 2


def test_options_and_files_in_any_order():
    """The value of an override is not taken for a file."""
    words = ["--config.data.row.length", "64", "--show", "3", "a.json", "--config.tensorboard"]
    _, args = cli.parse(["data", "check", *words])
    assert args.paths == ["a.json"] and args.show == 3
    assert args.overrides == {"data.row.length": "64", "tensorboard": "true"}
