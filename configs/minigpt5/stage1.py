"""MiniGPT-5, stage 1: vokens learn to stand for captions (unimodal alignment).

    metamorph train --config=configs/minigpt5/stage1.py:SIZE --workdir=DIR

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

OPTIM = dict(
    learning_rate=2e-5,
    schedule="linear",
    warmup=1000,
    weight_decay=0.01,
    clip_norm=None,
    groups=dict(mapper=dict(match=r"mapper\..*", rate=10.0)),
)
SIZES = {
    "smoke": (
        dict(steps=4, batch_size=2, log_every=1, checkpoint_every=2,
             optim=dict(OPTIM, learning_rate=1e-3, warmup=1)),
        dict(model=dict(sizes.MODELS["smoke"], max_drawings=4), data=sizes.SMALL_DATA["smoke"]),
    ),
}  # fmt: skip


def get_config(size: str = "smoke") -> ConfigDict:
    return common.run("minigpt5", *common.pick(SIZES, size), stage="uas")
