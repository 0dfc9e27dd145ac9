"""The config file of a sweep over a training of three small matrices, without its sweep."""

CONFIG = """
from metamorph_jax.train.config import run
def get_config(arg=""):
    return run(
        recipe="tests.train.toy", stage="all", steps=4, batch_size=8, model=dict(noise=0.0),
        data=dict(poison=-1, pause=0.0), optim=dict(learning_rate=0.02, warmup=2), log_every=1,
        checkpoint_every=1, tensorboard=False, compilation_cache="",
    )
"""
