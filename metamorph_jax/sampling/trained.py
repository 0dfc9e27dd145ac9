"""A finished training stage as a model, from its workdir."""

import json
import pathlib

from flax import nnx

from metamorph_jax import config
from metamorph_jax import recipe as recipes
from metamorph_jax.errors import CheckpointError, UserError
from metamorph_jax.train import checkpoint


def load_trained(workdir: str):
    """(recipe module, its Config, model, saved config) of a finished stage."""
    saved = pathlib.Path(workdir) / "config.json"
    if not saved.is_file():
        raise UserError(f"{workdir} is no workdir of a training run (it has no config.json)")
    values = json.loads(saved.read_text())
    recipe = recipes.find(values["recipe"])
    cfg = config.build(recipe.Config, values["model"], "config.model")
    model = recipe.create(cfg, nnx.Rngs(0))
    try:
        checkpoint.load_params(model, workdir)
    except CheckpointError as error:
        raise UserError(error) from error
    return recipe, cfg, model, values
