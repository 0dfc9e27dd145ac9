"""The decoder recipe: visual tokens -> image, by diffusion.

MetaMorph's visualiser (spec 7) and its small relative for the quick start:

    features [B, P, C] -> standardise -> projector -> zeros up to `context_length` -> Conditioning
    Conditioning -> DiffusionDecoder -> image

It trains on images alone: their true visual tokens in, the image out. The null condition is zeros
in place of the whole context, in training and in sampling.

    config.py   the options, and those of the data
    model.py    projector and statistics around a diffusion decoder; what each stage trains
    weights.py  Stable Diffusion's weights, adapters, the statistics of the data
    published.py  Stable Diffusion's folders, the reference's files, and what we write
    input.py    pairs of images and visual tokens
    samples.py  what it draws of a few images
"""

from metamorph_jax.recipes.decoder import published
from metamorph_jax.recipes.decoder.config import Config, Data, DecoderLora
from metamorph_jax.recipes.decoder.input import KINDS, batch_spec, open_data
from metamorph_jax.recipes.decoder.model import STAGES, Decoder, create
from metamorph_jax.recipes.decoder.samples import show
from metamorph_jax.recipes.decoder.weights import initialize, load_pretrained

FAMILIES = (published.RUN,)


def generator(model, cfg, data, **options):
    """None: it draws what other recipes' generators predict."""
    return None


__all__ = [
    # What `recipe.Recipe` asks for.
    "Config",
    "Data",
    "FAMILIES",
    "KINDS",
    "STAGES",
    "batch_spec",
    "create",
    "generator",
    "initialize",
    "load_pretrained",
    "open_data",
    "show",
    # More.
    "Decoder",
    "DecoderLora",
]
