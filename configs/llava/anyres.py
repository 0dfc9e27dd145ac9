"""LLaVA in the manner of 1.6: stage 2 on images in tiles, at up to four times the resolution.

    metamorph train --config=configs/llava/anyres.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_STAGE_1

(At smoke size without the second line: it needs no stage 1.) The stage 1 is that of `stage1.py`, of
the same size; it trains no newline vector, which starts at random here.

An image is read whole, and in tiles of the canvas that loses least of it; the tokens of black
borders are left out, and a learned newline vector ends every row of tokens (`data/views.py`). So an
image of 672 x 672 pixels takes 2928 positions, one of 640 x 480 takes 2340. Trained: connector,
newline, language model and tower. The tower has a tenth of the learning rate;
`--config.model.train_tower=false` leaves it frozen.

| size | language model, tower | hardware | expect |
|---|---|---|---|
| smoke | random | anything | a minute; runs through |
| 7b | Vicuna 1.5, CLIP-L/336 | 64 chips of 16 GB | 1.6: VQAv2 81.8, GQA 64.2, TextVQA 64.9, |
| | | or 8 GPUs of 80 GB | POPE 86.5, MMBench 67.4 |
| 13b | the same | the same | 1.6: VQAv2 82.8, GQA 65.4, TextVQA 67.1, |
| | | | POPE 86.2, MMBench 70 |
| qwen3-8b | Qwen3-8B, SigLIP 2 | the same | - |

Neither training code nor data of 1.6 were released. This is our own recipe: the settings of 1.5 at
a rate of 2e-5 with rows of 4096, on the data that come nearest, LLaVA-NeXT-Data in its raw form
(738 thousand rows: `llava_next_raw_format_processed.json`, images unpacked below `main.root`).
The numbers are those of the published 1.6 models, to compare with; nothing here has been run to the
end with this code base.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

NEXT = dict(
    path="data/llava/llava_next_raw_format_processed.json", root="data/llava/llava_next_images"
)
TRAINING = dict(
    steps=5766,  # 738 thousand samples once, at two to a row
    batch_size=64,
    optim=dict(learning_rate=2e-5, groups=dict(tower=dict(match=r"vision\..*", rate=0.1))),
)


def _anyres(side: int) -> dict:
    """The canvases of 1.6, for a tower that sees squares of this side."""
    cells = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    grids = tuple((side * columns, side * rows) for columns, rows in cells)
    mode = dict(image_mode="anyres", merge="spatial_unpad", grids=grids, train_tower=True)
    return dict(model=mode)


# A sample may have 2928 positions and 5 views; more rows hold two small images.
_ROW = dict(length=4096, images=8)
SIZES = {
    "smoke": (
        dict(steps=4, batch_size=2, log_every=1, checkpoint_every=2),
        sizes.size("smoke", {}),
        _anyres(32),
    ),
    "7b": (TRAINING, sizes.size("7b", NEXT, **_ROW), _anyres(336)),
    "13b": (TRAINING, sizes.size("13b", NEXT, **_ROW), _anyres(336)),
    "qwen3-8b": (TRAINING, sizes.size("qwen3-8b", NEXT, **_ROW), _anyres(384)),
}
# A frame of a video takes up to 2928 positions, too.
ONE_FRAME = dict(data=dict(images=dict(max_frames=1)))


def get_config(size: str = "7b") -> ConfigDict:
    return common.run("llava", *common.pick(SIZES, size), ONE_FRAME, stage="instruct")
