"""MetaMorph, stage 1: the connector learns to speak to a frozen language model.

    metamorph train --config=configs/metamorph/connector.py:SIZE --workdir=DIR

Trained: the connector and the rows of the two new tokens. Loss: text only. Stage 2 (`vpit.py`)
starts from the workdir of this one. `sizes.py` says what each size is made of.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| quickstart | a laptop, 2 cores | 2 minutes; loss of answers falls to about 1 |
| 1b | 8 chips of 16 GB | - |
| 8b | 64 chips of 16 GB, or 8 GPUs of 80 GB | the paper's setting |
| 70b | 128 chips of 95 GB | - |
| qwen3-1.7b | as 1b | - |
| qwen3-8b | as 8b | - |

From `1b` on, sizes have the published settings: 3.74e-5 for 448 samples, scaled by the square root
of the batch, warm-up 3 %, cosine to 0, no weight decay. Rows are packed, so that a batch of 96 rows
of 4096 holds some 448 samples. They have not been run to the end with this code base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

PAPER = dict(
    steps=2000,
    batch_size=96,
    optim=dict(learning_rate=3.74e-5, base_batch=448, batch=448.0),
)
SMALL = dict(
    initial_batches=8,  # the connector starts from the statistics of the features
    optim=dict(learning_rate=1e-3),
)
SIZES = {
    "smoke": dict(steps=4, batch_size=2, log_every=1, checkpoint_every=2, **SMALL),
    "quickstart": dict(steps=40, batch_size=1, checkpoint_every=50, **SMALL),
    "1b": PAPER,
    "8b": PAPER,
    "70b": PAPER,
    "qwen3-1.7b": PAPER,
    "qwen3-8b": PAPER,
}


def get_config(size: str = "quickstart") -> ConfigDict:
    return common.run(
        "metamorph",
        common.pick(sizes.SIZES, size),
        SIZES[size],
        stage="connector",
        model=dict(visual_coef=0.0),  # text loss only: the head has not learnt anything yet
    )
