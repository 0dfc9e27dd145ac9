"""MM-Interleaved's checkpoints, and how our runs are written.

Read: `OpenGVLab/MM-Interleaved`, the whole model in torch files of float32, under the names of
`keys.py`. Beside them lies neither a config nor a tokenizer: the sizes are the defaults of
`Config`, the tokenizer is that of Vicuna.

Written: the same tensors in safetensors, with a config.json of our own and the tokenizer (there is
no such model in transformers); or torch files for the public code (`--to reference`), which reads
every `*.bin` of a folder.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping

import numpy as np
from flax import nnx

from metamorph_jax import config, files
from metamorph_jax.convert import agree, compare, diffusion, export, hf, specs, vit
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.convert.chat_template import recognised
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.convert.families import Family, Reference, RunForm
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.convert.vit_adapter import PREFIX as CLIP
from metamorph_jax.data import tokenizers
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.errors import ConfigError, FileError, HubError
from metamorph_jax.models import build
from metamorph_jax.models.llm.llama import Llama
from metamorph_jax.models.vision.vit import ViT
from metamorph_jax.recipes.mm_interleaved import keys
from metamorph_jax.recipes.mm_interleaved.config import PLACEHOLDER, SOI, Config, llm_config
from metamorph_jax.recipes.mm_interleaved.input import load_tokenizer, markers
from metamorph_jax.recipes.mm_interleaved.keys import export_mm_interleaved, load_mm_interleaved
from metamorph_jax.recipes.mm_interleaved.layout import published_keys
from metamorph_jax.recipes.mm_interleaved.model import MMInterleaved
from metamorph_jax.recipes.mm_interleaved.model import create as model_of

KIND = "mm_interleaved"
_INSIDE = "mm_interleaved_pretrain"  # folder of the published repository with the weights
_VICUNA = "hf:lmsys/vicuna-13b-v1.3"

# ---- in


def folder_of(where: pathlib.Path) -> pathlib.Path:
    """The folder with the weight files: `where`, or the one in it that the published repository
    has."""
    inside = where / _INSIDE
    return inside if inside.is_dir() and not any(where.glob("*.safetensors")) else where


def read(folder: pathlib.Path) -> Mapping[str, np.ndarray]:
    """The tensors of a checkpoint by their published names."""
    return hf.Tensors(folder_of(folder))


def load_whole(model: MMInterleaved, cfg: Config, folder: pathlib.Path) -> None:
    """Fills the model, in place, from a folder with the whole of it.

    Raises:
        ConfigError: a config.json in it is that of another model.
        WeightError: names or shapes don't fit.
    """
    check_config(cfg, folder)
    load_mm_interleaved(model, read(folder))


# Fields that shapes don't show.
_RESAMPLER = ("heads", "qk_norm", "cross_every", "norm_eps")
_INSERT = ("every", "heads", "points", "levels", "base")
_DENOISER = ("heads", "points", "sides", "middle_base")


def check_config(cfg: Config, folder: pathlib.Path) -> None:
    """Compares a config with the config.json of a folder that we wrote, in what shapes don't show.

    Published files have none: their sizes are the defaults.

    Raises:
        ConfigError: naming all differences, see `agree`.
    """
    if not (folder / "config.json").is_file():
        return

    def differences() -> list[str]:
        theirs = config_from_hf(hf.read_config(folder))
        unets = [c.decoder.denoiser.unet for c in (cfg, theirs)]
        pairs = [
            (llm_config(cfg), llm_config(theirs), agree.LLM, "llm."),
            (cfg.vision.vit, theirs.vision.vit, (*agree.TOWER, "depth"), "tower."),
            (cfg.vision.adapter, theirs.vision.adapter, ("points", "norm_eps"), "adapter."),
            (cfg.vision.resampler, theirs.vision.resampler, _RESAMPLER, "vision.resampler."),
            (cfg.insert, theirs.insert, _INSERT, "insert."),
            (cfg.context.resampler, theirs.context.resampler, _RESAMPLER, "context.resampler."),
            (cfg.decoder.denoiser, theirs.decoder.denoiser, _DENOISER, "denoiser."),
            (*unets, ("num_heads", "norm_num_groups", "norm_eps"), "unet."),
            (cfg.decoder.schedule, theirs.decoder.schedule, agree.SCHEDULE, "schedule."),
        ]
        return [line for pair in pairs for line in agree.differences(*pair)]

    agree.require(str(folder), differences)


def of_checkpoint(spec: str, fields: Mapping) -> tuple[Config, DataConfig] | None:
    """How the published files, or a run that we wrote, are used without a config file; None if they
    are no MM-Interleaved.

    Published files compute in bfloat16, but for the autoencoder and the adapter's sampling offsets;
    a run does as it was trained, language model and tower as its config.json says.

    Args:
        spec: "hf:OWNER/NAME" or a folder.
        fields: of its config.json, {} without one.
    """
    if not fields:
        where = folder_of(hf.find(spec))
        if not _has_published_names(where):
            return None
        cfg = dataclasses.replace(PUBLISHED, weights=spec, tokenizer=_tokenizer_of(where))
        return computing_in(cfg, "bfloat16"), DataConfig(row=_row(_PUBLISHED_ROW))
    if not FAMILY.matches(fields):
        return None
    cfg = config_from_hf(fields, export.computing_dtype(fields))
    there = tokenizers.is_in(hf.find(spec))
    cfg = dataclasses.replace(cfg, weights=spec, tokenizer=spec if there else _VICUNA)
    length = min(llm_config(cfg).max_positions, export.LONGEST)
    template = recognised(specs.tokenizer(spec)) if there else None
    return cfg, DataConfig(row=_row({"length": length} | (template or {})))


def computing_in(cfg: Config, dtype: str) -> Config:
    """The config with all parts but the autoencoder computing in this dtype."""
    own = lambda part: dataclasses.replace(part.resampler, dtype=dtype)  # noqa: E731
    vision = dataclasses.replace(cfg.vision, dtype=dtype, resampler=own(cfg.vision))
    context = dataclasses.replace(cfg.context, resampler=own(cfg.context))
    unet = dataclasses.replace(cfg.decoder.denoiser.unet, dtype=dtype)
    denoiser = dataclasses.replace(cfg.decoder.denoiser, unet=unet)
    decoder = dataclasses.replace(cfg.decoder, denoiser=denoiser)
    return dataclasses.replace(cfg, dtype=dtype, vision=vision, context=context, decoder=decoder)


PUBLISHED = Config()  # what the published files are
_PUBLISHED_ROW = {"length": 2048, "images": 30}


def fields_of_published(folder: pathlib.Path) -> dict | None:
    """What a config.json beside the published files would say; None if the folder has others."""
    return config_to_hf(PUBLISHED) if _has_published_names(folder_of(folder)) else None


def _tokenizer_of(folder: pathlib.Path) -> str:
    """Spec of the tokenizer beside the published files, or Vicuna's, as they come without one."""
    return str(folder) if tokenizers.is_in(folder) else _VICUNA


