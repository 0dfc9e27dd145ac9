"""MM-Interleaved, fine-tuned on boxes: where a sentence is in an image, and what is in a box.

    metamorph train --config=configs/mm_interleaved/grounding.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_PRETRAINING

(At smoke size without the second line.) Prompt: "{image}Provide the bounding box coordinate of the
region this sentence describes. {sentence} <box>", answered by "(x1,y1)(x2,y2)</box>" in thousandths
of the image's width and height, cut to three digits; and "{image}Describe the
<ref>region</ref><box>(x1,y1)(x2,y2)</box> in a phrase.", answered by the phrase. The latter wording
is ours. `tuning.py` says what is trained.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| 7b | 64 chips of 16 GB, or 8 GPUs of 80 GB | - |
| 13b | 64 chips of 32 GB, or 16 GPUs of 80 GB | RefCOCO val 89.9, testA 92.6, testB 86.5 (the |
| | | paper) |

Rows by `prepare` (`tuning.py`): `refcoco`, `refcoco+`, `refcocog`, and of `visual_genome` phrases
for boxes. Files in the reference's own forms are read as well: `regions` (questions about boxes)
and `grounded` (captions with boxes in them); add them by `--config.data.sources.grounded.path=FILE
--config.data.sources.grounded.root=DIR`. Images are stretched to squares; half of them are
mirrored, with their boxes and the words left and right, and those whose sentence has no direction
are cropped around the box (`tuning_sources.py`). `<ref>` and `<box>` are ordinary pieces of text.

Our choice, as none was published: 2e-5, cosine to 0 after 3 % of 10,000 steps, 256 boxes a step (64
rows of four). Shares follow the square root of a source's size. During training 500 sentences of
`refcoco` are looked for; `--config.evals={}` leaves that out. The large sizes have not been run to
the end with this code base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
tuning = load_module(pathlib.Path(__file__).with_name("tuning.py"))

TUNED = dict(
    steps=10000,
    batch_size=64,
    optim=tuning.reading(tuning.OPTIM),
    evals=tuning.tasks(2000, "refcoco"),
)
_DATA = dict(
    sources=dict(
        main=tuning.source("refcoco"),
        **{name: tuning.source(name) for name in ("refcoco+", "refcocog", "visual_genome")},
    ),
    images=4,
    length=512,
    order=dict(shares="sqrt_size"),
)
SIZES = {
    "smoke": (tuning.READING_SMOKE, tuning.size("smoke")),
    "7b": (TUNED, tuning.size("7b", **_DATA)),
    "13b": (TUNED, tuning.size("13b", **_DATA)),
}


def get_config(size: str = "13b") -> ConfigDict:
    return common.run("mm_interleaved", *common.pick(SIZES, size), stage="sft")
