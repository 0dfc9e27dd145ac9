"""Tiny random checkpoints, saved by the library that the family comes from."""

import json

import pytest

ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VISION = dict(image_size=32, patch_size=8, **SMALL)
TEXT = dict(vocab_size=64, max_position_embeddings=16, **SMALL)
# Ids of the tiny vocabulary, so that the libraries have nothing to warn about.
IDS = dict(bos_token_id=62, eos_token_id=63, pad_token_id=1)
LLM = dict(vocab_size=72, num_key_value_heads=1, max_position_embeddings=64, **SMALL)


def _vision(kind):
    import transformers as tr

    dino = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2,
                num_attention_heads=2)  # fmt: skip
    text = TEXT | IDS
    return {
        "siglip": lambda: tr.SiglipVisionModel(tr.SiglipVisionConfig(**VISION)),
        "siglip-both": lambda: tr.SiglipModel(
            tr.SiglipConfig(vision_config=VISION, text_config=text)
        ),
        "clip-vision": lambda: tr.CLIPVisionModel(tr.CLIPVisionConfig(**VISION)),
        "clip-both": lambda: tr.CLIPModel(
            tr.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=8)
        ),
        "clip-text": lambda: tr.CLIPTextModel(tr.CLIPTextConfig(**text)),
        "clip-text-gelu": lambda: tr.CLIPTextModel(tr.CLIPTextConfig(hidden_act="gelu", **text)),
        "dinov2": lambda: tr.Dinov2Model(tr.Dinov2Config(**dino)),
        "dinov2-registers": lambda: tr.Dinov2WithRegistersModel(
            tr.Dinov2WithRegistersConfig(num_register_tokens=3, **dino)
        ),
        "llava": lambda: tr.LlavaForConditionalGeneration(
            tr.LlavaConfig(
                vision_config=tr.CLIPVisionConfig(**VISION), text_config=tr.LlamaConfig(**LLM),
                image_token_index=70, image_seq_length=16,
            )
        ),
        "llava-next": lambda: tr.LlavaNextForConditionalGeneration(
            tr.LlavaNextConfig(
                vision_config=tr.CLIPVisionConfig(**VISION),
                text_config=tr.MistralConfig(sliding_window=None, head_dim=16, **LLM),
                image_token_index=70, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [96, 32]],
            )
        ),
        "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**LLM)),
    }[kind]()  # fmt: skip


def _diffusion(kind):
    from diffusers.models import AutoencoderKL, UNet2DConditionModel

    widths = dict(block_out_channels=(16, 32), norm_num_groups=4)
    blocks = dict(
        sample_size=8, layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **widths,
    )  # fmt: skip
    return {
        "sd-unet": lambda: UNet2DConditionModel(attention_head_dim=2, **blocks),
        "sd-unet-21": lambda: UNet2DConditionModel(
            attention_head_dim=[1, 2], use_linear_projection=True, upcast_attention=True, **blocks
        ),
        "sd-vae": lambda: AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
            sample_size=16, **widths,
        ),
    }[kind]()  # fmt: skip


def make(kind: str):
    """A tiny model of the library in eval mode; nothing in it is zero or one by its start."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    pytest.importorskip("transformers", reason=ORACLE)
    torch.manual_seed(0)
    if kind.startswith("sd-"):
        pytest.importorskip("diffusers", reason=ORACLE)
        model = _diffusion(kind)
    else:
        model = _vision(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(kind) -> folder in which the library saved a tiny random model of this kind."""
    made = {}

    def folder(kind: str):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            make(kind).save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Files of a CLIPTokenizer whose vocabulary has 64 entries."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    entries = [*words, *(w + "</w>" for w in words), "ab", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>",
                   unk_token="<|endoftext|>", pad_token="<|endoftext|>")  # fmt: skip
    config = special | dict(tokenizer_class="CLIPTokenizer", model_max_length=16)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder
