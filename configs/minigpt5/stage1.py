"""MiniGPT-5, stage 1: vokens learn to stand for captions (unimodal alignment).

    metamorph train --config=configs/minigpt5/stage1.py:SIZE --workdir=DIR

Trained: the rows of the vokens in both tables of the language model, and the mapper, with ten times
the learning rate. Losses: 0.01 of the text's, the error of the predicted noise (min-SNR weights up
to 5), and 0.1 of the distance between context and features of the caption. The log has `text_loss`,
`image_loss` and `caption_loss`; `docs/minigpt5.md` says which of them fall. `sizes.py` says what
each size is made of.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| quickstart | a laptop, 2 cores | half an hour; after 40 steps, losses 2.1 of text (5.3 at first) |
| | | and 0.7 of images (1.1); not run to the end yet |
| 7b | 16 chips of 16 GB, or a GPU of 80 GB | CC3M: CLIP-I 0.61, CLIP-T 0.22, FID 31.5 (the paper) |

`7b` has the published settings: 48 captions a step (here 16 rows of three; on one GPU with
`--config.accumulate=8`), AdamW with 2e-5, 1000 steps of warm-up, linear to 0, decay 0.01, two
epochs; the checkpoint with the lowest validation loss, looked at every quarter epoch, is kept
(`best.json`). 118,000 steps are two epochs of the 2.8 million images that can still be fetched, of
3.3. Data: `Train_GCC-training.tsv` with columns `caption` and `image_path` (`docs/data.md`). Not
run to the end with this code base.

`metamorph sweep --config=configs/minigpt5/stage1.py:SIZE --workdir=DIR --metric=image_loss` are the
ablations: without each of the losses, without classifier-free guidance, without min-SNR, 1, 4, 8
and 16 vokens, without encoder and decoder in the mapper, with fixed queries.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

_FOLDER = "data/minigpt5/cc3m"
_VALIDATION = dict(path=f"{_FOLDER}/cc3m_val.tsv", kind="cc3m_test")
# Vokens have the learning rate as it is.
GROUPS = dict(mapper=dict(match=r"mapper\..*", rate=10.0))
PUBLISHED = dict(
    steps=118_000,
    batch_size=16,
    seed=42,
    checkpoint_every=2000,
    optim=dict(sizes.OPTIM, groups=GROUPS),
    evals=dict(
        validation=dict(
            every=14_750,
            batches=64,
            data=dict(sources=dict(main=_VALIDATION), images=dict(mirror=0.0)),
        )
    ),
    keep_best="evals.validation.loss",
)
SIZES = {
    "smoke": (
        dict(sizes.SMOKE_RUN, optim=dict(sizes.SMOKE_RUN["optim"], groups=GROUPS)),
        dict(model=sizes.MODELS["smoke"], data=sizes.SMALL_DATA["smoke"]),
    ),
    "quickstart": (
        dict(
            steps=300,
            batch_size=1,
            checkpoint_every=100,
            initial_batches=8,
            optim=dict(learning_rate=1e-3, warmup=0.05, b2=0.99, ema_decay=0.99),
        ),
        dict(model=sizes.MODELS["quickstart"], data=sizes.SMALL_DATA["quickstart"]),
    ),
    "7b": (
        PUBLISHED,
        dict(
            model=sizes.MODELS["7b"],
            data=dict(
                sizes.rows(length=128, images=0),
                sources=dict(main=dict(path=f"{_FOLDER}/cc3m_train.tsv", kind="cc3m")),
            ),
        ),
    ),
}


def get_config(size: str = "quickstart") -> ConfigDict:
    return common.run("minigpt5", *common.pick(SIZES, size), stage="uas")


def sweep(add):
    """The published settings, and each of the paper's ablations of this stage."""
    add()
    add({"model.drop_condition": 0.0, "model.sampling.guidance": 1.0})
    add({"model.caption_coef": 0.0})
    add({"model.image_coef": 0.0})
    add({"model.decoder.min_snr": 0.0})
    for vokens in (1, 4, 16):
        tail = max(vokens - 2, 0)  # the first and the last are learnt as text
        add({"model.mapper.vokens": vokens, "model.unsupervised_tail": tail})
    add({"model.mapper.kind": "mlp"})
    add({"model.mapper.learned_queries": False})
