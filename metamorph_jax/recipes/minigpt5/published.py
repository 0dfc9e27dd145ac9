"""MiniGPT-5's checkpoints, how our runs are written, and parity with other libraries.

Read: `hf:KZ-ucsc/MiniGPT5`, files of what was trained, over the weights of the parts
(`checkpoints.py`); and whole models that we wrote.

Written: a whole model in safetensors, under the names of `keys.py`, with a config.json of our own
and the tokenizer (there is no such model in transformers); `--to reference`, a file of what was
trained, for the public code; `--to connector`, a small one of added rows and mapper alone.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from metamorph_jax import config
from metamorph_jax.convert import agree, blip2, clip_text, compare, diffusion, export, hf, specs
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.convert import mapper as mapper_names
from metamorph_jax.convert import vit as vit_names
from metamorph_jax.convert.chat_template import recognised
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.convert.families import Family, Reference, RunForm
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.data import tokenizers
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipes.minigpt5 import checkpoints, keys
from metamorph_jax.recipes.minigpt5.config import Config, added_names, is_trained_part, llm_config
from metamorph_jax.recipes.minigpt5.input import load_tokenizer
from metamorph_jax.recipes.minigpt5.keys import export_minigpt5, load_minigpt5
from metamorph_jax.recipes.minigpt5.layout import published_keys
from metamorph_jax.recipes.minigpt5.model import MiniGPT5
from metamorph_jax.recipes.minigpt5.model import create as model_of

KIND = "minigpt5"
# What the public code asks for beside the tensors of a checkpoint.
_LIGHTNING = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.0.2"}

# ---- in


def load_whole(model: MiniGPT5, cfg: Config, folder: pathlib.Path) -> None:
    """Fills the model, in place, from a folder with the whole of it.

    Adapters of the model, which no such folder has, are left as they are.

    Raises:
        ConfigError: it is a file of what was trained, or a config.json in it is that of another
            model.
        WeightError: names or shapes don't fit.
    """
    if several := sorted(file.name for file in folder.glob("*.ckpt")):
        raise ConfigError(
            f"{folder} holds {', '.join(several)}, which have what was trained and are no whole "
            f"model: name a file of stage 1 as {checkpoints.FIRST}, and one of stage 2 as "
            f"{checkpoints.SECOND}"
        )
    check_config(cfg, folder)
    load_minigpt5(model, hf.Tensors(folder), adapters=False)


# Fields that shapes don't show.
_RESAMPLER = ("heads", "qk_norm", "cross_every", "norm_eps")
_MAPPER = ("vokens", "heads", "kind", "learned_queries", "norm_eps")


def check_config(cfg: Config, folder: pathlib.Path) -> None:
    """Compares a config with the config.json of a folder that we wrote, in what shapes don't show.

    Raises:
        ConfigError: naming all differences, see `agree`.
    """

    def differences() -> list[str]:
        theirs = config_from_hf(hf.read_config(folder))
        unets = [c.decoder.denoiser for c in (cfg, theirs)]
        pairs = [
            (llm_config(cfg), llm_config(theirs), agree.LLM, "llm."),
            (cfg.vision.vit, theirs.vision.vit, (*agree.TOWER, "depth"), "tower."),
            (cfg.qformer, theirs.qformer, ("norm_eps",), "qformer."),
            (cfg.qformer.resampler, theirs.qformer.resampler, _RESAMPLER, "qformer.resampler."),
            (cfg.mapper, theirs.mapper, _MAPPER, "mapper."),
            (*unets, ("num_heads", "norm_num_groups", "norm_eps"), "unet."),
            (cfg.decoder.schedule, theirs.decoder.schedule, agree.SCHEDULE, "schedule."),
        ]
        return [line for pair in pairs for line in agree.differences(*pair)]

    agree.require(str(folder), differences)


def of_checkpoint(spec: str, fields: Mapping) -> tuple[Config, DataConfig] | None:
    """How a run that we wrote is used without a config file; None if it is no MiniGPT-5.

    It computes in bfloat16 unless its config.json says float32.

    Args:
        spec: "hf:OWNER/NAME" or a folder.
        fields: of its config.json, {} without one.
    """
    if not fields or not FAMILY.matches(fields):
        return None
    cfg = config_from_hf(fields, export.computing_dtype(fields))
    cfg = dataclasses.replace(cfg, weights=spec, tokenizer=spec)
    length = min(llm_config(cfg).max_positions, export.LONGEST)
    row = {"length": length} | (recognised(specs.tokenizer(spec)) or {})
    return cfg, DataConfig(row=RowConfig(**row))


# ---- configs


def config_from_hf(fields: Mapping, dtype: str = "float32") -> Config:
    """The config in a config.json that we wrote.

    Args:
        dtype: that the model computes in.
    """
    if not isinstance(fields.get("config"), Mapping):
        raise ConfigError(f"config.json of a {KIND}: config is not a table of options")
    return computing_in(config.build(Config, fields["config"], "config.json: config"), dtype)


def computing_in(cfg: Config, dtype: str) -> Config:
    """The config with this dtype in all that is read by the language model, and in it."""
    resampler = dataclasses.replace(cfg.qformer.resampler, dtype=dtype)
    return dataclasses.replace(
        cfg,
        vision=dataclasses.replace(cfg.vision, dtype=dtype),
        qformer=dataclasses.replace(cfg.qformer, resampler=resampler),
        dtype=dtype,
    )


def config_to_hf(cfg: Config) -> dict:
    """config.json: every option, but nothing of where weights came from. Adapters have been merged
    by then."""
    llm = {k: v for k, v in vars(llm_config(cfg)).items() if k not in ("dtype", "remat")}
    vision = dataclasses.replace(cfg.vision, weights=specs.RANDOM)
    alone = dataclasses.replace(
        cfg, llm="tiny", llm_options=llm, llm_weights=specs.RANDOM, vision=vision,
        qformer_weights=specs.RANDOM, weights="", stage1_weights="", stage2_weights="",
        sd_weights=specs.RANDOM, tokenizer="", caption_tokenizer="", lora=None,
    )  # fmt: skip
    return {
        "architectures": ["MiniGPT5"],
        "model_type": KIND,
        "config": dataclasses.asdict(alone),
    }


# ---- out


def save(folder: pathlib.Path, model: MiniGPT5, source: Source, writer: Writer) -> int:
    """config.json, safetensors and the tokenizer; returns bytes of all tensors."""
    ids = export.write_generation(folder, source)
    kind = {"torch_dtype": writer.torch_dtype, "dtype": writer.torch_dtype}
    export.write_json(folder / "config.json", config_to_hf(model.cfg) | ids | kind)
    _write_tokenizer(folder, model, source)
    return writer.weights(folder, export_minigpt5(model))


def save_reference(folder: pathlib.Path, model: MiniGPT5, source: Source, writer: Writer) -> int:
    """What the public code has of a model, `stage1.ckpt` or `stage2.ckpt`, and the tokenizer.

    Returns:
        Bytes of all tensors.

    Raises:
        ConfigError: more was trained than such a file has.
    """
    _refuse_more(model.cfg)
    _write_tokenizer(folder, model, source)
    file, tensors = checkpoints.file_of(folder, model)
    return writer.torch_file(file, tensors, _LIGHTNING)


def save_vokens(folder: pathlib.Path, model: MiniGPT5, source: Source, writer: Writer) -> int:
    """Added rows and mapper alone, in safetensors; returns bytes of all tensors.

    Raises:
        ConfigError: more was trained than that.
    """
    _refuse_more(model.cfg)
    return writer.weights(folder, checkpoints.export_vokens(model), "vokens")


def save_beside_adapters(folder: pathlib.Path, model: MiniGPT5, source: Source) -> int:
    """`save_vokens`, for what is trained beside adapters."""
    return save_vokens(folder, model, source, Writer())


def _refuse_more(cfg: Config) -> None:
    """Raises ConfigError for a model of which Q-Former or denoiser were trained."""
    trained = [name for name in ("train_connector", "train_denoiser") if getattr(cfg, name)]
    if trained:
        raise ConfigError(f"config.model.{' and '.join(trained)}: what they train has no place in "
                          "such a file; the whole model has it (--to hf)")  # fmt: skip


def _write_tokenizer(folder: pathlib.Path, model: MiniGPT5, source: Source) -> None:
    if source.tokenizer is not None:
        rows, added = model.llm.cfg.vocab_size, added_names(model.cfg)
        tokenizers.extend(source.tokenizer, rows, added).save_pretrained(folder)


def _save_published(family, folder, model, source: Source, writer: Writer) -> int:
    """What `metamorph convert` makes of a checkpoint; as `save`."""
    if source.tokenizer is None and source.folder is not None and tokenizers.is_in(source.folder):
        source = dataclasses.replace(source, tokenizer=tokenizers.load(source.folder))
    return save(folder, model, source, writer)


# ---- runs


def base(cfg: Config) -> str:
    """Spec of the published weights that a run started from, or ""."""
    whole = cfg.weights and not cfg.weights.startswith(WORKDIR)
    spec = cfg.weights if whole and not is_trained_part(cfg.weights) else cfg.llm_weights
    return "" if spec == specs.RANDOM else spec


def source(cfg: Config, data: DataConfig) -> Source:
    """What the folder of a run takes over beside its weights."""
    fields = specs.llm_fields(cfg.llm_weights) if cfg.llm == "auto" else {}
    generation = specs.generation_fields(
        "" if cfg.weights else base(cfg), llm_config(cfg).vocab_size
    )
    chat = Chat.of(load_tokenizer(cfg), data.row)
    return export.trained_source(chat, data.row.single_bos, fields, generation)


# ---- against other libraries


def _compare(model: MiniGPT5, tensors: Mapping, rng) -> compare.Rows:
    """Every part, with what other libraries have of it; of towers only EVA."""
    found, decoder, rows = keys.plainly(tensors), model.decoder, {}
    own = lambda prefix: dict(keys.cut(found, prefix))  # noqa: E731
    parts = [
        ("Q-Former", _their_qformer(model, found), model.connector.resampler, _resampled),
        ("llm", _their_llm(model, own(keys.LLM)), model.llm, compare.llama),
        ("mapper", _their_mapper(model, found), model.mapper, _mapped),
        ("unet", _theirs(diffusion.unet_to_hf, own(keys.UNET), decoder.denoiser),
         decoder.denoiser, compare.unet),
    ]  # fmt: skip
    if model.vision.tower.cfg.layout == "eva":
        parts.append(("tower", _their_tower(model, found), model.vision.tower, compare.vit))
    if decoder.vae is not None:
        theirs = _theirs(diffusion.vae_to_hf, own(keys.VAE), decoder.vae)
        parts.append(("vae", theirs, decoder.vae, compare.vae))
    if model.text_encoder is not None:
        theirs = _their_text(model, own(keys.TEXT))
        parts.append(("text encoder", theirs, model.text_encoder, compare.clip_text))
    for name, theirs, ours, compared in parts:
        rows |= {f"{name}, {k}": v for k, v in compared(ours, theirs.eval(), rng).items()}
    return rows


def _theirs(config_to_hf, tensors: Mapping, part):
    """The model of diffusers for this part."""
    model = compare.diffusers_from_config(config_to_hf(part.cfg))
    compare.fill(model, tensors)
    return model


def _of_transformers(name: str, fields: Mapping, tensors: Mapping):
    """The model of transformers of this name, with these options and tensors."""
    _, transformers = compare.oracle()
    kind = getattr(transformers, name.removesuffix("Model").removesuffix("ForCausalLM") + "Config")
    own = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
    model = getattr(transformers, name)(kind(**own, attn_implementation="eager"))
    known = set(model.state_dict())
    short = {k.removeprefix(clip_text.PREFIX): v for k, v in tensors.items()}
    compare.fill(model, tensors if tensors.keys() <= known else short)
    return model


def _their_tower(model: MiniGPT5, found: Mapping):
    tower = model.vision.tower
    theirs = blip2.for_transformers(_inside(found, blip2.TOWER))
    theirs |= {"post_layernorm.weight": np.ones(tower.cfg.width),
               "post_layernorm.bias": np.zeros(tower.cfg.width)}  # fmt: skip
    return _of_transformers("Blip2VisionModel", vit_names.config_to_hf(tower.cfg), theirs)


def _inside(found: Mapping, prefix: str) -> dict:
    return {key: found[key] for key in found if key.startswith(prefix)}


def _their_qformer(model: MiniGPT5, found: Mapping):
    cfg = model.connector.cfg.resampler
    fields = dict(
        hidden_size=cfg.width, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        intermediate_size=cfg.mlp_width, layer_norm_eps=cfg.norm_eps,
        cross_attention_frequency=cfg.cross_every, encoder_hidden_size=cfg.key_width,
    )  # fmt: skip
    inside = blip2.qformer_for_transformers(_inside(found, blip2.QFORMER))
    return _of_transformers("Blip2QFormerModel", fields, inside)


def _their_llm(model: MiniGPT5, tensors: Mapping):
    fields = llama_names.config_to_hf(model.llm.cfg)
    return _of_transformers("LlamaForCausalLM", fields, tensors)


def _their_text(model: MiniGPT5, tensors: Mapping):
    fields = clip_text.config_to_hf(model.text_encoder.cfg)
    return _of_transformers("CLIPTextModel", fields, tensors)


def _their_mapper(model: MiniGPT5, found: Mapping):
    """torch's own transformer."""
    torch, _ = compare.oracle()
    cfg = model.mapper.cfg
    theirs = torch.nn.Transformer(
        cfg.inner, cfg.heads, cfg.encoder_layers, cfg.decoder_layers, cfg.mlp_width, 0.0,
        norm_first=True, batch_first=True, layer_norm_eps=cfg.norm_eps,
    )  # fmt: skip
    compare.fill(theirs, dict(keys.cut(found, mapper_names.TRANSFORMER)))
    return theirs


