"""Whole MetaMorph checkpoints by the names of the public implementation.

    llm         model.embed_tokens / model.layers / model.norm / lm_head     (convert/llama.py)
    tower       model.vision_tower.vision_tower.[vision_model.]…             (convert/vit.py)
    reducer     model.vision_tower.{token,channel}_mixing.{weight,bias}      mlpmixer only; our names
    connector   model.mm_projector.{0,2,…}.{weight,bias}, one linear: model.mm_projector.…
    head        vision_head.{0,2[,4]}.{weight,bias},      one linear: vision_head.…
                a head that samples, which the public one doesn't have: vision_head.NAME, our names

Dropped on purpose: `model.vision_proj`, which never had a gradient.

What we write instead is the language model for transformers, with its new tokens as rows of the
tables, and tower/, connector/ and head/ beside it. Both are read. The image decoder's files are in
`recipes/decoder/published.py`.
"""  # noqa: E501

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.config import build
from metamorph_jax.convert import agree, compare, families, hf, names, specs, vision, vit
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.convert.chat_template import recognised
from metamorph_jax.convert.export import (
    Source,
    Writer,
    computing_dtype,
    context_length,
    save_part,
    trained_source,
    write_generation,
    write_json,
)
from metamorph_jax.convert.families import Family, Reference, RunForm
from metamorph_jax.convert.llama import export_llama, load_llama
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.convert.vit import export_complete, export_vit, load_vit
from metamorph_jax.data import tokenizers
from metamorph_jax.data.chat import END_TOKEN, START_TOKEN, Chat, Markers
from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.data.images import preprocess_from_hf
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.heads.visual_flow import FlowConfig, FlowHead
from metamorph_jax.models.heads.visual_regression import VisualHead
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.models.vision.vit import SIZES as TOWER_SIZES
from metamorph_jax.models.vision.vit import ViT, ViTConfig
from metamorph_jax.recipes.metamorph.config import Config, llm_config
from metamorph_jax.recipes.metamorph.model import MetaMorph
from metamorph_jax.recipes.metamorph.model import create as model_of

TOWER, CONNECTOR, HEAD = "model.vision_tower.vision_tower.", "model.mm_projector.", "vision_head."
REDUCER = "model.vision_tower."
DROPPED = ("model.vision_proj.",)
OWN = (REDUCER, CONNECTOR, HEAD, *DROPPED)  # TOWER starts with REDUCER; the rest is the llm's


def _head_names(head: VisualHead | FlowHead) -> Callable[[str], str]:
    """Our names of a head's parameters to published ones."""
    return sequential(head.linears) if isinstance(head, VisualHead) else lambda key: key


def sequential(linears) -> Callable[[str], str]:
    """Our `linears.i` are items 0, 2, 4 … of a torch Sequential; a single one has no number."""
    if len(linears) == 1:
        return lambda key: key.removeprefix("linears.0.")
    return lambda key: re.sub(r"^linears\.(\d+)", lambda m: str(2 * int(m[1])), key)


def _parts(model: nnx.Module):
    """(prefix, module, rename) of what is neither tower nor llm."""
    parts = [(REDUCER, model.vision.reducer, lambda key: key),
             (CONNECTOR, model.connector, sequential(model.connector.linears))]  # fmt: skip
    return parts + ([] if model.head is None else [(HEAD, model.head, _head_names(model.head))])


def read(folder: pathlib.Path) -> Mapping[str, np.ndarray]:
    """The tensors of a checkpoint by the names above.

    Args:
        folder: of the public implementation, or what `metamorph convert` writes: a language model
            with tower/, connector/ and head/ beside it.
    """
    parts = [("", hf.Tensors(folder))]
    for name, prefix in (("tower", TOWER), ("connector", ""), ("head", "")):
        if (folder / name / "config.json").is_file():
            parts.append((prefix, hf.Tensors(folder / name)))
    return names.Joined(*parts)


