"""MM-Interleaved, fine-tuned to draw images from segmentation maps.

    metamorph train --config=configs/mm_interleaved/segment_to_image.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_PRETRAINING

(At smoke size without the second line.) A row is "{map in colours}{caption}.{image}"; only the
second image is drawn, so that all of the loss is that of images. The map reaches the UNet through
MMFS, where it is the image before. `tuning.py` says what is trained.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| 7b | 64 chips of 16 GB, or 8 GPUs of 80 GB | - |
| 13b | 64 chips of 32 GB, or 16 GPUs of 80 GB | no number of the paper is known to us |

Rows by `prepare` (`tuning.py`): `ade20k`, 20,210 scenes with captions; it paints the label maps,
too. Half of the scenes are mirrored, map and image alike (the reference mirrors the map upside
down, and the image not at all). Our choice, as none was published: 1e-5 for all parts, cosine to 0
after 3 % of 5000 steps, 128 scenes a step (64 rows of two).

`metamorph eval --tasks=ade20k:protocol=mm-interleaved` draws the validation scenes, for mIoU and
FID at 64 pixels. During training `samples/` in the workdir shows a few drawings. The large sizes
have not been run to the end with this code base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
tuning = load_module(pathlib.Path(__file__).with_name("tuning.py"))

TUNED = dict(
    steps=5000,
    batch_size=64,
    optim=common.merged(
        tuning.OPTIM, dict(learning_rate=1e-5, groups=dict(unet=dict(rate=1.0)))
    ),
    evals=dict(samples=dict(kind="samples", every=1000)),
)  # fmt: skip
_DATA = dict(sources=dict(main=tuning.source("ade20k")), images=4, drawings=2, length=384)
SIZES = {
    "smoke": (
        dict(tuning.SMOKE, evals=dict(samples=dict(kind="samples", samples=2))),
        tuning.size("smoke", drawings=4),
    ),
    "7b": (TUNED, tuning.size("7b", **_DATA)),
    "13b": (TUNED, tuning.size("13b", **_DATA)),
}


def get_config(size: str = "13b") -> ConfigDict:
    return common.run("mm_interleaved", *common.pick(SIZES, size), stage="sft")
