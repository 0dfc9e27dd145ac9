"""MM-Interleaved, pre-training: reading and drawing images between texts, all at once.

    metamorph train --config=configs/mm_interleaved/pretrain.py:SIZE --workdir=DIR

Trained: the ViT-Adapter, both resamplers, MMFS in the language model and in the UNet, the UNet, the
vector of `soi` and the output rows of added tokens. Frozen: language model, tower, autoencoder.
Losses: text, and ten times the error of the predicted noise; the log has `text_loss` and
`image_loss`, also of each source. `sizes.py` says what each size is made of.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| quickstart | a laptop, 2 cores | - |
| 7b | 64 chips of 16 GB, or 8 GPUs of 80 GB | - |
| 13b | 64 chips of 32 GB, or 16 GPUs of 80 GB | COCO CIDEr 129.0, FID 7.90 (the paper) |

`7b` and `13b` have the released settings: AdamW with 1e-4 (1e-5 for the UNet and for sampling
offsets), 1000 steps of warm-up, cosine to 0, 15,000 steps. Data are captions of three sources and
the documents of MMC4 (`docs/mm_interleaved.md` says where they are looked for). The reference draws
a source for each batch, 1 : 1 : 1 : 2, and batches of MMC4 have twice as many rows. Weights here
count samples; a row holds many captions and few documents, hence 0.29 each and 0.13. Rows hold
documents that don't see each other; `row.packing="concat"`, `row.crossing=True` and
`model.document_bos=1` make the reference's. These sizes have not been run to the end with this code
base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

_FOLDER = "data/mm_interleaved"
_WEB = dict(kind="pair", weight=0.29)
SOURCES = dict(
    main=dict(
        path=f"{_FOLDER}/mmc4/docs_no_face_shard_*_v3.jsonl", root=f"{_FOLDER}/mmc4/images",
        kind="mmc4", weight=0.13,
    ),
    blip=dict(
        path=f"{_FOLDER}/blip/{{0000000..0001000}}.txt", root=f"{_FOLDER}/blip/images", **_WEB
    ),
    laion_en=dict(
        path=f"{_FOLDER}/laion-en/{{00000..09999}}.tar", documents=dict(learn_before=False), **_WEB
    ),
    laion_coco=dict(
        path=f"{_FOLDER}/laion-coco/{{00000..09999}}.tar",
        documents=dict(learn_before=False, caption="top_caption"), **_WEB,
    ),
)  # fmt: skip
OPTIM = dict(
    learning_rate=1e-4,
    warmup=1000,
    b1=0.9,
    b2=0.995,
    eps=1e-6,
    weight_decay=0.05,
    groups=dict(
        gate=dict(match=r"llm\.inserts\.gate", decay=0.0),
        offsets=dict(match=r".*\.sampling_offsets\..*", rate=0.1, decay=0.0),
        unet=dict(match=r"decoder\.denoiser\.unet\..*", rate=0.1),
    ),
)
# Of the quick start, where the UNet is new as well.
SMALL_OPTIM = dict(
    learning_rate=1e-3,
    warmup=0.05,
    b2=0.99,
    ema_decay=0.99,
    groups=dict(OPTIM["groups"], unet=dict(match=r"decoder\.denoiser\.unet\..*", rate=2.0)),
)
PUBLISHED = dict(steps=15000, batch_size=128, optim=OPTIM)
_DATA = dict(
    sources=SOURCES,
    row=dict(template="document", length=2048, images=16),
    images=dict(max_frames=16),
    reading=dict(workers=16),
)
_DRAWN = dict(max_drawings=8)
SIZES = {
    "smoke": (
        dict(steps=4, batch_size=2, log_every=1, checkpoint_every=2, initial_batches=2,
             optim=dict(OPTIM, learning_rate=1e-3, warmup=1)),
        dict(model=dict(sizes.MODELS["smoke"], max_drawings=4), data=sizes.SMALL_DATA["smoke"]),
    ),
    "quickstart": (
        dict(steps=300, batch_size=1, checkpoint_every=100, initial_batches=8,
             optim=SMALL_OPTIM),
        dict(model=dict(sizes.MODELS["quickstart"], max_drawings=8),
             data=sizes.SMALL_DATA["quickstart"]),
    ),
    "7b": (PUBLISHED, dict(model=sizes.MODELS["7b"] | _DRAWN, data=_DATA)),
    "13b": (PUBLISHED, dict(model=sizes.MODELS["13b"] | _DRAWN, data=_DATA)),
}  # fmt: skip


def get_config(size: str = "quickstart") -> ConfigDict:
    return common.run("mm_interleaved", *common.pick(SIZES, size), stage="pretrain")
