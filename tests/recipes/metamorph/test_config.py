"""Options that don't exist or don't fit together."""

import dataclasses

import pytest

from metamorph_jax import config as configs
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipes import metamorph as recipe
from tests.recipes.metamorph.tiny import TINY, make


def test_wrong_options_are_errors():
    for key, value in dict(llm="gpt", visual_loss="l2", vpit_tokens="some").items():
        with pytest.raises(ConfigError, match="none of"):
            configs.build(recipe.Config, {key: value})
    with pytest.raises(ConfigError, match="feature_width"):
        configs.build(recipe.Config, {"vision": {"tower": "none"}})
    with pytest.raises(ConfigError, match="did you mean"):
        configs.build(recipe.Config, {"tokens_per_img": 3, "image_token": 4})
    with pytest.raises(ValueError, match="connector"):
        make(dataclasses.replace(TINY, connector="mlp_gelu"))
    with pytest.raises(ValueError, match="head"):
        make(dataclasses.replace(TINY, head="None"))
