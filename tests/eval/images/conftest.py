"""A tiny CLIP with a tokenizer, and folders of small images."""

import json
import string

import numpy as np
import pytest
from PIL import Image

ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """CLIP whose tokens are letters: 26 of them, 26 that end a word, start and end."""
    pytest.importorskip("torch", reason=ORACLE)
    import transformers as tr

    folder = tmp_path_factory.mktemp("clip")
    letters = string.ascii_lowercase
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=54, max_position_embeddings=16, bos_token_id=52, eos_token_id=53)
    cfg = tr.CLIPConfig(vision_config=dict(image_size=32, patch_size=8, **size),
                        text_config=text | size, projection_dim=8)  # fmt: skip
    tr.CLIPModel(cfg).save_pretrained(folder)
    process = tr.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    process.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory):
    """(drawn, real): 12 noisy images each, which differ in their mean colour."""
    rng = np.random.default_rng(0)
    out = []
    for name, mean in (("drawn", 90), ("real", 150)):
        folder = tmp_path_factory.mktemp(name)
        for i in range(12):
            pixels = rng.normal(mean, 30, (20 + i, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
        out.append(folder)
    return tuple(out)
