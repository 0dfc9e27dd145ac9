"""Checkpoints of LLaVA, and how our runs are written. To be filled: so far, our own names only."""

import pathlib

from metamorph_jax.convert import hf, names, specs
from metamorph_jax.convert.export import Source, Writer, trained_source, write_json
from metamorph_jax.convert.families import RunForm
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.data.config import DataConfig
from metamorph_jax.recipes.llava.config import Config
from metamorph_jax.recipes.llava.input import make_chat
from metamorph_jax.recipes.llava.model import Llava


def load_whole(model: Llava, cfg: Config, folder: pathlib.Path) -> None:
    """Fills the model, in place, from a folder with the whole of it; checks the config first."""
    names.load_torch_dict(model, hf.Tensors(folder), stacked=("layers",))


def load_connector(model: Llava, spec: str) -> None:
    """Fills connector (and newline, where the file has it), in place, from a projector file."""
    raise NotImplementedError


def base(cfg: Config) -> str:
    """Spec of the published weights that a run started from, or ""."""
    whole = cfg.weights and not cfg.weights.startswith(WORKDIR)
    spec = cfg.weights if whole else cfg.llm_weights
    return "" if spec == specs.RANDOM else spec


def generation_fields(cfg: Config) -> dict:
    """The generation_config.json of the weights that the config names; {} without one."""
    return specs.generation_fields(base(cfg))


def source(cfg: Config, data: DataConfig) -> Source:
    """What the folder of a run takes over beside its weights."""
    fields = specs.llm_fields(cfg.llm_weights) if cfg.llm == "auto" else {}
    chat = make_chat(cfg, data)
    return trained_source(chat, data.row.single_bos, fields, generation_fields(cfg))


def save(folder: pathlib.Path, model: Llava, source: Source, writer: Writer) -> int:
    """All parameters, in PyTorch's layout, under the names that they have here."""
    write_json(folder / "config.json", {"model_type": "llava_jax"})
    return writer.weights(folder, names.lazy_torch_dict(model, stacked=("layers",)))


FAMILIES = (RunForm(save, source, ("llm",), base),)