def load_metamorph(model: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills a MetaMorph model in place; reports what doesn't fit in all parts at once."""
    problems = []

    def attempt(load, *args, **kwargs):
        try:
            load(*args, **kwargs)
        except ValueError as error:
            problems.append(str(error))

    tower = model.vision.tower
    if tower is not None:
        inside = names.Mapped(tensors, only=lambda key: key.startswith(TOWER))
        attempt(load_vit, tower, inside, vit.tower_prefix(tower.cfg, inside, TOWER))
    for prefix, part, rename in _parts(model):
        inside = names.Mapped(
            tensors, only=lambda key, p=prefix: key.startswith(p) and not key.startswith(TOWER)
        )
        attempt(names.load_torch_dict, part, inside, prefix, rename=rename)
    known = OWN if model.head is not None else (REDUCER, CONNECTOR, *DROPPED)
    attempt(load_llama, model.llm, names.Mapped(tensors, only=lambda k: not k.startswith(known)))
    if problems:
        raise ValueError("\n".join(problems))


def export_metamorph(model: nnx.Module, tower=export_vit) -> names.Lazy:
    """Published name -> array of the whole model, fetched when asked for."""
    out = export_llama(model.llm)
    found = [] if model.vision.tower is None else [tower(model.vision.tower, TOWER)]
    for prefix, part, rename in _parts(model):
        found.append(names.lazy_torch_dict(part, prefix, rename=rename))
    for part in found:
        for key in part:
            out.set(key, part.maker(key), part.shape_of(key), part.dtype_of(key))
    return out


# ---- configs

TOWERS = {"CLIP-ViT-SO400M-14-384": "siglip-so400m-384", "CLIP-ViT-SO400M-14": "siglip-so400m-384"}
_ADDED = 2  # start and end of an image


def options(cfg) -> dict:
    """The fields of a part's config, for `llm_options` and `vision.tower_options`."""
    return {k: v for k, v in vars(cfg).items() if k not in ("dtype", "remat")}


def config_from_hf(fields: Mapping, dtype: str = "float32") -> Config:
    """The config of a checkpoint's config.json: Llama's fields, and the recipe's among them.

    `vision_config` describes the tower in what we write. The reference only names it, and loads
    SigLIP SO400M at 384 pixels whatever the name."""
    if not fields.get("mm_use_im_start_end", True):
        raise ValueError("mm_use_im_start_end false: MetaMorph needs image start and end tokens")
    llm = llama_names.config_from_hf(dict(fields) | {"model_type": "llama"})
    llm = dataclasses.replace(llm, vocab_size=llm.vocab_size - _ADDED, added_tokens=_ADDED)
    tower = _tower(fields)
    if tower is None:
        made_by = {"tower": "none", "feature_width": fields["mm_hidden_size"]}
    else:
        made_by = {"tower": f"{tower.layout}-tiny", "tower_options": options(tower)}
    vision = VisionConfig(
        **made_by,
        tokens=fields.get("num_image_tokens", 64),
        reduction=fields.get("image_token_reduction", "interpolation"),
        normalize=fields.get("normalize_vision", True),
        softmax=fields.get("apply_softmax", False),
        dtype=dtype,
    )
    return Config(
        llm="tiny",  # every field of it is replaced
        llm_options=options(llm),
        vision=vision,
        connector=fields.get("mm_projector_type", "mlp2x_gelu"),
        head=fields.get("vision_head_type", "mlp"),
        flow=build(FlowConfig, fields.get("vision_head_flow", {}), "config.json: vision_head_flow"),
        visual_coef=float(fields.get("vision_coef", 1.0)),
        use_vision_ar=fields.get("use_vision_ar", True),
        dtype=dtype,
    )


def _tower(fields: Mapping) -> ViTConfig | None:
    layer = fields.get("mm_vision_select_layer", -2)
    if fields.get("vision_config"):
        return vit.config_from_hf(fields["vision_config"], select_layer=layer, final_norm=False)
    name = str(fields.get("mm_vision_tower") or "none").rsplit("/", 1)[-1]
    if name == "none":
        return None
    size = next((v for k, v in TOWERS.items() if re.match(re.escape(k) + r"($|-)", name)), None)
    if size is None:
        raise ValueError(f"mm_vision_tower {name!r} is none of {', '.join(TOWERS)}")
    return dataclasses.replace(TOWER_SIZES[size], select_layer=layer, whole=True)


def config_to_hf(cfg: Config) -> dict:
    """config.json of a checkpoint in the reference's names."""
    llm, vision, tower = llm_config(cfg), cfg.vision, cfg.vision.vit
    if llm.added_tokens != _ADDED:
        raise ValueError(f"{llm.added_tokens} added tokens; MetaMorph's two were expected")
    fields = (
        llama_names.config_to_hf(llm)
        | {
            "architectures": ["MetaMorphLlamaForCausalLM"],
            "model_type": "metamorph_llama",
            "mm_hidden_size": vision.feature_shape[1],
            "mm_projector_type": cfg.connector,
            "mm_use_im_start_end": True,
            "mm_use_im_patch_token": False,
            "vision_head_type": cfg.head,
            "num_image_tokens": vision.tokens,
            "image_token_reduction": vision.reduction,
            "normalize_vision": vision.normalize,
            "apply_softmax": vision.softmax,
            "vision_coef": cfg.visual_coef,
            "use_vision_ar": cfg.use_vision_ar,
        }
        | ({"vision_head_flow": dataclasses.asdict(cfg.flow)} if cfg.head == "flow" else {})
    )
    if tower is None:
        return fields | {"mm_vision_tower": "none"}
    fields["mm_vision_tower"] = "siglip/CLIP-ViT-SO400M-14-384"
    # A tower that holds only the layers it runs ends with the one that it gives out.
    fields["mm_vision_select_layer"] = tower.select_layer if tower.whole else -1
    return fields | {"vision_config": vit.config_to_hf(tower)}


def published(fields: Mapping) -> list[str]:
    """Every key of the checkpoint that a config.json belongs to."""
    cfg = config_from_hf(fields)
    llm, tower = llm_config(cfg), cfg.vision.vit
    keys = llama_names.published(llama_names.config_to_hf(llm))
    kind = cfg.connector
    count = int(kind[3 : kind.index("x_")]) if kind.endswith("x_gelu") else 1
    count = {"identity": 0, "mlpsoftmax": 2}.get(kind, count)
    keys += _sequential_keys(CONNECTOR, count)
    if cfg.head == "flow":
        keys += _flow_keys(cfg.flow.depth)
    else:
        keys += _sequential_keys(HEAD, {"mlp": 2, "mlp2x_gelu": 3}.get(cfg.head, 1))
    if cfg.vision.reduce.reduces and cfg.vision.reduction == "mlpmixer":
        keys += [
            f"{REDUCER}{k}_mixing.{x}" for k in ("token", "channel") for x in ("weight", "bias")
        ]
    if tower is not None:
        own = vit.PREFIXES[tower.layout]
        keys += [TOWER + k.removeprefix(own) for k in vit.published(vit.config_to_hf(tower))]
    return keys


def _flow_keys(depth: int) -> list[str]:
    linears = ["embed", "state", "time_1", "time_2", "modulation", "out"]
    linears += [f"blocks.{n}.{part}" for n in range(depth) for part in ("modulation", "fc1", "fc2")]
    return [f"{HEAD}null", *(f"{HEAD}{x}.{leaf}" for x in linears for leaf in ("weight", "bias"))]


def _sequential_keys(prefix: str, count: int) -> list[str]:
    places = [""] if count == 1 else [f"{2 * i}." for i in range(count)]
    return [f"{prefix}{place}{leaf}" for place in places for leaf in ("weight", "bias")]


_VISUAL = {"tokens": "image_tokens", "reduction": "reduction", "normalize": "normalize_vision",
           "softmax": "apply_softmax"}  # fmt: skip
_LAYER = {"select_layer": "tower_layer", "final_norm": "tower_final_norm"}


def check_config(cfg: Config, folder: pathlib.Path) -> None:
    """Compares a config with what the files of a whole checkpoint say and shapes don't.

    Images are prepared as the preprocessing beside `vision.weights` says, which may be the folder
    of the checkpoint's tower; without it they are stretched.

    Raises:
        ConfigError: naming all differences, see `agree`.
    """
    if not (pathlib.Path(folder) / "config.json").is_file():
        return  # weights alone
    fields = hf.read_config(folder)
    checks = [lambda: llama_names.disagreements(llm_config(cfg), fields | {"model_type": "llama"})]
    if fields.get("model_type") in FAMILY.kinds:
        checks.append(lambda: _visual_differences(cfg, fields))
    else:
        checks = [lambda: llama_names.disagreements(llm_config(cfg), fields)]
        checks.append(lambda: _part_differences(cfg, pathlib.Path(folder)))
    advice = (
        "config.model has to say the same (of images: config.model.vision.tower_options.mean and "
        ".std); without --config it is as the checkpoint says"
    )
    agree.require(str(folder), *checks, advice=advice)


def _visual_differences(cfg: Config, fields: Mapping) -> list[str]:
    """Of the public implementation's config.json."""
    theirs = config_from_hf(fields)
    ours, stated = (vars(v) | {"tokens": v.feature_shape[0]} for v in (cfg.vision, theirs.vision))
    found = agree.differences(ours, stated, _VISUAL, "vision.")
    if cfg.vision.vit is not None and theirs.vision.vit is not None:
        found += agree.differences(cfg.vision.vit, theirs.vision.vit, agree.TOWER, "tower.")
    return found


def _part_differences(cfg: Config, folder: pathlib.Path) -> list[str]:
    """Of the folders beside a language model that we wrote."""
    found = []
    if (folder / "connector" / "config.json").is_file():
        stated = hf.read_config(folder / "connector")
        theirs = {ours: stated[key] for ours, key in _VISUAL.items() if key in stated}
        ours = vars(cfg.vision) | {"tokens": cfg.vision.feature_shape[0]}
        found += agree.differences(ours, theirs, theirs, "vision.")
    tower = cfg.vision.vit
    if tower is not None and (folder / "tower" / "config.json").is_file():
        found += vit.disagreements(tower, hf.read_config(folder / "tower"))
        if (process := specs.processor_fields(str(folder / "tower"))) is not None:
            ours = vision.preprocessing(cfg.vision)  # but the tower is the whole checkpoint's
            ours = dataclasses.replace(ours, mean=tuple(tower.mean), std=tuple(tower.std))
            found += vision.pixel_differences(ours, process)
    return found


def of_checkpoint(spec: str, fields: Mapping) -> tuple[Config, DataConfig] | None:
    """How a published checkpoint, or a run that we wrote for transformers, is used without a config
    file; None if it is no MetaMorph.

    It computes in bfloat16 unless it was saved in float32. Questions are written as the tokenizer's
    chat template says if we wrote it, else as in the paper (llama3).

    Args:
        spec: "hf:OWNER/NAME" or a folder.
        fields: of its config.json.

    Raises:
        ConfigError: the run was written by a version that did not say which layer of the tower it
            reads.
    """
    folder, dtype = hf.find(spec), computing_dtype(fields)
    if FAMILY.matches(fields):
        cfg = config_from_hf(fields, dtype)
    elif (folder / "connector" / "config.json").is_file():
        cfg = _of_parts(folder, fields, dtype)
    else:
        return None
    written = recognised(specs.tokenizer(spec)) or {}
    row = RowConfig(length=context_length(fields), **written)
    return dataclasses.replace(cfg, weights=spec, tokenizer=spec), DataConfig(row=row)


def _of_parts(folder: pathlib.Path, fields: Mapping, dtype: str) -> Config:
    """The config of what `save` wrote."""
    stated = hf.read_config(folder / "connector")
    seen = (folder / "tower" / "config.json").is_file()
    needed = {"kind", "in", *_VISUAL.values(), *(_LAYER.values() if seen else ())}
    if absent := needed - stated.keys():
        raise ConfigError(f"{folder}/connector/config.json lacks {', '.join(sorted(absent))}: give "
                          "--config FILE[:SIZE], which says what the model is")  # fmt: skip
    llm = llama_names.config_from_hf(fields)
    llm = dataclasses.replace(llm, vocab_size=llm.vocab_size - _ADDED, added_tokens=_ADDED)
    made_by = {"tower": "none", "feature_width": stated["in"]}
    if seen:
        layer = {ours: stated[key] for ours, key in _LAYER.items()}
        tower = vit.config_from_hf(hf.read_config(folder / "tower"), **layer)
        if (process := specs.processor_fields(str(folder / "tower"))) is not None:
            pixels = preprocess_from_hf(process)
            tower = dataclasses.replace(tower, mean=pixels.mean, std=pixels.std)
        made_by = {"tower": f"{tower.layout}-tiny", "tower_options": options(tower)}
    visual = {ours: stated[key] for ours, key in _VISUAL.items()}
    head = folder / "head" / "config.json"
    said = hf.read_config(folder / "head") if head.is_file() else {"kind": "none"}
    flow = build(FlowConfig, said.get("flow", {}), f"{head}: flow")
    vision = VisionConfig(**made_by, **visual, dtype=dtype)
    return Config(llm="tiny", llm_options=options(llm), vision=vision, connector=stated["kind"],
                  head=said.get("kind", "mlp"), flow=flow, dtype=dtype)  # fmt: skip


# ---- family


def export(model: MetaMorph) -> names.Lazy:
    """As `config_to_hf` describes it: always with a final norm of the tower."""
    return export_metamorph(model, export_complete)


def create(cfg: Config, *, rngs: nnx.Rngs) -> MetaMorph:
    return model_of(cfg, rngs)


# ---- against torch


def _compare(model: MetaMorph, tensors: Mapping, rng) -> compare.Rows:
    """Each part against a torch module made from the same tensors."""
    llm, tower = _torch_llm(model.llm.cfg, tensors), model.vision.tower
    rows = {f"llm, {k}": v for k, v in compare.llama(model.llm, llm, rng).items()}
    if tower is not None:
        theirs = _torch_tower(tower, tensors)
        rows |= {f"tower, {k}": v for k, v in compare.vit(tower, theirs, rng).items()}
    torch, _ = compare.oracle()
    gelu, softmax = torch.nn.GELU(), model.cfg.connector == "mlpsoftmax"
    for name, part, prefix, between in (
        ("connector", model.connector, CONNECTOR, torch.nn.Softmax(-1) if softmax else gelu),
        ("head", model.head, HEAD, gelu),
    ):
        # A head that samples is ours alone: torch has nothing to compare it with.
        if part is not None and not isinstance(part, FlowHead) and len(part.linears):
            rows[name] = _compare_linears(part, prefix, between, tensors, rng)
    return rows


def _compare_linears(part, prefix: str, between, tensors: Mapping, rng) -> tuple:
    torch, _ = compare.oracle()
    width = part.linears[0].kernel.shape[0]
    x = rng.normal(size=(compare.BATCH, 3, width)).astype(np.float32)
    own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    with torch.no_grad():
        wanted = _torch_linears(own, between)(compare.to_torch(x))
    found = compare.run(lambda part, x: part(x), part, jnp.asarray(x))
    return compare.to_numpy(found), compare.to_numpy(wanted)


def _torch_llm(cfg, tensors: Mapping):
    _, transformers = compare.oracle()
    fields = llama_names.config_to_hf(cfg)
    own = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
    config = transformers.LlamaConfig(**own, attn_implementation="eager")
    llm = transformers.LlamaForCausalLM(config)
    compare.fill(llm, {k: v for k, v in tensors.items() if not k.startswith(OWN)})
    return llm.eval()


def _torch_tower(tower: ViT, tensors: Mapping):
    _, transformers = compare.oracle()
    fields = vit.config_to_hf(tower.cfg)
    kind = fields.pop("architectures")[0]
    own = {k: v for k, v in fields.items() if k not in ("model_type", "torch_dtype")}
    config = getattr(transformers, kind.replace("Model", "Config"))(**own)
    model = getattr(transformers, kind)._from_config(config, attn_implementation="eager")
    inside = {
        k[len(TOWER) :].removeprefix("vision_model."): v
        for k, v in tensors.items()
        if k.startswith(TOWER)
    }
    if kind.startswith("Dinov2"):  # transformers 5 has its own names for these in memory
        renamed = (("attention.attention.query", "attention.q_proj"),
                   ("attention.attention.key", "attention.k_proj"),
                   ("attention.attention.value", "attention.v_proj"),
                   ("attention.output.dense", "attention.o_proj"))  # fmt: skip
        for old, new in renamed:
            inside = {k.replace(old, new): v for k, v in inside.items()}
    wanted = set(model.state_dict())
    compare.fill(model, {k: v for k, v in inside.items() if k in wanted})
    return model.eval()


def _torch_linears(tensors: Mapping, between):
    """Linear, activation, Linear … of a torch Sequential's tensors."""
    torch, _ = compare.oracle()
    parts = []
    for key in sorted(k for k in tensors if k.endswith("weight")):
        w, b = tensors[key], tensors[key.replace("weight", "bias")]
        linear = torch.nn.Linear(w.shape[1], w.shape[0])
        linear.weight.data, linear.bias.data = (
            torch.tensor(np.asarray(x, np.float32)) for x in (w, b)
        )
        parts += [between, linear]
    return torch.nn.Sequential(*parts[1:])


# ---- what is written


def save(folder: pathlib.Path, model: MetaMorph, source: Source, writer: Writer) -> int:
    """The language model for transformers, and the other parts in folders of their own.

    tower/ loads with transformers' vision model of its family; connector/ and head/ hold the
    tensors under the names of the reference implementation, and a config.json that says what they
    are.

    Returns:
        Bytes of all tensors.
    """
    llm = model.llm
    added = [START_TOKEN, END_TOKEN][: llm.cfg.added_tokens]
    tokenizer = tokenizers.extend(source.tokenizer, llm.cfg.vocab_size, added)
    family = families.of_fields(llama_names.config_to_hf(llm.cfg))
    source = dataclasses.replace(source, tokenizer=tokenizer)
    total = family.write(folder, llm, source, writer)
    (P, C), cfg, D = model.feature_shape, model.cfg, llm.cfg.width
    visual = {
        "image_tokens": P,
        "reduction": cfg.vision.reduction,
        "normalize_vision": cfg.vision.normalize,
        "apply_softmax": cfg.vision.softmax,
        "image_start_id": model.image_start,
        "image_end_id": model.image_end,
    }
    if (tower := cfg.vision.vit) is not None:
        layer = tower.select_layer if tower.whole else -1
        visual |= {"tower_layer": layer, "tower_final_norm": tower.final_norm}
    parts = [("connector", CONNECTOR, model.connector, {"kind": cfg.connector, "in": C, "out": D})]
    if model.head is not None:
        kind = {"kind": cfg.head, "in": D, "out": C}
        kind |= {"flow": dataclasses.asdict(cfg.flow)} if cfg.head == "flow" else {}
        parts.append(("head", HEAD, model.head, kind))
    for name, prefix, part, what in parts:
        rename = _head_names(part) if name == "head" else sequential(part.linears)
        tensors = names.lazy_torch_dict(part, prefix, rename=rename)
        if name == "connector":  # what stands between tower and connector goes with it
            tensors.update(names.lazy_torch_dict(model.vision.reducer, REDUCER))
        total += writer.weights(folder / name, tensors)
        write_json(folder / name / "config.json", {"part": name, **what, **visual})
    if model.vision.tower is not None:
        total += vit.save_tower(folder / "tower", model.vision.tower, writer)
    return total


def save_reference(folder: pathlib.Path, model: MetaMorph, source: Source, writer: Writer) -> int:
    """One checkpoint of the whole model in the names of the public implementation.

    Returns:
        Bytes of all tensors.
    """
    llm = model.llm.cfg
    added = [START_TOKEN, END_TOKEN][: llm.added_tokens]
    tokenizers.extend(source.tokenizer, llm.vocab_size, added).save_pretrained(folder)
    total = save_part(FAMILY, folder, model, Source(), writer)
    ids = write_generation(folder, source)
    write_json(folder / "config.json", hf.read_config(folder) | ids)
    return total


def _save_published(family, folder, model, source: Source, writer: Writer) -> int:
    tokenizer = source.tokenizer or tokenizers.load(source.folder)
    return save(folder, model, dataclasses.replace(source, tokenizer=tokenizer), writer)


def load_tokenizer(cfg: Config):
    """The tokenizer that the config names, or that of its weights.

    Raises:
        ConfigError: it has ids that the model's table doesn't have.
    """
    whole = "" if cfg.weights.startswith(WORKDIR) else cfg.weights
    found, llm = specs.tokenizer(cfg.tokenizer or whole or cfg.llm_weights), llm_config(cfg)
    tokenizers.check_ids(found, llm.vocab_size, [START_TOKEN, END_TOKEN][: llm.added_tokens])
    return found


def markers(cfg: Config) -> Markers:
    """Start and end token: the two ids after the language model's own."""
    start = llm_config(cfg).vocab_size
    return Markers((start,), (start + 1,))


def generation_fields(cfg: Config) -> dict:
    """The generation_config.json of the weights that the config names; see `specs`."""
    return specs.generation_fields(base(cfg), llm_config(cfg).vocab_size)


def source(cfg: Config, data: DataConfig) -> Source:
    """What the folder of a run takes over beside its weights."""
    fields = specs.llm_fields(cfg.llm_weights) if cfg.llm == "auto" else {}
    chat = Chat.of(load_tokenizer(cfg), data.row, markers(cfg))
    return trained_source(chat, data.row.single_bos, fields, generation_fields(cfg))


def base(cfg: Config) -> str:
    """Spec of the published weights that a run started from, or ""."""
    whole = cfg.weights and not cfg.weights.startswith(WORKDIR)
    spec = cfg.weights if whole else cfg.llm_weights
    return "" if spec == specs.RANDOM else spec


FAMILY = Family(
    "metamorph",
    ("metamorph_llama",),
    config_from_hf,
    config_to_hf,
    create,
    load_metamorph,
    export,
    {
        "metamorph-8b": Config(),
        "metamorph-tiny": Config(llm="tiny", vision=VisionConfig("siglip-tiny", tokens=4)),
    },
    published,
    Reference(hf.Tensors, _compare, library="torch, part by part"),
    _save_published,
)
RUN = RunForm(save, source, ("llm",), base, save_reference, of_checkpoint=of_checkpoint)
