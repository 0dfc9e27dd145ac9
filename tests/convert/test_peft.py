"""Adapters in and out of PEFT's format, against the `peft` package at tiny size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from metamorph_jax.convert import changes, peft
from metamorph_jax.convert import llama as convert
from metamorph_jax.models import build, lora
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig
from metamorph_jax.models.llm.llama import Llama
from metamorph_jax.models.vision import vit

ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"
SMALL = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 61, (2, 9))


@pytest.fixture(scope="module")
def oracle():
    """(fresh torch model, fresh model of ours with the same weights, its config.json)."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    pytest.importorskip("peft", reason=ORACLE)
    config = transformers.LlamaConfig(**SMALL)

    def theirs():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    tensors = {k: v.numpy() for k, v in theirs().state_dict().items()}

    def ours():
        llm = Llama(convert.config_from_hf(config.to_dict()), rngs=nnx.Rngs(0))
        convert.load_llama(llm, tensors)
        return llm

    return theirs, ours


def our_logits(llm):
    graph, state = nnx.split(llm)

    @jax.jit
    def run(state):
        llm, (B, L) = nnx.merge(graph, state), IDS.shape
        mask = jnp.tril(jnp.ones((L, L), bool))[None].repeat(B, 0)
        positions = jnp.tile(jnp.arange(L), (B, 1))
        return llm.logits(llm(llm.embed_tokens(jnp.asarray(IDS)), positions, mask))

    return np.asarray(run(state))


def their_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def shake(model):
    """B of PEFT starts as zeros."""
    import torch

    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


CASES = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "rslora, dropout": dict(
        r=4, lora_alpha=3, target_modules="all-linear", use_rslora=True, lora_dropout=0.3
    ),
    "some layers": dict(
        r=3, lora_alpha=3, target_modules=["o_proj", "gate_proj"], layers_to_transform=[0, 2]
    ),
    "patterns": dict(
        r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 5, "layers.1.self_attn.q_proj": 1},
        alpha_pattern={"down_proj": 11},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_import(oracle, tmp_path, case):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(oracle[0](), LoraConfig(task_type="CAUSAL_LM", **CASES[case]))
    shake(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)  # "auto" asks the hub
    llm = oracle[1]()
    before = our_logits(llm)
    cfg = peft.load_peft(llm, tmp_path)
    got, want = our_logits(llm), their_logits(theirs.eval())
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(our_logits(lora.merged(llm)), want, atol=1e-5)
    assert np.abs(got - before).max() > 0.05
    base, wanted = convert.export_llama(oracle[1]()), convert.export_llama(lora.merged(llm))
    found = changes.with_adapters(base, tmp_path)
    assert found.keys() == wanted.keys()
    for key in wanted:
        np.testing.assert_allclose(found[key], wanted[key], atol=1e-6, err_msg=key)
    assert (cfg.dropout, cfg.rslora) == ((0.3, True) if "rslora" in case else (0.0, False))
    # Into a model that has the adapters already, with another rank and alpha.
    other = oracle[1]()
    lora.add(other, lora.LoraConfig(cfg.target, rank=7, alpha=5.0), rngs=nnx.Rngs(0))
    peft.load_peft(other, tmp_path)
    np.testing.assert_allclose(our_logits(other), want, atol=1e-5)


