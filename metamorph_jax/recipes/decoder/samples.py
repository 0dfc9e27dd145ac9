"""What a decoder draws of a few images of its data, for people to look at."""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from metamorph_jax.recipe import Shard, Shown
from metamorph_jax.recipes.decoder.config import Config, Data
from metamorph_jax.recipes.decoder.input import open_data
from metamorph_jax.recipes.decoder.model import Decoder
from metamorph_jax.sampling.image_decoder import ImageDecoder


def show(model: Decoder, cfg: Config, data: Data, count: int) -> Sequence[Shown]:
    """The first images of the shuffled data, and what is drawn from their visual tokens."""
    stream = open_data(data, cfg, Shard(count))
    try:
        batch = next(stream)
        names = [" ".join(row) for row in stream.sample_names()()]
    finally:
        stream.close()
    graph, weights = nnx.split(model)
    features = jax.jit(lambda w, batch: nnx.merge(graph, w).features(batch))(weights, batch)
    drawn = ImageDecoder(model).draw_many(np.asarray(features), None, seed=0)
    return [
        Shown(name, {}, {"wanted": np.asarray(image), "drawn": made})
        for name, image, made in zip(names, batch.image, drawn, strict=True)
    ]
