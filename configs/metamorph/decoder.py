"""MetaMorph, stage 3: a diffusion decoder draws what visual tokens describe.

    metamorph train --config=configs/metamorph/decoder.py:SIZE --workdir=DIR

It learns from pictures alone, apart from the language model: true visual tokens of a picture in,
the picture out. Loss: mean square of the predicted noise or velocity.

| size | decoder | hardware | expect |
|---|---|---|---|
| smoke | two small transformer blocks | anything | 10 s; runs through |
| quickstart | transformer on 64 x 64 pixels, 7.8 M, | a laptop, 2 cores | 6 minutes; a shape of |
| | velocity | | the colour asked for |
| 1b, 8b | Stable Diffusion 1.5, its UNet tuned | 8 chips of 32 GB or | the reference's setting |
| | with a two-layer MLP, 512 x 512 | 8 GPUs of 80 GB | |

`1b` and `8b` differ in nothing: the visual tokens are the tower's, whatever language model predicts
them. Settings of the paper: batch 2112, peak 1.1e-5, logarithmic warm-up over 2000 steps, linear
decay to step 12000, condition dropped with probability 0.7. Not run to the end with this code base.

Adapters in the UNet's attention in place of the whole UNet: `--config.model.lora="{'rank': 16}"`
(3.2 M in place of 859.5 M; the projector stays trained). Their learning rate is the group `lora` of
`config.optim.multipliers`.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

VPIT = load_module(pathlib.Path(__file__).with_name("vpit.py"))
SIZES = ("smoke", "quickstart", "1b", "8b")


def get_config(arg: str = "quickstart") -> ConfigDict:
    if arg not in SIZES:
        raise ValueError(f"size {arg!r} is none of {', '.join(SIZES)}")
    config = ConfigDict(
        dict(
            recipe="decoder",
            stage="decoder",  # "projector" leaves the denoiser as it is
            seed=0,
            steps=12000,
            batch_size=2112,
            accumulate=1 if arg in ("smoke", "quickstart") else 33,  # 64 pictures at a time
            model=MODELS[arg](),
            data=DATA[arg](),
            optim=dict(
                learning_rate=1.1e-5,
                base_batch=2112,
                batch=None,
                schedule="finetune",
                warmup=2000.0,
                b2=0.999,
                weight_decay=0.01,
                clip_norm=None,
                multipliers={},
                momentum_dtype="float32",
                ema_decay=None,
            ),
            initial_batches=0,
            mesh=dict(slice=1, data=1, fsdp=-1, tensor=1, context=1),
            data_shards=0,
            guard=dict(on_bad="stop", most_in_a_row=10, spike=0.0, spike_after=100),
            damaged_checkpoint="stop",
            log_every=20,
            checkpoint_every=1000,
            keep=2,
            local_checkpoints=dict(folder="", every=50, keep=2, multi_tier=0),
            tensorboard=True,
            matmul_precision="default",
            compilation_cache="~/.cache/metamorph_jax/compiled",
        )
    )
    if arg in ("smoke", "quickstart"):
        config.optim.update(
            learning_rate=2e-3, base_batch=None, schedule="cosine", warmup=0.04, clip_norm=1.0,
            weight_decay=0.0, b2=0.99, ema_decay=0.99,
        )  # fmt: skip
        config.initial_batches = 4
        config.checkpoint_every = 200
    if arg == "smoke":
        config.steps, config.batch_size = 6, 4
        config.log_every, config.checkpoint_every = 1, 3
    if arg == "quickstart":
        config.steps, config.batch_size = 1400, 32
    return config


def _pixels(features, tokens, side, patch, width, depth, heads):
    """A small transformer on pixels that predicts the picture itself.

    Tokens of a 4x4 grid lie over the picture's patches. Most of the noise levels are high
    (`snr_shift`): in flat pictures that is where it is decided what stands where.
    """
    return dict(
        projector=dict(
            mode="mlp", input_dim=features, hidden_dim=width, output_dim=width, num_layers=1
        ),
        denoiser=dict(
            sample_size=side,
            patch=patch,
            width=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=2,
            cross_attention_dim=width,
            num_context=tokens,
            grid_context=True,
            local=True,
        ),
        vae=None,
        schedule=dict(prediction_type="sample", beta_schedule="squaredcos_cap_v2", snr_shift=0.125),
        velocity_cap=5.0,
        context_length=0,
        drop_context=0.1,
        feature_noise=0.3,
    )


def _model(arg, decoder, sd_weights="random", with_tower=False):
    return dict(
        decoder=decoder,
        vision=VPIT.vision(arg),
        sd_weights=sd_weights,
        unet_from_scratch=False,
        weights="",
        with_tower=with_tower,
        lora=None,
    )


def _stable_diffusion():
    return dict(
        projector=dict(mode="mlp", input_dim=1152, hidden_dim=2048, output_dim=768, num_layers=2),
        denoiser=dict(dtype="bfloat16"),
        vae=dict(dtype="bfloat16"),
        context_length=77,
        drop_context=0.7,
        noise_offset=0.0,
    )


def _data(root, cache, name="pictures"):
    return dict(
        sources={name: dict(path=f"{root}/draw_train.jsonl", root=f"{root}/images")},
        cache=dict(features=cache),
        # Visual tokens of the tuned language model for its training requests; the quick start
        # makes this file after the VPiT stage.
        predicted="",
        predicted_share=0.7,
        order=dict(seed=42),
    )


_SD15 = "hf:stable-diffusion-v1-5/stable-diffusion-v1-5"

MODELS = {
    "smoke": lambda: _model("smoke", _pixels(32, 4, 64, 16, 32, 2, 2)),
    "quickstart": lambda: _model("quickstart", _pixels(384, 16, 64, 8, 192, 5, 6)),
    "1b": lambda: _model("1b", _stable_diffusion(), _SD15, with_tower=True),
    "8b": lambda: _model("8b", _stable_diffusion(), _SD15, with_tower=True),
}
DATA = {
    "smoke": lambda: _data("quickstart/data", "quickstart/features"),
    "quickstart": lambda: _data("quickstart/data", "quickstart/features"),
    "1b": lambda: dict(sources=dict(main=dict(path="data/pictures.jsonl", root="data"))),
    "8b": lambda: dict(sources=dict(main=dict(path="data/pictures.jsonl", root="data"))),
}
