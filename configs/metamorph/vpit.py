"""MetaMorph, stage 2: visual-predictive instruction tuning (VPiT).

    metamorph train --config=configs/metamorph/vpit.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_STAGE_1

(At smoke size without the second line: it needs no stage 1.)

Trained: the language model, connector and visual head, all at once, on questions about images and
requests for images. Losses: text, and minus the cosine to the next visual token. Features of one
tower are alike, so that a head which repeats their mean has a high cosine already: the log has that
value, `visual_cosine_floor`, beside `visual_loss`. `sizes.py` says what each size is made of.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| quickstart | a laptop, 2 cores | 12 minutes; most of easy-vqa's questions |
| 1b | 16 chips of 16 GB | - |
| 8b | 128 chips of 16 GB, or 64 GPUs of 80 GB | MMBench 75.2, COCO FID 11.8 (the paper) |
| 70b | 128 chips of 95 GB | - |
| qwen3-1.7b | as 1b | - |
| qwen3-8b | as 8b | - |

From `1b` on, sizes have the published settings: 6.93e-5 for 1536 samples, scaled by the square
root of the batch, warm-up 3 %, cosine to 0, no weight decay. Rows are packed, so that a batch of
256 rows of 4096 holds some 1536 samples. They have not been run to the end with this code base.
`metamorph sweep --config=configs/metamorph/vpit.py:SIZE --workdir=DIR` compares learning rates and
weights of the visual loss.
Adapters in place of the whole language model: `--config.model.lora.rank=16`, and
`--config.model.frozen_weights=nf4` for what is frozen then.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

PAPER = dict(
    steps=10460,  # 16.07 M samples once
    batch_size=256,
    optim=dict(learning_rate=6.93e-5, base_batch=1536, batch=1536.0),
)
QUICKSTART = dict(
    steps=400,
    batch_size=1,
    checkpoint_every=120,
    model=dict(
        visual_coef=4.0,
        visual_dropout=0.9,  # otherwise the request hardly matters once half an image is seen
    ),
    optim=dict(
        learning_rate=1.5e-4,
        schedule="wsd",  # the last skill, saying yes or no, comes while the learning rate falls
        b2=0.98,
        groups=dict(
            connector=dict(match=r"(connector|vision\.reducer)\..*", rate=7.0),
            head=dict(match=r"head\..*", rate=7.0),
            tokens=dict(match=r".*\.added", rate=7.0),
        ),
    ),
    # Questions of the test split, to watch only: nothing is stopped or chosen by their loss, so the
    # final score on that split stays a held-out one. Few batches, for less than 1 % of the time.
    evals=dict(
        heldout=dict(
            every=175,
            batches=3,
            # The cache has the training images; these few images go through the tower.
            data=dict(sources=dict(main=sizes.VQA_TEST), cache=dict(features="")),
        ),
    ),
)
SIZES = {
    "smoke": dict(
        steps=6,
        batch_size=2,
        log_every=1,
        checkpoint_every=2,
        optim=dict(learning_rate=1e-3),
        evals=dict(samples=dict(kind="samples", samples=2)),
    ),
    "quickstart": QUICKSTART,
    "1b": PAPER,
    "8b": PAPER,
    "70b": PAPER,
    "qwen3-1.7b": PAPER,
    "qwen3-8b": PAPER,
}


def get_config(size: str = "quickstart") -> ConfigDict:
    return common.run("metamorph", common.pick(sizes.SIZES, size), SIZES[size], stage="vpit")


def sweep(add):
    """Half, once and twice the learning rate, with two weights of the visual loss."""
    rate, coef = add.config.optim.learning_rate, add.config.model.visual_coef
    add.product({
        "optim.learning_rate": [rate / 2, rate, rate * 2],
        "model.visual_coef": [coef, coef * 2],
    })  # fmt: skip
