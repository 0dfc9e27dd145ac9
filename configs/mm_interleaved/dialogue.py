"""MM-Interleaved, fine-tuned on dialogues about an image.

    metamorph train --config=configs/mm_interleaved/dialogue.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_PRETRAINING

(At smoke size without the second line.) A row is a dialogue, "{image} caption: {caption}. question:
{question}? answer: {answer}. question: …", of which all answers are learnt. In evaluation the 100
answers to the last question are ranked by their likelihood. `tuning.py` says what is trained.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| 7b | 64 chips of 16 GB, or 8 GPUs of 80 GB | - |
| 13b | 64 chips of 32 GB, or 16 GPUs of 80 GB | VisDial 1.0 val: NDCG 53.7 (the paper's model for |
| | | all tasks) |

Rows by `prepare` (`tuning.py`): `visdial`, 123,287 dialogues of ten rounds. Our choice, as none was
published: 2e-5, cosine to 0 after 3 % of 5000 steps, some 170 dialogues a step (64 rows of 1024),
seven epochs.

During training 500 dialogues of `visdial` are ranked; `--config.evals={}` leaves that out. The
reference leaves out the last round before the question (`visdial:legacy_history=true`). The large
sizes have not been run to the end with this code base.
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
    evals=tuning.tasks(1000, "visdial", protocol=""),
)
_DATA = dict(sources=dict(main=tuning.source("visdial")), images=4, length=1024)
SIZES = {
    "smoke": (tuning.READING_SMOKE, tuning.size("smoke")),
    "7b": (TUNED, tuning.size("7b", **_DATA)),
    "13b": (TUNED, tuning.size("13b", **_DATA)),
}


def get_config(size: str = "13b") -> ConfigDict:
    return common.run("mm_interleaved", *common.pick(SIZES, size), stage="sft")
