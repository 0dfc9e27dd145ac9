"""LLaVA 1.0 on ScienceQA, from the connector of stage 1.

    metamorph train --config=configs/llava/scienceqa.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_STAGE_1

(At smoke size without the second line: it needs no stage 1.) The stage 1 is `stage1.py:v1-13b` or
`v1-7b`; stage 2 is left out. Trained: connector and language model, 12 epochs, 2e-5, 128 samples a
step.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| v1-7b | 32 chips of 16 GB, or 8 GPUs of 80 GB | 89.84 (the paper) |
| v1-13b | the same | 90.92; with GPT-4 as judge 92.53 (the paper) |

Which number comes out depends on the files. The format's first part is what is asked, the second
what is answered: Q question, C context (the hint, or N/A), M options, L lecture, E solution, A
answer.

| number | trained on | asked and answered | of the test split |
|---|---|---|---|
| 90.9 (13b) | `llava_train_QCM-LEA.json`: these | `llava_test_QCM-LEA.json`: lecture | all 4,241 |
| | configs, after stage 1 | and solution, then "The answer is B." | |
| 89.8 (13b) | the same with the answer first | QCM-ALE | all |
| 85.8 (13b) | QCM-LEA, without stage 1 | QCM-LEA | all |
| 66.8 (7b), | LLaVA 1.5, which was not trained | `llava_test_CQM-A.json`: the | those with |
| 71.6 (13b) | on ScienceQA | letter of the option alone | an image |

Users report 86.5, 65 and 61 in place of 90.9. The table suggests why: a stage 1 that was left out
or not loaded gives about 86; a general LLaVA in place of one trained here 65 to 72; and a model
that is asked in the format that it was not trained for loses the replies that can't be read. A
reply counts only if it is a letter A to E, or begins with one, a full stop and a blank, or has "The
answer is X" exactly once with a character after the X; all else is wrong. In the reference's
converter the codes AL and AE have lecture and solution swapped.

The files are made from ScienceQA's own by `python -m metamorph_jax.recipes.llava.scienceqa
--folder=data/scienceqa --split=train --out=data/scienceqa/llava_train_QCM-LEA.json`.

Train: 12,726 questions, about half of them with an image, which stands in ID/image.png below
`main.root`. The tag `<image>` is at the end of a question, and the image stays there;
`--config.data.row.legacy_image_front=true` moves it to the front, as the reference does. `v1-7b`
and `v1-13b` have not been run to the end with this code base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

SCIENCEQA = dict(path="data/scienceqa/llava_train_QCM-LEA.json", root="data/scienceqa/images/train")
TRAINING = dict(
    steps=1193,  # 12 times 12,726 samples
    batch_size=32,
    optim=dict(learning_rate=2e-5),
    model=dict(image_mode="crop"),
)
_ROW = dict(length=2048, images=7)
SIZES = {
    "smoke": (
        dict(steps=4, batch_size=2, log_every=1, checkpoint_every=2),
        sizes.size("smoke", {}),
    ),
    "v1-7b": (TRAINING, sizes.size("v1-7b", SCIENCEQA, **_ROW)),
    "v1-13b": (TRAINING, sizes.size("v1-13b", SCIENCEQA, **_ROW)),
}


def get_config(size: str = "v1-13b") -> ConfigDict:
    return common.run("llava", *common.pick(SIZES, size), stage="instruct")
