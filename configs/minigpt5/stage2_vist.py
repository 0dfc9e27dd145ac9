"""MiniGPT-5, stage 2, on stories: the next text and the next image (multimodal learning).

    metamorph train --config=configs/minigpt5/stage2_vist.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_STAGE_1

(At smoke size without the second line; its data are not stories.) `stage2.py` says what is trained.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| 7b | 16 chips of 16 GB, or a GPU of 80 GB | VIST, images of all steps: CLIP-I 0.70 (the paper) |

A story of five steps has 13 samples: each step's image from its text, the next text and image, and
the next text from its image. Published settings: 48 samples a step (16 packed rows hold some 50; on
one GPU with `--config.accumulate=8`), 2e-5, 1000 steps of warm-up, linear to 0, decay 0.01, two
epochs of the 34,428 stories; validation every half epoch. Files: `docs/data.md`. Not run to the end
with this code base.

`metamorph sweep --config=configs/minigpt5/stage2_vist.py:7b --workdir=DIR
--config.model.weights=workdir:DIR_OF_STAGE_1` compares adapters, a prefix and a language model as
it is, and a run without stage 1.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

_FOLDER = "data/minigpt5/vist"
_VALIDATION = dict(path=f"{_FOLDER}/val_cleaned.json", kind="vist")
PUBLISHED = dict(
    steps=18_600,
    batch_size=16,
    seed=42,
    checkpoint_every=1000,
    optim=sizes.OPTIM,
    evals=dict(
        validation=dict(
            every=4650,
            batches=64,
            data=dict(sources=dict(main=_VALIDATION), images=dict(mirror=0.0)),
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
            data=dict(
                sizes.rows(length=768, images=10),
                sources=dict(main=dict(path=f"{_FOLDER}/train_cleaned.json", kind="vist")),
            ),
        ),
    ),
}


def get_config(size: str = "7b") -> ConfigDict:
    return common.run("minigpt5", *common.pick(SIZES, size), stage="mls")


sweep = sizes.adaptations
