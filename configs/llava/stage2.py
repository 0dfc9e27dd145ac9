"""LLaVA, stage 2: visual instruction tuning.

    metamorph train --config=configs/llava/stage2.py:SIZE --workdir=DIR
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

SIZES = {
    "smoke": dict(
        steps=6, batch_size=2, log_every=1, checkpoint_every=2, optim=dict(learning_rate=1e-3)
    )
}


def get_config(size: str = "smoke") -> ConfigDict:
    return common.run("llava", common.pick(sizes.SIZES, size), SIZES[size], stage="instruct")
