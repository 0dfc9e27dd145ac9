"""MM-Interleaved on stories: images that belong together, each drawn from the words and images
before it.

    metamorph train --config=configs/mm_interleaved/story.py:SIZE --workdir=DIR

| size | data | hardware | expect |
|---|---|---|---|
| smoke | eight images of shapes | anything | a minute; runs through |
| quickstart | those of `metamorph quickstart --stories` | a laptop, 2 cores | - |
| 7b, 13b | VIST, Pororo or Flintstones | 64 chips of 32 GB, or 16 GPUs of 80 GB | - |

`--config.stage=without_mmfs` trains the same model without the feature synchronizer, to see what it
gives. `7b` and `13b` read rows that `prepare` makes of the official files (`tuning.py`), here of
`vist`; `--config.data.sources.main.path` and `…main.root` name those of `pororo` or `flintstones`.
They start from pre-trained weights: `--config.model.weights=hf:OpenGVLab/MM-Interleaved`, or
`workdir:DIR_OF_PRETRAINING`. Our choice, as none was published: 2e-5, 1e-5 for the UNet, cosine to
0 after 3 % of 10,000 steps of 64 rows. The large sizes have not been run to the end with this code
base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
tuning = load_module(pathlib.Path(__file__).with_name("tuning.py"))
pretrain, sizes = tuning.pretrain, tuning.sizes

TUNED = dict(steps=10000, batch_size=64, optim=tuning.OPTIM)
_DATA = dict(sources=dict(main=tuning.source("vist")), images=8, drawings=4, length=1024)
_SMALL = dict(images=dict(max_frames=12), row=dict(template="document", length=384, images=12))
SIZES = {
    "smoke": (
        tuning.SMOKE,
        dict(model=dict(sizes.MODELS["smoke"], max_drawings=8),
             data=sizes.SMALL_DATA["smoke"]),
    ),
    "quickstart": (
        dict(steps=300, batch_size=1, checkpoint_every=100, initial_batches=8,
             optim=pretrain.SMALL_OPTIM),
        dict(model=dict(sizes.MODELS["quickstart"], max_drawings=8, text_coef=0.1),
             data=dict(_SMALL, sources=dict(main=dict(path="stories/data/train.jsonl")))),
    ),
    "7b": (TUNED, tuning.size("7b", **_DATA)),
    "13b": (TUNED, tuning.size("13b", **_DATA)),
}  # fmt: skip


def get_config(size: str = "quickstart") -> ConfigDict:
    return common.run("mm_interleaved", *common.pick(SIZES, size), stage="pretrain")
