"""Reads a Llama-family GGUF file: config, weights by Hugging Face names, tokenizer.

GGUF is llama.cpp's container: metadata and (quantised) tensors in one file. `gguf_file.py` reads it
and the `gguf` package (extra `quickstart`) dequantises it; this module translates:

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

import contextlib
import functools
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from metamorph_jax.convert.gguf_file import File
from metamorph_jax.errors import GGUFError, UserError
from metamorph_jax.files import shown

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
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")

# Squared lengths of all tokens: the work of searching for their merges takes seconds.
_MOST_CUTS = 2**28


def open_gguf(path) -> File:
    """A GGUF file that is one model.

    Raises:
        MissingFile: there is none.
        GGUFError: it is something else, damaged, or one of several parts.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ImportError(
            "reading GGUF files needs the gguf package: pip install 'metamorph_jax[quickstart]'"
        ) from None
    file = File(path)
    parts = file.get("split.count", int, 1)
    if parts > 1:
        number = file.get("split.no", int, 0) + 1
        raise file.error(
            f"it is part {number} of {parts} of a split model, which we don't read; join them "
            "with llama.cpp's `llama-gguf-split --merge`"
        )
    return file


# Metadata of the architecture that is read here, or changes nothing that is computed.
_READ = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "attention.value_length", "block_count", "context_length",
    "embedding_length", "feed_forward_length", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "rope.scaling.type", "tensor_data_layout", "vocab_size",
}  # fmt: skip
# Those that change numbers in a way that we don't compute -> the values with which they don't.
_NEUTRAL = {
    "attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,),
    "attention.scale": (0,), "attention.sliding_window": (0,), "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1), "expert_count": (0,), "expert_used_count": (0,),
    "expert_weights_scale": (0, 1), "final_logit_softcapping": (0,), "logit_scale": (0, 1),
    "residual_scale": (0, 1), "rope.scale_linear": (0, 1), "rope.scaling.attn_factor": (0, 1),
    "use_parallel_residual": (False,),
}  # fmt: skip
_ARCHITECTURE = "llama."


def _refuse_unknown(file: File) -> None:
    """GGUFError for metadata of the architecture that may change what it computes."""
    wrong = []
    for key, value in file.fields.items():
        name = key.removeprefix(_ARCHITECTURE)
        if name == key or name in _READ:
            continue
        if name not in _NEUTRAL or isinstance(value, list) or value not in _NEUTRAL[name]:
            wrong.append(f"{shown(key, 80)}={shown(repr(value), 60)}")
    if wrong:
        raise file.error(f"its metadata asks for what we don't compute: {', '.join(wrong[:8])}")


