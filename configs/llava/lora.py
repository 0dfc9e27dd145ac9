"""LLaVA 1.5, stage 2 with adapters in place of the whole language model.

    metamorph train --config=configs/llava/lora.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_STAGE_1

(At smoke size without the second line: it needs no stage 1.) Adapters of rank 128 on every linear
of the language model's layers, alpha 256, dropout 0.05; the connector is trained in full. Learning
rates: 2e-4 for adapters, 2e-5 for the connector. Data, images and all else as in `stage2.py`.

| size | hardware | expect |
|---|---|---|
| smoke | anything | a minute; runs through |
| 7b | 16 chips of 16 GB, or a GPU of 80 GB | VQAv2 79.1, GQA 63.0, TextVQA 58.2, POPE 86.4, |
| | | MME 1476.9, MMBench 66.1 |
| 13b | 32 chips of 16 GB, or 2 GPUs of 80 GB | VQAv2 80.0, GQA 63.3, TextVQA 60.2, POPE 86.7, |
| | | MME 1541.7, MMBench 68.5 |
| 7b-4bit, 13b-4bit | half of that | about the same |

`7b-4bit` and `13b-4bit` keep the frozen weights of the layers in 4 bits (NF4, with the scales
quantised again), as QLoRA does; connector, tables and norms are not packed. The sizes but smoke
have not been run to the end with this code base; the numbers are those of the published models.
`metamorph sweep --config=configs/llava/lora.py:SIZE --workdir=DIR` compares ranks.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
stage2 = load_module(pathlib.Path(__file__).with_name("stage2.py"))

ADAPTERS = dict(
    model=dict(lora=dict(rank=128, alpha=256.0, dropout=0.05)),
    optim=dict(
        learning_rate=2e-4,
        groups=dict(connector=dict(match=r"(connector\..*|newline)", rate=0.1)),
    ),
)
FOUR_BITS = dict(model=dict(frozen_weights="nf4_double"))
SIZES = {
    "smoke": (*stage2.SIZES["smoke"], ADAPTERS, dict(model=dict(lora=dict(rank=4, alpha=8.0)))),
    "7b": (*stage2.SIZES["7b"], ADAPTERS),
    "13b": (*stage2.SIZES["13b"], ADAPTERS),
    "7b-4bit": (*stage2.SIZES["7b"], ADAPTERS, FOUR_BITS),
    "13b-4bit": (*stage2.SIZES["13b"], ADAPTERS, FOUR_BITS),
}


def get_config(size: str = "7b") -> ConfigDict:
    return common.run("llava", *common.pick(SIZES, size), stage="instruct")


def sweep(add):
    """Half, once and twice the rank, with alpha in proportion."""
    lora = add.config.model.lora
    for factor in (0.5, 1, 2):
        add({"model.lora.rank": int(lora.rank * factor), "model.lora.alpha": lora.alpha * factor})