def _row(options: dict) -> RowConfig:
    return RowConfig(**{"template": "document"} | options)


def _has_published_names(folder: pathlib.Path) -> bool:
    """Whether the index of torch files is that of the published ones; other sizes are refused when
    they are read."""
    index = folder / "pytorch_model.bin.index.json"
    if not index.is_file():
        return False
    try:
        listed = files.read_json(index).get("weight_map")
    except FileError:
        return False
    return isinstance(listed, dict) and keys.is_published(listed)


# ---- configs


def config_from_hf(fields: Mapping, dtype: str = "float32") -> Config:
    """The config in a config.json that we wrote.

    Args:
        dtype: that the model computes in.
    """
    if not isinstance(fields.get("config"), Mapping):
        raise ConfigError(f"config.json of a {KIND}: config is not a table of options")
    cfg = config.build(Config, fields["config"], "config.json: config")
    vision = dataclasses.replace(cfg.vision, dtype=dtype)
    return dataclasses.replace(cfg, vision=vision, dtype=dtype)


def config_to_hf(cfg: Config) -> dict:
    """config.json: every option, but nothing of where weights came from."""
    llm = {k: v for k, v in vars(llm_config(cfg)).items() if k not in ("dtype", "remat")}
    vision = dataclasses.replace(cfg.vision, weights=specs.RANDOM)
    alone = dataclasses.replace(
        cfg, llm="tiny", llm_options=llm, llm_weights=specs.RANDOM, vision=vision, weights="",
        sd_weights=specs.RANDOM, tokenizer="",
    )  # fmt: skip
    return {
        "architectures": ["MMInterleaved"],
        "model_type": KIND,
        "config": dataclasses.asdict(alone),
    }


