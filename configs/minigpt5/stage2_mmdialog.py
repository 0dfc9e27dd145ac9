"""MiniGPT-5, stage 2, on dialogues in which people show images (multimodal learning).

    metamorph train --config=configs/minigpt5/stage2_mmdialog.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_STAGE_1

(At smoke size without the second line; its data are not dialogues.) `stage2.py` says what is
trained.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| 7b | 16 chips of 16 GB, or a GPU of 80 GB | MMDialog: IS 19.6, MM-Relevance 0.67 (the paper) |

Every turn but the first is a sample, learnt from the last question and answer. Published settings:
48 samples a step (16 packed rows; on one GPU with `--config.accumulate=8`), 2e-5, 1000 steps of
warm-up, linear to 0, decay 0.01; validation every half epoch. The number of steps was not
published: 100,000 is ours. Files: `docs/data.md`. Not run to the end with this code base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

_FOLDER = "data/minigpt5/mmdialog"


def _source(split: str) -> dict:
    return dict(path=f"{_FOLDER}/{split}/conversations.json", kind="mmdialog")


PUBLISHED = dict(
    steps=100_000,
    batch_size=16,
    seed=42,
    checkpoint_every=2000,
    optim=sizes.OPTIM,
    evals=dict(
        validation=dict(
            every=25_000,
            batches=64,
            data=dict(sources=dict(main=_source("valid")), images=dict(mirror=0.0)),
        )
    ),
    keep_best="evals.validation.loss",
)
SIZES = {
    "smoke": (
        sizes.SMOKE_RUN,
        dict(model=sizes.stage2("smoke"), data=sizes.SMALL_DATA["smoke"]),
    ),
    "7b": (
        PUBLISHED,
        dict(
            model=sizes.stage2("7b"),
            data=dict(sizes.rows(length=768, images=4), sources=dict(main=_source("train"))),
        ),
    ),
}


def get_config(size: str = "7b") -> ConfigDict:
    return common.run("minigpt5", *common.pick(SIZES, size), stage="mls")


sweep = sizes.adaptations
