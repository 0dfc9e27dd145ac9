"""Reads a Llama-family GGUF file: config, weights by Hugging Face names, tokenizer.

GGUF is llama.cpp's container: metadata and (quantised) tensors in one file. The `gguf` package
(extra `quickstart`) parses and dequantises it; this module translates:

* tensor names, `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`, float32
  [out, in];
* q and k rows. llama.cpp rotates neighbouring pairs (0,1), (2,3), ... of a head, Hugging Face
  rotates (0, H/2), (1, H/2 + 1), ...; its converter interleaves the rows of q and k, undone here:

      file, one head of H = 6:   0 3 1 4 2 5      ->      0 1 2 3 4 5

* metadata -> the fields of Hugging Face's LlamaConfig, and a tokenizer: byte-level BPE, or
  SentencePiece, whose files have scores instead of merges.

Quantised weights are returned as the float32 numbers that they encode; the precision that
quantisation lost is not restored.
"""

import pathlib
import re
from collections.abc import Mapping

import numpy as np

from metamorph_jax.errors import GGUFError

MAGIC = b"GGUF"
ROPE_FACTORS = "rope_freqs.weight"

# GGUF name -> Hugging Face name; {i} is the layer.
GLOBAL_KEYS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_KEYS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_NAME = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")

# Values of `tokenizer.ggml.token_type`. CONTROL and USER_DEFINED tokens are never split.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# Text splitting before BPE, by `tokenizer.ggml.pre`.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = ("smollm", "llama-bpe", "gpt-2", "default")



