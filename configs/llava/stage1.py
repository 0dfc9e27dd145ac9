"""LLaVA, stage 1: the connector learns to describe images to a frozen language model.

    metamorph train --config=configs/llava/stage1.py:SIZE --workdir=DIR

Trained: the connector alone. Each sample is an image and its caption (template `plain`: nothing is
asked). Images are cut to their centre, in stage 2 of 1.5 they are padded. Stage 2 (`stage2.py`)
starts from the workdir of this one. `sizes.py` says what each size is made of.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| quickstart | a laptop, 2 cores | 2 minutes; loss falls from 5 to about 2 |
| 7b, 13b | 64 chips of 16 GB, or 8 GPUs of 80 GB | LLaVA 1.5; 3.5 and 5.5 hours on 8 A100 |
| | | (the paper) |
| v1-7b, v1-13b | the same | LLaVA 1.0 |
| qwen3-8b | the same | - |

| | data | learning rate | samples a step |
|---|---|---|---|
| 1.5, qwen3-8b | LCS-558K: `blip_laion_cc_sbu_558k.json` and its images.zip | 1e-3 | 256 |
| 1.0 | CC3M-595K: `chat.json` and its images.zip | 2e-3 | 128 |

Cosine to 0 after 3 % of the steps, no weight decay, one epoch. Rows hold a fixed number of samples
(four or two, as captions are short), so that a batch of 64 rows is that of the paper. Both are read
from `data/llava/`; unzip images into the folder that the source's root names. These sizes have not
been run to the end with this code base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

LCS = dict(path="data/llava/blip_laion_cc_sbu_558k.json", root="data/llava/llava_pretrain/images")
CC3M = dict(path="data/llava/chat.json", root="data/llava/cc3m/images")

_PLAIN = dict(template="plain", length=2560, images=4)
V15 = dict(steps=2181, batch_size=64, optim=dict(learning_rate=1e-3))  # 558,128 samples once
V1 = dict(steps=4652, batch_size=64, optim=dict(learning_rate=2e-3))  # 595,375 samples once
SMALL = dict(
    initial_batches=8,  # the connector starts from the statistics of the features
    optim=dict(learning_rate=1e-3),
)
_SHORT = dict(template="plain", length=640, images=2)
SIZES = {
    "smoke": (
        dict(steps=4, batch_size=2, log_every=1, checkpoint_every=2, **SMALL),
        sizes.size("smoke", {}),
    ),
    "quickstart": (
        dict(steps=40, batch_size=1, checkpoint_every=50, **SMALL),
        sizes.size("quickstart", {}),
    ),
    "7b": (V15, sizes.size("7b", LCS, **_PLAIN)),
    "13b": (V15, sizes.size("13b", LCS, **_PLAIN)),
    "v1-7b": (V1, sizes.size("v1-7b", CC3M, **_SHORT)),
    "v1-13b": (V1, sizes.size("v1-13b", CC3M, **_SHORT)),
    "qwen3-8b": (V15, sizes.size("qwen3-8b", LCS, **_PLAIN)),
}
# The quick start's images are made to fit its tower.
CROP = dict(model=dict(image_mode="crop"))


def get_config(size: str = "quickstart") -> ConfigDict:
    mode = {} if size == "quickstart" else CROP
    return common.run("llava", *common.pick(SIZES, size), mode, stage="connector")
