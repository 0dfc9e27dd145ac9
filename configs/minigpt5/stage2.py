"""MiniGPT-5, stage 2, on conversations of your own (multimodal learning).

    metamorph train --config=configs/minigpt5/stage2.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_STAGE_1

(At smoke size without the second line.) Images of questions are read, images of answers are drawn,
any number of them (`docs/data.md`). Trained: adapters in the language model, the rows of the vokens
and the mapper's transformer, all with one learning rate. Losses: 0.01 of the text's, and the error
of the predicted noise.

| size | data | hardware | expect |
|---|---|---|---|
| smoke | eight images of shapes | anything | a minute; runs through |
| quickstart | that of the quick start | a laptop, 2 cores | - |
| 7b | data/train.jsonl | 16 chips of 16 GB, or a GPU of 80 GB | - |

`7b` has the settings of `stage2_vist.py`, for 20,000 steps. Not run to the end with this code base.
`metamorph sweep --config=configs/minigpt5/stage2.py:SIZE --workdir=DIR` compares adapters, a prefix
and a language model as it is, and a run without stage 1.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

PUBLISHED = dict(steps=20_000, batch_size=16, seed=42, checkpoint_every=1000, optim=sizes.OPTIM)
SIZES = {
    "smoke": (
        sizes.SMOKE_RUN,
        dict(model=sizes.stage2("smoke"), data=sizes.SMALL_DATA["smoke"]),
    ),
    "quickstart": (
        dict(
            steps=400,
            batch_size=1,
            checkpoint_every=100,
            optim=dict(learning_rate=1e-3, warmup=0.05, b2=0.99, ema_decay=0.99),
        ),
        dict(model=sizes.stage2("quickstart", train_fc=True), data=sizes.MIXED_DATA),
    ),
    "7b": (
        PUBLISHED,
        dict(
            model=sizes.stage2("7b"),
            data=dict(
                sizes.rows(length=1024, images=8), sources=dict(main=dict(path="data/train.jsonl"))
            ),
        ),
    ),
}


def get_config(size: str = "quickstart") -> ConfigDict:
    return common.run("minigpt5", *common.pick(SIZES, size), stage="mls")


sweep = sizes.adaptations
