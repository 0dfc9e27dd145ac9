"""MetaMorph, stage 3: a diffusion decoder draws what visual tokens describe.

    metamorph train --config=configs/metamorph/decoder.py:SIZE --workdir=DIR

It is trained on images alone, independently of the language model: from the visual tokens of an
image it draws the image. Loss: mean square error of the predicted noise or image.

| size | decoder | hardware | expect |
|---|---|---|---|
| smoke | two small transformer blocks | anything | a minute; runs through |
| quickstart | transformer on 64 x 64 pixels, 3.3 M | a laptop, 2 cores | 9 minutes; a shape of |
| | | | the colour asked for |
| 1b, 8b | Stable Diffusion 1.5, its UNet tuned | 8 chips of 32 GB or | the reference's setting |
| | with a two-layer MLP, 512 x 512 | 8 GPUs of 80 GB | |
| qwen3-1.7b, qwen3-8b | the same | the same | - |

`1b` and `8b` are the same: the visual tokens are the tower's, whatever language model predicts
them. Both `qwen3` sizes draw from the tokens of SigLIP 2. Settings of the paper: batch 2112, peak
1.1e-5, logarithmic warm-up over 2000 steps, linear decay to step 12000, condition dropped with
probability 0.7. Not run to the end with this code base.
`--config.stage=projector` leaves the denoiser as it is.

Adapters in the UNet's attention in place of the whole UNet: `--config.model.lora.rank=16` (3.2 M in
place of 859.5 M; the projector stays trained). `config.optim.groups` may give them a learning rate
of their own.
"""

import pathlib

from ml_collections import ConfigDict

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
sizes = load_module(pathlib.Path(__file__).with_name("sizes.py"))

# A small transformer on pixels that predicts the image itself. Its context tokens lie in a grid
# over the patches. Most of the noise levels are high (`snr_shift`): in flat images, that is where
# the positions of things are decided.
TRANSFORMER = dict(
    model=dict(
        projector=dict(num_layers=1),
        decoder=dict(
            denoiser=dict(mlp_ratio=2, grid_context=True, local=True),
            vae=None,
            schedule=dict(
                prediction_type="sample", beta_schedule="squaredcos_cap_v2", snr_shift=0.125
            ),
            velocity_cap=5.0,
        ),
        sampling=dict(guidance=3.0),
        context_length=0,
        feature_noise=0.3,
    ),
    # `predicted`: visual tokens that the tuned language model gave for its training requests, in a
    # file that the quick start makes after the VPiT stage.
    data=dict(predicted_share=0.7),
    optim=dict(learning_rate=2e-3, warmup=0.04, b2=0.99, ema_decay=0.99),
    initial_batches=4,
)
STABLE_DIFFUSION = dict(
    steps=12000,
    batch_size=2112,
    accumulate=33,  # 64 images at a time
    model=dict(
        decoder=dict(denoiser=dict(dtype="bfloat16"), vae=dict(dtype="bfloat16")),
        drop_context=0.7,
        sd_weights="hf:stable-diffusion-v1-5/stable-diffusion-v1-5",
        with_tower=True,
    ),
    data=dict(sources=dict(main=dict(path="data/images.jsonl"))),
    optim=dict(
        learning_rate=1.1e-5,
        base_batch=2112,
        schedule="finetune",
        warmup=2000.0,
        weight_decay=0.01,
        clip_norm=None,
    ),
    log_every=20,
    checkpoint_every=1000,
)


def _transformer(features: int, tokens: int, width: int, *, steps: int, **denoiser) -> dict:
    """Differences of a size: `tokens` visual tokens of `features` channels, `steps` to draw."""
    shape = dict(num_context=tokens, cross_attention_dim=width, width=width, sample_size=64)
    return dict(
        projector=dict(input_dim=features, hidden_dim=width, output_dim=width),
        decoder=dict(denoiser=shape | denoiser),
        sampling=dict(steps=steps),
    )


SIZES = {
    "smoke": common.merged(
        TRANSFORMER,
        dict(steps=6, batch_size=4, log_every=1, checkpoint_every=3),
        dict(model=_transformer(32, 4, 32, steps=4, patch=16, depth=2, num_heads=2)),
        # The tower runs on the images: there is no cache to fill.
        dict(model=dict(with_tower=True), data=dict(sources=dict(main=sizes.SMOKE))),
        dict(evals=dict(samples=dict(kind="samples", samples=2))),
    ),
    "quickstart": common.merged(
        TRANSFORMER,
        dict(steps=1400, batch_size=32, log_every=20, checkpoint_every=200),
        dict(model=_transformer(384, 16, 192, steps=20, patch=8, depth=5, num_heads=6)),
        dict(data=dict(sources=dict(main=sizes.DRAW), cache=sizes.CACHE)),
        dict(evals=dict(samples=dict(kind="samples", every=700))),
    ),
    "1b": STABLE_DIFFUSION,
    "8b": STABLE_DIFFUSION,
    "qwen3-1.7b": STABLE_DIFFUSION,
    "qwen3-8b": STABLE_DIFFUSION,
}


def get_config(size: str = "quickstart") -> ConfigDict:
    return common.run(
        "decoder",
        common.pick(SIZES, size),
        stage="decoder",
        model=dict(vision=sizes.VISION[size]),
    )