# ---- out


def save(folder: pathlib.Path, model: MMInterleaved, source: Source, writer: Writer) -> int:
    """config.json, safetensors and the tokenizer; returns bytes of all tensors."""
    ids = export.write_generation(folder, source)
    kind = {"torch_dtype": writer.torch_dtype, "dtype": writer.torch_dtype}
    export.write_json(folder / "config.json", config_to_hf(model.cfg) | ids | kind)
    _write_tokenizer(folder, model, source)
    return writer.weights(folder, export_mm_interleaved(model, 0))  # biases as exact as they are


def save_reference(
    folder: pathlib.Path, model: MMInterleaved, source: Source, writer: Writer
) -> int:
    """Torch files for the public code, and the tokenizer; returns bytes of all tensors.

    The public code merges all `*.bin` of a folder; one of them is in memory at a time.
    """
    _write_tokenizer(folder, model, source)
    bias = {} if writer.dtype == "F32" else {"frozen_bias": 0}
    tensors, parts = export_mm_interleaved(model, **bias), [[]]
    for key in tensors:
        size = sum(4 * int(np.prod(tensors.shape_of(k))) for k in (*parts[-1], key))
        if size > writer.most and parts[-1]:
            parts.append([])
        parts[-1].append(key)
    where, total = {}, 0
    for n, part in enumerate(parts, 1):
        file = folder / f"pytorch_model-{n:05d}-of-{len(parts):05d}.bin"
        total += writer.torch_file(file, tensors.only(part))
        where |= dict.fromkeys(part, file.name)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    export.write_json(folder / "pytorch_model.bin.index.json", index)
    return total


def _write_tokenizer(folder: pathlib.Path, model: MMInterleaved, source: Source) -> None:
    rows = model.llm.cfg.vocab_size
    if source.tokenizer is not None:
        tokenizers.extend(source.tokenizer, rows, [SOI, PLACEHOLDER]).save_pretrained(folder)


def _save_published(family, folder, model, source: Source, writer: Writer) -> int:
    """What `metamorph convert` makes of a checkpoint; as `save`. Without a tokenizer in its folder,
    it is written without one if Vicuna's can't be had."""
    if source.tokenizer is None and source.folder is not None:
        try:
            tokenizer = specs.tokenizer(_tokenizer_of(folder_of(source.folder)))
            source = dataclasses.replace(source, tokenizer=tokenizer)
        except HubError as error:
            print(f"written without a tokenizer, which is that of {_VICUNA}: {error}",
                  file=sys.stderr, flush=True)  # fmt: skip
    return save(folder, model, source, writer)


# ---- runs


def base(cfg: Config) -> str:
    """Spec of the published weights that a run started from, or ""."""
    whole = cfg.weights and not cfg.weights.startswith(WORKDIR)
    spec = cfg.weights if whole else cfg.llm_weights
    return "" if spec == specs.RANDOM else spec


