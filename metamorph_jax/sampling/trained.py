"""A finished training stage as a model, from its workdir."""

import jax

from metamorph_jax import sharding
from metamorph_jax.convert import load
from metamorph_jax.errors import CheckpointError, UserError


def load_trained(workdir: str):
    """(recipe module, its Config, model, saved config) of a finished stage."""
    recipe, cfg, values = load.open_run(workdir)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    try:
        model = load.load_model(recipe, cfg, mesh, workdir=workdir)
    except CheckpointError as error:
        raise UserError(error) from error
    return recipe, cfg, model, values