def open_gguf(path):
    """A `gguf.GGUFReader` over `path`, or GGUFError for a wrong, truncated or foreign file."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    with path.open("rb") as f:
        head = f.read(4)
    if head != MAGIC:
        raise GGUFError(f"{path} is not a GGUF file: it starts with {head!r}, expected {MAGIC!r}")
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "reading GGUF files needs the gguf package: pip install 'metamorph_jax[quickstart]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        # The reader maps tensors lazily; touching the shapes finds a file cut inside the data.
        for tensor in reader.tensors:
            if tensor.data.nbytes != tensor.n_bytes:
                raise ValueError(f"{tensor.name}: {tensor.data.nbytes} of {tensor.n_bytes} bytes")
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        size = path.stat().st_size
        raise GGUFError(
            f"{path} ({size:,} bytes) is truncated or damaged: {type(error).__name__}: {error}"
        ) from error
    return reader


def field(reader, key: str, default=None):
    """The value of a metadata key; GGUFError if it is absent and there is no default."""
    entry = reader.get_field(key)
    if entry is not None:
        return entry.contents()
    if default is None:
        raise GGUFError(f"metadata key {key!r} is missing")
    return default


def read_config(reader) -> dict:
    """Fields of Hugging Face's LlamaConfig, plus `max_position_embeddings` and token ids."""
    arch = field(reader, "general.architecture")
    if arch != "llama":
        raise GGUFError(f"general.architecture is {arch!r}; only 'llama' is supported")
    names = {tensor.name: tensor for tensor in reader.tensors}
    if any("_exps" in name for name in names):
        raise GGUFError("mixture-of-experts weights are not supported")
    heads = int(field(reader, "llama.attention.head_count"))
    width = int(field(reader, "llama.embedding_length"))
    head_dim = int(field(reader, "llama.attention.key_length", width // heads))
    rotated = int(field(reader, "llama.rope.dimension_count", head_dim))
    if rotated != head_dim:
        raise GGUFError(f"partial rotation ({rotated} of {head_dim} per head) is not supported")
    if "token_embd.weight" not in names:
        raise GGUFError("tensor token_embd.weight is missing")
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": int(field(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(field(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field(reader, "llama.attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "vocab_size": int(names["token_embd.weight"].shape[1]),
        # float32 of 1e-5 prints as 9.99999974e-06; the shortest decimal is what was meant.
        "rms_norm_eps": _decimal(field(reader, "llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _decimal(field(reader, "llama.rope.freq_base", 10000.0)),
        "max_position_embeddings": int(field(reader, "llama.context_length", 2048)),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        "hidden_act": "silu",
    }
    scaling = reader.get_field("llama.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        if scaling.contents() != "linear":
            raise GGUFError(f"RoPE scaling {scaling.contents()!r} is not supported")
        factor = float(field(reader, "llama.rope.scaling.factor"))
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if ROPE_FACTORS in names:
        factors = np.asarray(names[ROPE_FACTORS].data, np.float32).reshape(-1)
        config["rope_scaling"] = llama3_scaling(factors, head_dim, config["rope_theta"])
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        entry = reader.get_field(f"tokenizer.ggml.{theirs}_token_id")
        if entry is not None:
            config[f"{ours}_token_id"] = int(entry.contents())
    return config


def llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> dict:
    """The published rope scaling that has these divisors of the frequencies, float32[H/2].

    Llama 3.1 stretches by 8, 3.2 by 32; llama.cpp stores the resulting factors, not the rule."""
    freq = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = 8192 * freq / (2 * np.pi)
    keep = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    for factor in (8.0, 32.0):
        expected = 1 / (keep + (1 - keep) / factor)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise GGUFError(f"the factors of {ROPE_FACTORS} are neither Llama 3.1's nor Llama 3.2's")


def hf_name(name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor, or None if we don't know it."""
    if name in GLOBAL_KEYS:
        return GLOBAL_KEYS[name]
    match = LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in LAYER_KEYS:
        return None
    return f"model.layers.{match[1]}.{LAYER_KEYS[match[2]]}.{match[3]}"


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in Hugging Face's order. rows: float[heads * H, ...]"""
    H = rows.shape[0] // heads
    split = rows.reshape(heads, H // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


class Weights(Mapping):
    """Every weight by Hugging Face name, float32, matrices [out, in]; dequantised when asked for.

    Raises:
        GGUFError: for unknown names, missing ones, wrong shapes, unknown quantisations.
    """

    def __init__(self, reader, config: dict):
        from gguf import GGML_QUANT_SIZES

        self._config = config
        self._tensors, unknown, found = {}, [], set()
        for tensor in reader.tensors:
            if tensor.name == ROPE_FACTORS:  # read_config has turned them into a rope scaling
                continue
            name = hf_name(tensor.name)
            if name is None:
                unknown.append(tensor.name)
                continue
            if tensor.tensor_type not in GGML_QUANT_SIZES:
                raise GGUFError(f"{tensor.name}: unknown quantisation {tensor.tensor_type}")
            self._tensors[name] = tensor
            found.add((name, self.shape_of(name)))
        if unknown:
            raise GGUFError(f"{len(unknown)} unknown tensors: {', '.join(sorted(unknown)[:8])}")
        missing = sorted(expected_shapes(config).items() - found)
        if missing:
            listed = ", ".join(f"{k} {v}" for k, v in missing[:8])
            raise GGUFError(f"{len(missing)} tensors are missing or have another shape: {listed}")

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            value = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise GGUFError(f"{tensor.name}: cannot dequantise {kind}") from error
        value = np.asarray(value, np.float32).reshape(self.shape_of(name))
        if ".q_proj." in name:
            return unpermute(value, self._config["num_attention_heads"])
        if ".k_proj." in name:
            return unpermute(value, self._config["num_key_value_heads"])
        return value

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def expected_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that the config implies (biases aside)."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N, K, H = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    layer = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D),
        "self_attn.o_proj": (D, N * H),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(config["num_hidden_layers"]):
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    return out


def read_tokenizer(reader):
    """transformers.PreTrainedTokenizerFast with the file's special tokens and chat template.

    encode() adds BOS and EOS as the file says; where it doesn't, a SentencePiece tokenizer adds
    BOS, as in llama.cpp.
    """
    from transformers import PreTrainedTokenizerFast

    model = field(reader, "tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise GGUFError(
            f"tokenizer model {model!r} is not supported, only byte-level BPE ('gpt2') and "
            "SentencePiece ('llama')"
        )
    pieces, kinds = _pieces(reader)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = builders[model](reader, vocab, kinds)
    _add_atomic(tokenizer, pieces, kinds)
    special = {
        f"{ours}_token": _token(reader, pieces, theirs)
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    _add_ends(tokenizer, reader, vocab, special, bos_default=model == "llama")
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=int(field(reader, "llama.context_length", 2048)),
        **{k: v for k, v in special.items() if v is not None},
    )
    template = reader.get_field("tokenizer.chat_template")
    if template is not None:
        out.chat_template = template.contents()
    return out


def _pieces(reader) -> tuple[list[str], list[int]]:
    """(text, kind) of every token."""
    pieces = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type", [NORMAL] * len(pieces))
    twice = len(pieces) - len(set(pieces))
    if twice:
        raise GGUFError(f"{twice} duplicate tokens in tokenizer.ggml.tokens")
    if len(kinds) != len(pieces):
        raise GGUFError(f"{len(kinds)} kinds of {len(pieces)} tokens in tokenizer.ggml.token_type")
    return pieces, kinds


def _token(reader, pieces: list[str], what: str) -> str | None:
    """The token with this role (bos, eos, …), if the file names one."""
    entry = reader.get_field(f"tokenizer.ggml.{what}_token_id")
    return None if entry is None else pieces[int(entry.contents())]


def _add_atomic(tokenizer, pieces: list[str], kinds: list[int]) -> None:
    """Tells a tokenizer which tokens are never split."""
    from tokenizers import AddedToken

    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        atomic = [p for p, k in zip(pieces, kinds, strict=True) if k == kind]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(piece, special=special, normalized=False) for piece in atomic])


def _add_ends(tokenizer, reader, vocab, special: Mapping, bos_default: bool) -> None:
    """Makes a tokenizer add BOS and EOS, where the file asks for it."""
    from tokenizers.processors import TemplateProcessing

    def wanted(what: str, default: bool) -> list[str]:
        token = special[f"{what}_token"]
        add = field(reader, f"tokenizer.ggml.add_{what}_token", default)
        return [token] if add and token is not None else []

    bos, eos = wanted("bos", bos_default), wanted("eos", False)
    if bos or eos:
        single, second = ([*bos, f"${name}", *eos] for name in "AB")
        tokenizer.post_processor = TemplateProcessing(
            single=single, pair=single + second, special_tokens=[(t, vocab[t]) for t in bos + eos]
        )


def load_tokenizer(path):
    """The tokenizer of a GGUF file, without touching its weights."""
    return read_tokenizer(open_gguf(path))


def _byte_level(reader, vocab: dict[str, int], kinds):
    from tokenizers import Tokenizer, decoders, models

    merges = [tuple(pair.split(" ", 1)) for pair in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(field(reader, "tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(reader, vocab: dict[str, int], kinds):
    """As Llama 2's in transformers: a space is "▁", one is put before the text, and characters that
    are in no token are spelled in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    given = field(reader, "tokenizer.ggml.merges", [])
    if given:
        merges = [tuple(pair.split(" ", 1)) for pair in given]
    else:
        merges = implied_merges(vocab, field(reader, "tokenizer.ggml.scores"), kinds)
    unknown = next((piece for piece, i in vocab.items() if kinds[i] == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space_first = bool(field(reader, "tokenizer.ggml.add_space_prefix", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        "▁", prepend_scheme="first" if space_first else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * space_first)
    return tokenizer


def implied_merges(vocab: dict[str, int], scores, kinds) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary: of all neighbours that together make a token, those
    with the highest score are merged first.

    Control tokens, bytes and other tokens of a special kind don't take part.
    """
    if len(scores) != len(vocab):
        raise GGUFError(f"{len(scores)} scores of {len(vocab)} tokens in tokenizer.ggml.scores")
    normal = {piece: i for piece, i in vocab.items() if kinds[i] == NORMAL}
    found = [
        (-scores[i], i, -cut, piece[:cut], piece[cut:])
        for piece, i in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _pre_tokenizer(name: str):
    from tokenizers import Regex, pre_tokenizers

    if name == "smollm":
        return pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ])  # fmt: skip
    if name in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "llama-bpe":
        return pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    raise GGUFError(f"pre-tokenizer {name!r} is not supported; known: {', '.join(PRE_TOKENIZERS)}")


def _decimal(x) -> float:
    """The shortest decimal that rounds to this float32."""
    return float(str(np.float32(x)))