def source(cfg: Config, data: DataConfig) -> Source:
    """What the folder of a run takes over beside its weights."""
    fields = specs.llm_fields(cfg.llm_weights) if cfg.llm == "auto" else {}
    generation = specs.generation_fields(
        "" if cfg.weights else base(cfg), llm_config(cfg).vocab_size
    )
    chat = Chat.of(load_tokenizer(cfg), data.row, markers(cfg))
    return export.trained_source(chat, data.row.single_bos, fields, generation)


# ---- against other libraries


def _compare(model: MMInterleaved, tensors: Mapping, rng) -> compare.Rows:
    """The parts that other libraries have: tower, language model, both without what MM-Interleaved
    adds to them, UNet and autoencoder."""
    tower, decoder, rows = model.vision.adapter.tower, model.decoder, {}
    parts = [
        ("tower", _their_tower(tower, tensors), tower, compare.vit),
        ("llm", *_plain_llms(model, tensors), compare.llama),
        ("unet", _theirs(diffusion.unet_to_hf, keys.UNET, decoder.denoiser.unet, tensors),
         decoder.denoiser.unet, compare.unet),
    ]  # fmt: skip
    if decoder.vae is not None:
        theirs = _theirs(diffusion.vae_to_hf, keys.VAE, decoder.vae, tensors)
        parts.append(("vae", theirs, decoder.vae, compare.vae))
    for name, theirs, ours, compared in parts:
        rows |= {f"{name}, {k}": v for k, v in compared(ours, theirs.eval(), rng).items()}
    return rows


def _inside(tensors: Mapping, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _theirs(config_to_hf, prefix: str, part, tensors: Mapping):
    """The model of diffusers for this part."""
    model = compare.diffusers_from_config(config_to_hf(part.cfg))
    compare.fill(model, _inside(tensors, prefix))
    return model


def _their_tower(tower: ViT, tensors: Mapping):
    """CLIP of transformers, with a final norm, which hidden states don't pass through."""
    _, transformers = compare.oracle()
    fields = vit.config_to_hf(tower.cfg)
    own = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
    model = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**own, attn_implementation="eager")
    )
    inside = _inside(tensors, keys.TOWER + CLIP)
    inside |= {"post_layernorm.weight": np.ones(tower.cfg.width),
               "post_layernorm.bias": np.zeros(tower.cfg.width)}  # fmt: skip
    # Versions of transformers differ in whether the names in memory have the prefix.
    known = {name.removeprefix(CLIP): name for name in model.state_dict()}
    compare.fill(model, {known[k]: v for k, v in inside.items() if k in known})
    return model


def _plain_llms(model: MMInterleaved, tensors: Mapping):
    """(that of transformers, one of ours) without MMFS, and without biases of the output table."""
    _, transformers = compare.oracle()
    cfg = dataclasses.replace(model.llm.cfg, head_bias=False)
    own = {f"model.{k}": v for k, v in _inside(tensors, keys.LLM).items()
           if keys.INSERT not in k and "inv_freq" not in k}  # fmt: skip
    own[llama_names.HEAD] = tensors[f"{keys.FROZEN}weight"]
    fields = llama_names.config_to_hf(cfg)
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**fields, attn_implementation="eager")
    )
    compare.fill(theirs, own)
    ours = nnx.eval_shape(lambda: Llama(cfg, rngs=build.rngs(0)))
    llama_names.load_llama(ours, own)
    return theirs, ours


# ---- families


def create(cfg: Config, *, rngs: nnx.Rngs) -> MMInterleaved:
    return model_of(cfg, rngs)


SIZES = {"mm-interleaved-13b": PUBLISHED}
FAMILY = Family(
    KIND,
    (KIND,),
    config_from_hf,
    config_to_hf,
    create,
    load_mm_interleaved,
    export_mm_interleaved,
    SIZES,
    lambda fields: published_keys(config_from_hf(fields)),
    Reference(read, _compare, library="transformers and diffusers, part by part"),
    _save_published,
    read,
    fields_of_published,
)
RUN = RunForm(save, source, ("llm",), base, save_reference, of_checkpoint=of_checkpoint)
FAMILIES = (RUN, FAMILY)
