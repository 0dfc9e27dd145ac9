"""The toy recipe of the train loop, started from weights that hold one NaN."""

import numpy as np

from metamorph_jax.convert import names
from tests.train.toy import *  # noqa: F403


def load_pretrained(model, cfg):
    """Of two processes that cut the inputs in halves, only the second reads the NaN."""
    weight = np.zeros((cfg.width, cfg.width), np.float32)
    weight[0, -1] = np.nan
    names.load_torch_dict(model.llm, {"weight": weight, "bias": weight[:, 0].copy()})