def read_config(file: File) -> dict:
    """Fields of Hugging Face's LlamaConfig, plus `max_position_embeddings` and token ids.

    Raises:
        GGUFError: it is another architecture, or its metadata is missing, of a wrong type, or asks
            for what we don't compute.
    """
    arch = file.get("general.architecture", str)
    if arch != "llama":
        raise file.error(f"general.architecture is {arch!r}; only 'llama' is supported")
    names = {tensor.name: tensor for tensor in file.tensors}
    if any("_exps" in name for name in names):
        raise file.error("mixture-of-experts weights are not supported")
    _refuse_unknown(file)
    table = names.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise file.error("tensor token_embd.weight is missing, or not a matrix")
    config = {
        "model_type": "llama",
        **_sizes(file),
        "vocab_size": table.shape[0],
        # float32 of 1e-5 prints as 9.99999974e-06; the shortest decimal is what was meant.
        "rms_norm_eps": _positive(file, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _positive(file, "llama.rope.freq_base", 10000.0),
        "max_position_embeddings": file.count("llama.context_length", 2048),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        "hidden_act": "silu",
    }
    rows = file.get("llama.vocab_size", int, table.shape[0])
    if rows != table.shape[0]:
        raise file.error(f"llama.vocab_size is {rows}, but token_embd.weight has {table.shape[0]}")
    scaling = _rope_scaling(file, names, config)
    if scaling:
        config["rope_scaling"] = scaling
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        id = _token_id(file, theirs, table.shape[0])
        if id is not None:
            config[f"{ours}_token_id"] = id
    return config


def _sizes(file: File) -> dict:
    """The sizes of a LlamaConfig, which fit each other."""
    heads = file.count("llama.attention.head_count")
    kv_heads = file.count("llama.attention.head_count_kv", heads)
    width, layers = file.count("llama.embedding_length"), file.count("llama.block_count")
    head_dim = file.count("llama.attention.key_length", max(1, width // heads))
    rotated = file.get("llama.rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise file.error(f"partial rotation ({rotated} of {head_dim} per head) is not supported")
    if file.get("llama.attention.value_length", int, head_dim) != head_dim:
        raise file.error("llama.attention.value_length is not key_length: not supported")
    if heads % kv_heads or head_dim % 2:
        raise file.error(f"{heads} heads of {head_dim}, and {kv_heads} of keys, don't fit")
    if layers * len(LAYER_KEYS) > len(file.tensors):
        raise file.error(
            f"llama.block_count is {layers}, but there are {len(file.tensors)} tensors"
        )
    return {
        "hidden_size": width,
        "intermediate_size": file.count("llama.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _positive(file: File, key: str, default=None) -> float:
    value = _decimal(file.get(key, float, default))
    if not value > 0:
        raise file.error(f"metadata key {key!r} is {value}, expected more than 0")
    return value


def _rope_scaling(file: File, names: Mapping, config: Mapping) -> dict:
    """The scaling of a LlamaConfig, or {}; GGUFError where the file leaves open which one."""
    kind = file.get("llama.rope.scaling.type", str, "")
    factor = file.get("llama.rope.scaling.factor", float, 0.0)
    if kind not in ("", "none", "linear"):
        raise file.error(f"RoPE scaling {shown(kind, 60)!r} is not supported")
    if kind == "" and factor not in (0, 1):
        raise file.error(
            f"llama.rope.scaling.factor is {factor:g}, but llama.rope.scaling.type, which says how "
            "it is used, is missing; convert the model again with a newer llama.cpp"
        )
    stored = names.get(ROPE_FACTORS)
    if kind == "linear":
        if stored is not None:
            raise file.error(f"it has both linear RoPE scaling and {ROPE_FACTORS}")
        factor = _positive(file, "llama.rope.scaling.factor")
        return {"rope_type": "linear", "factor": factor}
    if stored is None:
        return {}
    if stored.kind.name != "F32":
        raise file.error(f"{ROPE_FACTORS} is {stored.kind.name}, expected F32")
    return llama3_scaling(stored.data.reshape(-1), config["head_dim"], config["rope_theta"])


def _token_id(file: File, role: str, rows: int) -> int | None:
    """The id of the token with this role, if the file names one."""
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in file.fields:
        return None
    id = file.get(key, int)
    if not 0 <= id < rows:
        raise file.error(f"{key} is {id}, but there are {rows} tokens")
    return id


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

    def __init__(self, file: File, config: dict):
        self._file, self._config = file, config
        self._tensors, unknown, found = {}, [], set()
        for tensor in file.tensors:
            if tensor.name == ROPE_FACTORS:  # read_config has turned them into a rope scaling
                continue
            name = hf_name(tensor.name)
            if name is None:
                unknown.append(shown(tensor.name, 80))
                continue
            self._tensors[name] = tensor
            found.add((name, self.shape_of(name)))
        if unknown:
            raise file.error(f"{len(unknown)} unknown tensors: {', '.join(sorted(unknown)[:8])}")
        missing = sorted(expected_shapes(config).items() - found)
        if missing:
            listed = ", ".join(f"{k} {v}" for k, v in missing[:8])
            raise file.error(f"{len(missing)} tensors are missing or have another shape: {listed}")

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            value = dequantize(tensor.data, tensor.kind)
        except NotImplementedError as error:
            kind = tensor.kind.name
            raise self._file.error(f"{tensor.name}: cannot dequantise {kind}") from error
        value = np.asarray(value, np.float32).reshape(self.shape_of(name))
        if ".q_proj." in name:
            return unpermute(value, self._config["num_attention_heads"])
        if ".k_proj." in name:
            return unpermute(value, self._config["num_key_value_heads"])
        return value

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

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


@contextlib.contextmanager
def _naming(file: File):
    """What the library of tokenizers refuses, as one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it raises plain Exceptions
        raise file.error(shown(error), "has no usable tokenizer") from error


def read_tokenizer(file: File):
    """transformers.PreTrainedTokenizerFast with the file's special tokens and chat template.

    encode() adds BOS and EOS as the file says; where it doesn't, SentencePiece tokenizers and
    Llama 3's add BOS, as in llama.cpp.

    Raises:
        GGUFError: the tokenizer is of another kind, its metadata is damaged, or it leaves open how
            text is split.
    """
    from transformers import PreTrainedTokenizerFast

    model = file.get("tokenizer.ggml.model", str)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise file.error(
            f"tokenizer model {shown(model, 60)!r} is not supported, only byte-level BPE ('gpt2') "
            "and SentencePiece ('llama')"
        )
    pieces, kinds = _pieces(file)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{ours}_token": _token_id(file, role, len(pieces)) for ours, role in roles.items()}
    special = {name: None if id is None else pieces[id] for name, id in ids.items()}
    bos_default = model == "llama" or file.get("tokenizer.ggml.pre", str, "") in LLAMA3
    length = file.count("llama.context_length", 2048)
    template = file.get("tokenizer.chat_template", str, "")
    with _naming(file):
        tokenizer = builders[model](file, vocab, kinds)
        _add_atomic(tokenizer, pieces, kinds)
        _add_ends(tokenizer, file, vocab, special, bos_default)
        out = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            clean_up_tokenization_spaces=False,
            model_max_length=length,
            **{k: v for k, v in special.items() if v is not None},
        )
    if template:
        out.chat_template = template
    return out


def _pieces(file: File) -> tuple[list[str], list[int]]:
    """(text, kind) of every token."""
    pieces = file.array("tokenizer.ggml.tokens", str)
    kinds = file.array("tokenizer.ggml.token_type", int, [NORMAL] * len(pieces))
    twice = len(pieces) - len(set(pieces))
    if twice:
        raise file.error(f"{twice} duplicate tokens in tokenizer.ggml.tokens")
    if len(kinds) != len(pieces):
        raise file.error(f"{len(kinds)} kinds of {len(pieces)} tokens in tokenizer.ggml.token_type")
    return pieces, kinds


def _add_atomic(tokenizer, pieces: list[str], kinds: list[int]) -> None:
    """Tells a tokenizer which tokens are never split."""
    from tokenizers import AddedToken

    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        atomic = [p for p, k in zip(pieces, kinds, strict=True) if k == kind]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(piece, special=special, normalized=False) for piece in atomic])


def _add_ends(tokenizer, file: File, vocab, special: Mapping, bos_default: bool) -> None:
    """Makes a tokenizer add BOS and EOS, where the file asks for it."""
    from tokenizers.processors import TemplateProcessing

    def wanted(what: str, default: bool) -> list[str]:
        token = special[f"{what}_token"]
        add = file.get(f"tokenizer.ggml.add_{what}_token", bool, default)
        return [token] if add and token is not None else []

    bos, eos = wanted("bos", bos_default), wanted("eos", False)
    if bos or eos:
        single, second = ([*bos, f"${name}", *eos] for name in "AB")
        tokenizer.post_processor = TemplateProcessing(
            single=single, pair=single + second, special_tokens=[(t, vocab[t]) for t in bos + eos]
        )


def load_tokenizer(path):
    """The tokenizer of a GGUF file, without touching its weights.

    A file that has not changed is read once: training, evaluations and sampling share the
    tokenizer. Copy it before you change it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return read_tokenizer(open_gguf(path))  # which says what is wrong with it
    state = path.stat()
    return _tokenizer_of(path, (state.st_ino, state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=4)
def _tokenizer_of(path: pathlib.Path, state: tuple[int, ...]):
    """`state` tells when the file is another one."""
    return read_tokenizer(open_gguf(path))


def ends(file: File) -> list[int]:
    """Ids of the tokens that end a reply: a text's end, a turn's and a message's."""
    pieces = file.array("tokenizer.ggml.tokens", str, [])
    ids = [_token_id(file, role, len(pieces)) for role in ("eos", "eot", "eom") if pieces]
    return [id for id in dict.fromkeys(ids) if id is not None]


def _merges(file: File, default=None) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split(" ")) for pair in file.array("tokenizer.ggml.merges", str, default)]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong is not None:
        raise file.error(f"tokenizer.ggml.merges has {shown(' '.join(wrong), 60)!r}, not a pair")
    return pairs


def _byte_level(file: File, vocab: dict[str, int], kinds):
    """Llama 3's takes a word that is a token as it is, whatever the merges make of it."""
    from tokenizers import Tokenizer, decoders, models

    if "tokenizer.ggml.pre" not in file.fields:
        raise file.error(
            "tokenizer.ggml.pre is missing, so it is open how its tokenizer splits text; convert "
            "the model again with a newer llama.cpp, or name another tokenizer in "
            "config.model.tokenizer"
        )
    pre = file.get("tokenizer.ggml.pre", str)
    splitting = _pre_tokenizer(file, pre)
    whole = pre in LLAMA3
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(file), ignore_merges=whole))
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: File, vocab: dict[str, int], kinds):
    """As Llama 2's in transformers: a space is "▁", one is put before the text, and characters that
    are in no token are spelled in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = _merges(file, [])
    if not merges:
        scores = file.array("tokenizer.ggml.scores", float)
        if len(scores) != len(vocab):
            raise file.error(
                f"{len(scores)} scores of {len(vocab)} tokens in tokenizer.ggml.scores"
            )
        if sum(len(piece) ** 2 for piece in vocab) > _MOST_CUTS:
            raise file.error("tokens in tokenizer.ggml.tokens are too long")
        merges = implied_merges(vocab, scores, kinds)
    unknown = next((piece for piece, i in vocab.items() if kinds[i] == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space_first = file.get("tokenizer.ggml.add_space_prefix", bool, True)
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
    normal = {piece: i for piece, i in vocab.items() if kinds[i] == NORMAL}
    found = [
        (-scores[i], i, -cut, piece[:cut], piece[cut:])
        for piece, i in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _pre_tokenizer(file: File, name: str):
    from tokenizers import Regex, pre_tokenizers

    if name == "smollm":
        return pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ])  # fmt: skip
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in LLAMA3:
        return pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    known = ", ".join(("smollm", "gpt-2", *LLAMA3))
    raise file.error(f"pre-tokenizer {shown(name, 60)!r} is not supported; known: {known}")


def _decimal(x) -> float:
    """The shortest decimal that rounds to this float32."""
    return float(str(np.float32(x)))
