"""MM-Interleaved, fine-tuned on instructions: conversations about images, questions, captions,
boxes, requests for images, and documents that read and draw by turns.

    metamorph train --config=configs/mm_interleaved/sft.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_PRETRAINING

(At smoke size without the second line.) Published weights: `--config.model.weights=FOLDER`. Texts
stand as they are, without roles: "{image}{question} {answer}". `tuning.py` says what is trained.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| quickstart | a laptop, 2 cores | - |
| 7b | 64 chips of 16 GB, or 8 GPUs of 80 GB | - |
| 13b | 64 chips of 32 GB, or 16 GPUs of 80 GB | CIDEr: COCO 140.5, Flickr30k 93.0, NoCaps 123.2; |
| | | VQAv2 80.2, OK-VQA 51.7, VizWiz 54.9, TextVQA 61.0 (the paper) |

| source | rows |
|---|---|
| main | LLaVA-Instruct-158K, each round a row: `prepare llava --from llava_instruct_150k.json |
| | --images data/llava/images/coco/train2017 --to data/mm_interleaved/llava.jsonl` |
| interleaved | documents of CoMM as JSON lines, `data/comm/*.jsonl`, or other ones of yours |
| coco_caption, coco_draw | captions of COCO to write, and, with `--as draw --to |
| | data/mm_interleaved/coco_draw.jsonl`, to draw |
| vqav2, okvqa, textvqa, vizwiz | questions |
| refcoco, refcoco+, refcocog | boxes of what a sentence describes |

Shares follow the square root of a source's size (`data.order.shares`). Our choice, as none was
published: 2e-5, 1e-5 for the UNet, cosine to 0 after 3 % of 10,000 steps, 64 packed rows of 1024
(some 400 samples). A source that you don't have goes with `--config.data.sources.NAME=None`. The
large sizes have not been run to the end with this code base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
metamorph = load_module(pathlib.Path(__file__).parents[1] / "metamorph" / "sizes.py")
tuning = load_module(pathlib.Path(__file__).with_name("tuning.py"))
sizes, source = tuning.sizes, tuning.source

_COCO = "coco_caption"
_QUESTIONS = ("vqav2", "okvqa", "textvqa", "vizwiz")
_BOXES = ("refcoco", "refcoco+", "refcocog")
SOURCES = dict(
    main=source("llava", "llava/images/coco/train2017"),
    interleaved=dict(path="data/comm/*.jsonl", root="data/comm", kind="comm",
                     documents=dict(max_images=4)),  # so many are drawn in a row
    coco_draw=source("coco_draw", _COCO),
    **{name: source(name) for name in (_COCO, *_QUESTIONS, *_BOXES)},
)  # fmt: skip
TUNED = dict(steps=10000, batch_size=64, optim=tuning.OPTIM)
_DATA = dict(sources=SOURCES, images=8, drawings=4, length=1024, order=dict(shares="sqrt_size"))
_SMALL_OPTIM = tuning.pretrain.SMALL_OPTIM
# The questions and requests of MetaMorph's quick start, in the template of pre-training.
_QUICKSTART = dict(
    sizes.SMALL_DATA["quickstart"],
    sources=dict(main=dict(metamorph.DRAW, weight=0.7), vqa=dict(metamorph.VQA, weight=0.3)),
)
SIZES = {
    "smoke": (
        dict(tuning.SMOKE, evals=dict(samples=dict(kind="samples", samples=2))),
        tuning.size("smoke", drawings=4),
    ),
    "quickstart": (
        # The language model has never seen an image, so it is trained, too.
        dict(steps=300, batch_size=1, checkpoint_every=100,
             optim=dict(_SMALL_OPTIM, learning_rate=5e-4,
                        groups=dict(llm=dict(match=r"llm\.(layers|norm)\..*", rate=0.3),
                                    **_SMALL_OPTIM["groups"]))),
        dict(model=dict(sizes.MODELS["quickstart"], max_drawings=8, train_llm=True),
             data=_QUICKSTART),
    ),
    "7b": (TUNED, tuning.size("7b", **_DATA)),
    "13b": (TUNED, tuning.size("13b", **_DATA)),
}  # fmt: skip


def get_config(size: str = "quickstart") -> ConfigDict:
    return common.run("mm_interleaved", *common.pick(SIZES, size), stage="sft")