@pytest.mark.parametrize(
    "target, rslora", [(r"layers.*self_attn\.(q|v)_proj", False), (r".*_proj", True)]
)
def test_export(oracle, tmp_path, target, rslora):
    from peft import PeftModel

    llm = oracle[1]()
    lora.add(llm, lora.LoraConfig(target, rank=3, alpha=5.0, rslora=rslora), rngs=nnx.Rngs(1))
    for i, (_, linear) in enumerate(lora.adapters(llm)):
        linear.lora_b[...] = 0.3 * jax.random.normal(jax.random.key(i), linear.lora_b.shape)
    peft.export_peft(llm, tmp_path, base="some/model")
    theirs = PeftModel.from_pretrained(oracle[0](), tmp_path).eval()
    np.testing.assert_allclose(our_logits(llm), their_logits(theirs), atol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "some/model"
    again = oracle[1]()
    peft.load_peft(again, tmp_path)
    one, two = peft.tensors(llm), peft.tensors(again)
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


def test_several_adapters_become_patterns(oracle, tmp_path):
    from peft import PeftModel

    llm = oracle[1]()
    lora.add(llm, lora.LoraConfig(".*q_proj", rank=2, alpha=3.0), rngs=nnx.Rngs(1))
    lora.add(llm, lora.LoraConfig(".*up_proj", rank=4, alpha=9.0), rngs=nnx.Rngs(2))
    for i, (_, linear) in enumerate(lora.adapters(llm)):
        linear.lora_b[...] = 0.3 * jax.random.normal(jax.random.key(i), linear.lora_b.shape)
    theirs = PeftModel.from_pretrained(oracle[0](), peft.export_peft(llm, tmp_path)).eval()
    np.testing.assert_allclose(our_logits(llm), their_logits(theirs), atol=1e-5)


def test_towers_and_unets_come_back(tmp_path):
    def tower():
        return vit.ViT(vit.SIZES["siglip-tiny"], rngs=nnx.Rngs(0))

    def unet():
        model = nnx.eval_shape(lambda: UNet(UNetConfig.tiny(), build.rngs(0)))
        return model

    cases = ((tower, ".*(q_proj|fc1)", "vision_model.encoder.layers.1.mlp.fc1"),
             (unet, r".*attn2\.to_out\.0", "mid_block.attentions.0.transformer_blocks.0.attn2"
                                           ".to_out.0"))  # fmt: skip
    for make, target, name in cases:
        model = make()
        lora.add(model, lora.LoraConfig(target, rank=2), rngs=nnx.Rngs(1))
        for i, (_, linear) in enumerate(lora.adapters(model)):
            linear.lora_b[...] = jax.random.normal(jax.random.key(i), linear.lora_b.shape)
        folder = peft.export_peft(model, tmp_path / make.__name__)
        assert f"base_model.model.{name}.lora_A.weight" in load_file(folder / peft.WEIGHTS)
        again = make()
        peft.load_peft(again, folder)
        a, b = peft.tensors(model), peft.tensors(again)
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def write(folder, tensors, **fields):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / peft.WEIGHTS)
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    (folder / peft.CONFIG).write_text(json.dumps(usual | fields))
    return folder


def test_what_does_not_fit_is_named(tmp_path):
    cfg = convert.config_from_hf({**SMALL, "rms_norm_eps": 1e-6})
    llm = Llama(cfg, rngs=nnx.Rngs(0))
    a, b = np.zeros((2, 32), np.float32), np.zeros((32, 2), np.float32)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    good = {f"{q}.lora_A.weight": a, f"{q}.lora_B.weight": b}
    for fields, word in (
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "not LORA"),
    ):
        with pytest.raises(ValueError, match=word):
            peft.load_peft(llm, write(tmp_path / "a", good, **fields))
    odd = {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": a,
           "base_model.model.lm_head.weight": a, f"{q}.lora_A.weight": a}  # fmt: skip
    with pytest.raises(ValueError, match="layers.9.*") as error:
        peft.load_peft(llm, write(tmp_path / "b", odd))
    assert "lm_head" in str(error.value) and "only half" in str(error.value)
    with pytest.raises(ValueError, match="A .2, 32., B .32, 2. of rank 3"):
        peft.load_peft(llm, write(tmp_path / "c", good, r=3))
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        (tmp_path / "d").mkdir()
        peft.load_peft(llm, tmp_path / "d")
    llm = Llama(cfg, rngs=nnx.Rngs(0))
    lora.add(llm, lora.LoraConfig("layers.*k_proj"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="only there: .*q_proj.*only here: .*k_proj"):
        peft.load_peft(llm, write(tmp_path / "e", good))
    with pytest.raises(ValueError, match="no adapters"):
        peft.tensors(Llama(cfg, rngs=nnx.Rngs(0)))