def _resampled(ours, theirs, rng) -> compare.Rows:
    cfg = ours.cfg
    tokens = rng.normal(size=(compare.BATCH, 7, cfg.key_width)).astype(np.float32)
    queries = np.repeat(np.asarray(ours.queries[...]), compare.BATCH, 0)
    torch, _ = compare.oracle()
    with torch.no_grad():
        out = theirs(query_embeds=compare.to_torch(queries),
                     encoder_hidden_states=compare.to_torch(tokens))  # fmt: skip
    found = compare.run(lambda resampler, x: resampler(x), ours, tokens)
    return {"queries": (compare.to_numpy(found), compare.to_numpy(out.last_hidden_state))}


def _mapped(ours, theirs, rng) -> compare.Rows:
    cfg = ours.cfg
    states = rng.normal(size=(compare.BATCH, cfg.vokens, cfg.width)).astype(np.float32)
    features, found = compare.run(lambda m, x: (m.features(x), m(x).context), ours, states)
    queries = np.repeat(np.asarray(ours.table()), compare.BATCH, 0)
    torch, _ = compare.oracle()
    with torch.no_grad():
        out = theirs(compare.to_torch(np.array(features)), compare.to_torch(queries))
    return {"context": (compare.to_numpy(found), compare.to_numpy(out))}


# ---- families


def create(cfg: Config, *, rngs) -> MiniGPT5:
    return model_of(cfg, rngs)


SIZES = {"minigpt5-7b": Config()}
FAMILY = Family(
    KIND,
    (KIND,),
    config_from_hf,
    config_to_hf,
    create,
    load_minigpt5,
    export_minigpt5,
    SIZES,
    lambda fields: published_keys(config_from_hf(fields)),
    Reference(hf.Tensors, _compare, library="transformers, diffusers and torch, part by part"),
    _save_published,
)
RUN = RunForm(
    save, source, ("llm",), base, save_reference, save_vokens, save_beside_adapters,
    of_checkpoint=of_checkpoint, keeps_adapters=True,
)  # fmt: skip
FAMILIES = (RUN, FAMILY)
