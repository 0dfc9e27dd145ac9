"""What the configs of fine-tuning share: rows of data, and settings.

The rates, steps and batches of fine-tuning were never published; these are our choice. What is
trained is what pre-training trains (stage `sft`), so that the language model keeps what it knows,
but without what draws where a config has no images to draw (`model.max_drawings=0`).
`--config.model.train_llm=true` trains its layers as well. Rows of official files are made by

    python -m metamorph_jax.recipes.mm_interleaved.prepare SET --from data/SET \\
        --to data/mm_interleaved/SET.jsonl

with the files of a set in `data/SET`; the docstrings of the configs name the sets.
"""

import pathlib

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
pretrain = load_module(pathlib.Path(__file__).with_name("pretrain.py"))
sizes = pretrain.sizes

UNET = r"decoder\.denoiser\.unet\..*"
# 2e-5, and 1e-5 for the UNet.
OPTIM = dict(
    pretrain.OPTIM,
    learning_rate=2e-5,
    warmup=0.03,
    groups=dict(pretrain.OPTIM["groups"], unet=dict(match=UNET, rate=0.5)),
)


def reading(optim: dict) -> dict:
    """The same for a run that draws nothing, and so trains no UNet."""
    groups = {name: group for name, group in optim["groups"].items() if name != "unet"}
    return dict(optim, groups=groups)


SMOKE = pretrain.SIZES["smoke"][0]
READING_SMOKE = dict(SMOKE, optim=reading(SMOKE["optim"]))
_FOLDER = "data/mm_interleaved"


def source(name: str, root: str = "", **more) -> dict:
    """A source of rows that `prepare` made of the files in `data/NAME`.

    Args:
        name: of the file of rows.
        root: folder of the images below `data`, if another one.
        more: other options of the source.
    """
    return dict(path=f"{_FOLDER}/{name}.jsonl", root=f"data/{root or name}", **more)


def size(
    name: str, sources: dict | None = None, images: int = 4, length: int = 512, drawings: int = 0,
    **more,
) -> dict:  # fmt: skip
    """Model and data of a size.

    Args:
        name: smoke, which has its own source, or 7b or 13b.
        sources: name -> source, the main one called `main`.
        images, length: of a row; drawings: so many of its images can be drawn; 0: they are read.
        more: other options of `config.data`.
    """
    if name == "smoke":
        model = dict(sizes.MODELS[name], max_drawings=drawings)
        return dict(model=model, data=sizes.SMALL_DATA[name])
    data = dict(
        sources=sources,
        row=dict(template="document", length=length, images=images),
        images=dict(max_frames=images),
        reading=dict(workers=16),
        **more,
    )
    return dict(model=dict(sizes.MODELS[name], max_drawings=drawings), data=data)


def tasks(every: int, *names: str, protocol: str = ":protocol=mm-interleaved") -> dict:
    """Evaluations on 500 questions of these tasks of `metamorph eval`, whose files are in
    `bench/TASK`."""
    options = dict(bench_root="bench", limit=500)
    return {
        name: dict(kind="task", every=every, task=f"{name}{protocol}", options=options)
        for name in names
    }
