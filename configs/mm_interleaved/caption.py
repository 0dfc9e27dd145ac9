"""MM-Interleaved, fine-tuned to describe images in a sentence or a paragraph.

    metamorph train --config=configs/mm_interleaved/caption.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_PRETRAINING

(At smoke size without the second line.) Prompts: "{image}a photo of" and "{image}Please describe
the image in detail. The image depicts"; only the caption is learnt. `tuning.py` says what is
trained.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| 7b | 64 chips of 16 GB, or 8 GPUs of 80 GB | - |
| 13b | 64 chips of 32 GB, or 16 GPUs of 80 GB | CIDEr: COCO 140.5, Flickr30k 93.0, NoCaps 123.2, |
| | | Image2Paragraph 30.3 (the paper's model for all tasks) |

Rows by `prepare` (`tuning.py`): `coco_caption`, 113,287 images of the Karpathy split (train and
restval) with five captions each, and `image2paragraph`, 14,575 images. Flickr30k and NoCaps are for
evaluation. Our choice, as none was published: 2e-5, cosine to 0 after 3 % of 5000 steps, 256
captions a step (64 rows of four), some two epochs. Shares follow the square root of a source's
size.

During training 500 images of `coco_caption` are described as in the paper's protocol: 5 beams, 7 to
20 new tokens. `--config.evals={}` leaves that out. The large sizes have not been run to the end
with this code base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
tuning = load_module(pathlib.Path(__file__).with_name("tuning.py"))

TUNED = dict(
    steps=5000,
    batch_size=64,
    optim=tuning.reading(tuning.OPTIM),
    evals=tuning.tasks(1000, "coco_caption"),
)
_DATA = dict(
    sources=dict(main=tuning.source("coco_caption"), paragraphs=tuning.source("image2paragraph")),
    images=4,
    length=384,
    order=dict(shares="sqrt_size"),
)
SIZES = {
    "smoke": (tuning.READING_SMOKE, tuning.size("smoke")),
    "7b": (TUNED, tuning.size("7b", **_DATA)),
    "13b": (TUNED, tuning.size("13b", **_DATA)),
}


def get_config(size: str = "13b") -> ConfigDict:
    return common.run("mm_interleaved", *common.pick(SIZES, size), stage="sft")
