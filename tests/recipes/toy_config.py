"""The toy recipe on made-up questions about colours.

    metamorph train --config=tests/recipes/toy_config.py --workdir=DIR \\
        --config.data.sources.main.path=FILE
"""

from ml_collections import ConfigDict

from metamorph_jax.train.config import run


def get_config(arg: str = "") -> ConfigDict:
    return run(
        "tests.recipes.toy",
        stage="all",
        steps=2,
        batch_size=2,
        optim=dict(learning_rate=1e-3, schedule="constant", warmup=0.0),
        data=dict(
            sources=dict(main=dict(path="colours.jsonl")),
            row=dict(template="chatml", length=64, images=4),
        ),
    )


def sweep(add):
    add.product({"optim.learning_rate": [1e-3, 3e-3]})
