"""What all config files use: `run` makes the config of a run from what differs from the defaults.

A config file is a Python file with `get_config(size)`:

    common = load_module(pathlib.Path(__file__).parents[1] / "common.py")  # metamorph_jax.config
    SIZES = {"small": dict(steps=10, batch_size=2), "large": dict(steps=1000, batch_size=64)}

    def get_config(size="small"):
        return common.run("metamorph", common.pick(SIZES, size), stage="vpit", optim=dict(b2=0.98))

`metamorph config --config=FILE:SIZE` lists every option that there is, with its value and meaning.
A function `sweep(add)` beside it lists the runs of a sweep (`metamorph_jax/sweep/grid.py`). Outside
of this folder, `metamorph_jax.train.config.run` does the same for a single table.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from metamorph_jax.errors import ConfigError
from metamorph_jax.train import config


def run(recipe: str, *tables: Mapping[str, Any], **differences) -> ConfigDict:
    """The config of a run, with every option.

    Args:
        recipe: its name, or a module that is one.
        tables: nested options that differ from the defaults; later ones win.
        differences: the same, and they win over all tables.

    Raises:
        ConfigError: an option does not exist, or a value is of the wrong type.
    """
    return config.run(recipe, **merged(*tables, differences))


def merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as one; where several have a value, that of the last one counts."""
    made: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
            made[key] = merged(made[key], value) if both else value
    return made


def pick(sizes: Mapping[str, Any], size: str) -> Any:
    """The entry of this size; ConfigError if there is none."""
    if size not in sizes:
        raise ConfigError(f"size {size!r} is none of {', '.join(sizes)}")
    return sizes[size]


def unet(channels: tuple[int, ...], context: int, **more) -> dict:
    """Options of a UNet with attention at all levels but the last."""
    n = len(channels) - 1
    return dict(
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * n + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * n,
        cross_attention_dim=context,
        use_linear_projection=True,
        **more,
    )
