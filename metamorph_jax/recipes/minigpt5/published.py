"""How runs of MiniGPT-5 are written and read."""

import pathlib

from metamorph_jax.convert import export, hf, names, specs
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.convert.families import RunForm
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.data import tokenizers
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import DataConfig
from metamorph_jax.recipes.minigpt5.config import Config, added_names
from metamorph_jax.recipes.minigpt5.input import load_tokenizer
from metamorph_jax.recipes.minigpt5.model import MiniGPT5

_STACKED = ("layers",)


def load_whole(model: MiniGPT5, cfg: Config, folder: pathlib.Path) -> None:
    """Fills the model, in place, from a folder with the whole of it."""
    names.load_torch_dict(model, hf.Tensors(folder), stacked=_STACKED)


def save(folder: pathlib.Path, model: MiniGPT5, source: Source, writer: Writer) -> int:
    """Safetensors and the tokenizer; returns bytes of all tensors."""
    ids = export.write_generation(folder, source)
    export.write_json(folder / "config.json", {"model_type": "minigpt5"} | ids)
    if source.tokenizer is not None:
        rows, added = model.llm.cfg.vocab_size, added_names(model.cfg)
        tokenizers.extend(source.tokenizer, rows, added).save_pretrained(folder)
    return writer.weights(folder, names.lazy_torch_dict(model, stacked=_STACKED))


def base(cfg: Config) -> str:
    """Spec of the published weights that a run started from, or ""."""
    whole = cfg.weights and not cfg.weights.startswith(WORKDIR)
    spec = cfg.weights if whole else cfg.llm_weights
    return "" if spec == specs.RANDOM else spec


def source(cfg: Config, data: DataConfig) -> Source:
    """What the folder of a run takes over beside its weights."""
    fields = specs.llm_fields(cfg.llm_weights) if cfg.llm == "auto" else {}
    generation = specs.generation_fields("" if cfg.weights else base(cfg))
    chat = Chat.of(load_tokenizer(cfg), data.row)
    return export.trained_source(chat, data.row.single_bos, fields, generation)


FAMILIES = (RunForm(save, source, ("llm",), base),)
