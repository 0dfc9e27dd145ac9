"""LLaVA, stage 2: visual instruction tuning of the connector and the whole language model.

    metamorph train --config=configs/llava/stage2.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_STAGE_1

(At smoke size without the second line: it needs no stage 1.) A connector that others have trained:
`--config.model.connector_weights=mm_projector.bin` in place of it. `sizes.py` says what each size
is made of.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| quickstart | a laptop, 2 cores | minutes; loss 1.1 after 10 steps (not run to the |
| | | end yet: accuracy unknown) |
| 7b | 64 chips of 16 GB, or 8 GPUs of 80 GB | LLaVA 1.5: VQAv2 78.5, GQA 62.0, TextVQA 58.2, |
| | | POPE 85.9, MME 1510.7, MMBench 64.3 |
| 13b | the same | VQAv2 80.0, GQA 63.3, TextVQA 61.3, POPE 85.9, |
| | | MME 1531.3, MMBench 67.7 |
| v1-7b, v1-13b | 32 chips of 16 GB, or 8 GPUs of 80 GB | LLaVA 1.0: LLaVA-Bench (COCO) 85.1 (13b) |

| | data | images | samples a step | epochs |
|---|---|---|---|---|
| 1.5 | mix-665K: `llava_v1_5_mix665k.json` | padded to a square | 128 | 1 |
| 1.0 | Instruct-158K: `llava_instruct_150k.json` | centre cut out | 128 | 3 |

2e-5, cosine to 0 after 3 % of the steps, no weight decay; at most 2048 positions for a sample. The
reference groups samples of similar length into batches; here they are packed into rows, so that no
position is lost to padding: 64 rows of 2048 hold some 128 samples of mix-665K, and 32 rows some 128
of Instruct-158K. `--config.data.row.packing=pad --config.batch_size=128` puts one into each row,
and `--config.data.order.grouping=modality` adds the reference's sampler.

mix-665K, 665,298 rows in one file (`main`); its paths begin with the folders below `main.root`:

| part | rows | images |
|---|---|---|
| LLaVA-Instruct-158K | 157,712 | coco/train2017 |
| ShareGPT, text only | 40,688 | - |
| VQAv2, OKVQA, A-OKVQA | 82,783, 8,998, 66,160 | coco/train2017 |
| RefCOCO | 48,447 | coco/train2017 |
| GQA | 72,140 | gqa/images |
| OCR-VQA | 80,000 | ocr_vqa/images (save every file as .jpg) |
| TextCaps | 21,953 | textvqa/train_images |
| Visual Genome | 86,417 | vg/VG_100K, vg/VG_100K_2 |

`7b` to `v1-13b` have not been run to the end with this code base; the numbers to expect are those
of the published models. `metamorph sweep --config=configs/llava/stage2.py:SIZE --workdir=DIR`
compares learning rates.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

MIX = dict(path="data/llava/llava_v1_5_mix665k.json", root="data/llava/images")
INSTRUCT = dict(path="data/llava/llava_instruct_150k.json", root="data/llava/images/coco/train2017")

V15 = dict(steps=5198, batch_size=64, optim=dict(learning_rate=2e-5), model=dict(image_mode="pad"))
V1 = dict(steps=3697, batch_size=32, optim=dict(learning_rate=2e-5), model=dict(image_mode="crop"))
QUICKSTART = dict(
    steps=306,  # asks as many questions as MetaMorph's 520 steps, of which some are for images
    batch_size=1,
    checkpoint_every=120,
    optim=dict(
        learning_rate=1.5e-4,
        schedule="wsd",
        b2=0.98,
        groups=dict(connector=dict(match=r"connector\..*", rate=7.0)),
    ),
    evals=dict(
        heldout=dict(
            every=175,
            batches=3,
            # The cache has the training images; these few images go through the tower.
            data=dict(sources=dict(main=sizes.VQA_TEST), cache=dict(features="")),
        )
    ),
)
_ROW = dict(length=2048, images=3)
_V1_ROW = dict(length=2048, images=7)
SIZES = {
    "smoke": (
        dict(
            steps=6,
            batch_size=2,
            log_every=1,
            checkpoint_every=2,
            optim=dict(learning_rate=1e-3),
            evals=dict(samples=dict(kind="samples", samples=2)),
        ),
        sizes.size("smoke", {}),
    ),
    "quickstart": (QUICKSTART, sizes.size("quickstart", {})),
    "7b": (V15, sizes.size("7b", MIX, **_ROW)),
    "13b": (V15, sizes.size("13b", MIX, **_ROW)),
    "v1-7b": (V1, sizes.size("v1-7b", INSTRUCT, **_V1_ROW)),
    "v1-13b": (V1, sizes.size("v1-13b", INSTRUCT, **_V1_ROW)),
}


def get_config(size: str = "quickstart") -> ConfigDict:
    return common.run("llava", *common.pick(SIZES, size), stage="instruct")


def sweep(add):
    """Half, once and twice the learning rate."""
    rate = add.config.optim.learning_rate
    add.product({"optim.learning_rate": [rate / 2, rate, rate * 2]})
