"""Weight files and model folders that want to break the program, made by rules."""

import json
import os
import pathlib
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest

from metamorph_jax.convert import gguf, hf, onnx, peft, safetensors
from metamorph_jax.data import tokenizers
from tests.hostile import harness

ABSURD = (2**16 + 1, 2**31 - 1, 2**32 - 1, 2**47, 2**63 - 1, 2**64 - 1)


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """Loaded before memory is measured."""
    import onnx as _  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from gguf import GGML_QUANT_SIZES  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401


# ---- GGUF

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
PIECES = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
WIDTH, ROWS = 8, len(PIECES)


def text(value) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def array(kind: int, values, count=None) -> bytes:
    pack = {STRING: text, F32: lambda v: struct.pack("<f", v), I32: lambda v: struct.pack("<i", v),
            U32: lambda v: struct.pack("<I", v)}[kind]  # fmt: skip
    count = len(values) if count is None else count
    return struct.pack("<IQ", kind, count) + b"".join(map(pack, values))


def u32(n):
    return U32, struct.pack("<I", n)


def f32(x):
    return F32, struct.pack("<f", x)


METADATA = {
    "general.architecture": (STRING, text("llama")),
    "general.alignment": u32(32),
    "llama.block_count": u32(1),
    "llama.context_length": u32(16),
    "llama.embedding_length": u32(WIDTH),
    "llama.feed_forward_length": u32(WIDTH),
    "llama.attention.head_count": u32(2),
    "llama.attention.head_count_kv": u32(1),
    "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
    "llama.rope.freq_base": f32(1e4),
    "llama.rope.dimension_count": u32(4),
    "llama.vocab_size": u32(ROWS),
    "split.count": u32(1),
    "tokenizer.ggml.model": (STRING, text("gpt2")),
    "tokenizer.ggml.pre": (STRING, text("llama-bpe")),
    "tokenizer.ggml.tokens": (ARRAY, array(STRING, PIECES)),
    "tokenizer.ggml.token_type": (ARRAY, array(I32, [2, 3, 3, 1, 1, 1])),
    "tokenizer.ggml.scores": (ARRAY, array(F32, [0.0] * ROWS)),
    "tokenizer.ggml.merges": (ARRAY, array(STRING, ["a b"])),
    "tokenizer.ggml.bos_token_id": u32(1),
    "tokenizer.ggml.eos_token_id": u32(2),
    "tokenizer.ggml.add_bos_token": (BOOL, b"\1"),
    "tokenizer.chat_template": (STRING, text("{{ messages }}")),
}
SPELLED = METADATA | {"tokenizer.ggml.model": (STRING, text("llama"))}
del SPELLED["tokenizer.ggml.merges"]
SHAPES = {
    "token_embd.weight": (ROWS, WIDTH), "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,), "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (WIDTH, WIDTH), "blk.0.attn_k.weight": (WIDTH // 2, WIDTH),
    "blk.0.attn_v.weight": (WIDTH // 2, WIDTH), "blk.0.attn_output.weight": (WIDTH, WIDTH),
    "blk.0.ffn_gate.weight": (WIDTH, WIDTH), "blk.0.ffn_up.weight": (WIDTH, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, WIDTH),
}  # fmt: skip
TENSORS = {}
for _name, _shape in SHAPES.items():
    TENSORS[_name] = [_shape, 0, sum(-(-4 * int(np.prod(s)) // 32) * 32 for s, *_ in
                                     TENSORS.values())]  # fmt: skip


def gguf_bytes(metadata=None, tensors=None, head=None, start=b"GGUF", version=3) -> bytes:
    metadata = METADATA if metadata is None else metadata
    tensors = TENSORS if tensors is None else tensors
    counts = head or (len(tensors), len(metadata))
    out = start + struct.pack("<IQQ", version, *counts)
    for key, (kind, value) in metadata.items():
        out += text(key) + struct.pack("<I", kind) + value
    for name, (shape, kind, offset) in tensors.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        out += text(name) + dims + struct.pack("<IQ", kind, offset)
    out += b"\0" * (-len(out) % 32)
    return out + b"\0" * sum(-(-4 * int(np.prod(s)) // 32) * 32 for s in SHAPES.values())


def with_value(key, kind, value, base=METADATA):
    return gguf_bytes(base | {key: (kind, value)})


def with_tensor(change):
    tensors = {name: list(info) for name, info in TENSORS.items()}
    change(tensors)
    return gguf_bytes(tensors=tensors)


WRONG_TYPED = {
    "minus one": (I32, struct.pack("<i", -1)), "zero": u32(0), "largest": u32(2**32 - 1),
    "huge": (U64, struct.pack("<Q", 2**63)), "nan": f32(float("nan")), "inf": f32(float("inf")),
    "small": f32(1e-30), "text": (STRING, text("7")), "odd text": (STRING, text("\x1b[2J\n")),
    "not UTF-8": (STRING, text(b"\xff\xfe\xed\xa0\x80")), "bool": (BOOL, b"\1"),
    "numbers": (ARRAY, array(U32, [1, 2])), "texts": (ARRAY, array(STRING, ["a", "a"])),
    "empty": (ARRAY, array(I32, [])), "unknown type": (99, b"\0" * 8),
    "array of arrays": (ARRAY, struct.pack("<IQ", ARRAY, 1) + array(U32, [1])),
}  # fmt: skip


def gguf_cases():
    for n in ABSURD:
        yield f"{n} tensors", gguf_bytes(head=(n, len(METADATA)))
        yield f"{n} entries", gguf_bytes(head=(len(TENSORS), n))
        yield f"a text of {n}", with_value("x", STRING, struct.pack("<Q", n) + b"abc")
        yield f"{n} dimensions", with_value("x", ARRAY, struct.pack("<IQ", 4, n & (2**32 - 1)))
        for kind in (U8, U32, U64, F32, BOOL, STRING, ARRAY, 77):
            yield f"{n} of type {kind}", with_value("x", ARRAY, struct.pack("<IQ", kind, n))
        yield f"alignment {n}", with_value("general.alignment", U64, struct.pack("<Q", n))
        yield f"offset {n}", with_tensor(lambda t, n=n: t["token_embd.weight"].__setitem__(2, n))
        yield (
            f"kind {n}",
            with_tensor(lambda t, n=n: t["token_embd.weight"].__setitem__(1, n & (2**32 - 1))),
        )
        for shape in ((n,), (n, n), (1, n), (n, 0), (n,) * 4, (1,) * 5):
            yield (
                f"shape {shape}",
                with_tensor(lambda t, shape=shape: t["token_embd.weight"].__setitem__(0, shape)),
            )
        yield f"{n} layers", with_value("llama.block_count", U64, struct.pack("<Q", n))
    nested = struct.pack("<IQ", ARRAY, 1) * 5000
    yield "nested arrays", with_value("x", ARRAY, nested)
    for version in (0, 1, 4, 3 << 24, 2**32 - 1):
        yield f"version {version}", gguf_bytes(version=version)
    twice = text("x") + struct.pack("<II", 4, 1)
    yield "a key twice", gguf_bytes({}, {}, head=(0, 2))[:24] + twice * 2 + b"\0" * 99
    yield "one place", with_tensor(lambda t: [v.__setitem__(2, 0) for v in t.values()])
    yield "no place", with_tensor(lambda t: t["token_embd.weight"].__setitem__(2, 7))
    for key in METADATA:
        for name, (kind, value) in WRONG_TYPED.items():
            yield f"{key} is {name}", with_value(key, kind, value)
    for key in SPELLED:
        if key.startswith("tokenizer"):
            for name, (kind, value) in WRONG_TYPED.items():
                yield f"spelled: {key} is {name}", with_value(key, kind, value, SPELLED)
    whole = gguf_bytes()
    step = max(1, len(whole) // 60)
    yield from harness.damaged(whole, step, 150, seed=0, changes=(1, 1, 4))


def read_gguf(path):
    file = gguf.open_gguf(path)
    fields = gguf.read_config(file)
    weights = gguf.Weights(file, fields)
    for name in weights:
        assert weights[name].shape == weights.shape_of(name)
    gguf.read_tokenizer(file).encode("ab a")


def each(cases, folder, name, attempt):
    """Runs all cases and reports every one that is not clean."""
    bad = []
    for title, data in cases:
        path = folder / name
        path.write_bytes(data)
        try:
            attempt(path)
        except AssertionError as error:
            bad.append(f"{title}: {str(error)[-1500:]}")
    assert not bad, f"{len(bad)} cases\n" + "\n\n".join(bad[:10])


def test_the_plain_gguf_is_read(tmp_path):
    for number, base in enumerate((METADATA, SPELLED)):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(gguf_bytes(base))
        harness.attempt(lambda path=path: read_gguf(path), tmp_path, code=0)


def test_gguf(tmp_path):
    cases = list(gguf_cases())
    assert len(cases) > 700
    each(cases, tmp_path, "x.gguf",
         lambda path: harness.attempt(lambda: read_gguf(path), tmp_path, naming=path))  # fmt: skip


@pytest.mark.parametrize("n", [2**31 - 1, 2**63 - 1])
def test_gguf_with_an_absurd_count_through_the_command(n, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(with_value("x", ARRAY, struct.pack("<IQ", U32, n)))
    words = ["convert", "--from", f"gguf:{path}", "--out", tmp_path / "out"]
    harness.check(words, tmp_path, code=2, naming=path)


# ---- safetensors


def header(table, data: bytes = b"\0" * 8, length=None) -> bytes:
    head = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


ODD_VALUES = (None, True, 1.5, -1, 10**30, "x", "\x1b[2J", [], {}, [[]], [None], [1.5], ["a"],
              [-1, 8], [2**64, 2**64], [0, 0, 0], [True, 8], [0] * 100)  # fmt: skip


def safetensors_cases():
    for n in (0, 1, 2**25 + 1, 99_000_000, *ABSURD):
        yield f"a header of {n}", header({"a": entry()}, length=n)
    for field in ("dtype", "shape", "data_offsets"):
        for value in ODD_VALUES:
            yield f"{field} {value}", header({"a": entry() | {field: value}})
    for value in ODD_VALUES:
        yield f"entry {value}", header({"a": value})
        yield f"header {value}", header(value)
        yield f"metadata {value}", header({"__metadata__": value, "a": entry()})
    for n in (2**31, 2**48 - 1, 2**62, 2**64, 10**4000):
        for shape in ([n], [n, 0], [0, n, n], [n] * 33):
            yield f"shape {n}", header({"a": entry(shape=shape, offsets=[0, 0])}, b"")
        yield f"offsets {n}", header({"a": entry(offsets=[n, n + 8])})
    for name in ("\x1b[2J", "a\nmetamorph: all good", "\ud800", "../x", "x" * 10**6, ""):
        yield f"name {name[:20]!r}", header({name: entry(shape=[3])})
    for start in (b"\x80\x02.", b"PK\x03\x04", b"GGUF", b"version https://git-lfs", b"<!doctype"):
        yield f"starts with {start}", start * 20
    yield "deep", header(b"[" * 10**6)
    yield "deep names", header(b'{"a":' * 5000 + b"1" + b"}" * 5000)
    yield "wide", header(b"[" + b"{}," * 10**6 + b"{}]")
    yield "many", header({str(i): entry(shape=[0], offsets=[0, 0]) for i in range(20_000)}, b"")
    whole = header({"a": entry(), "b": entry(offsets=(8, 16))}, b"\0" * 16)
    yield from harness.damaged(whole, 5, 60, seed=1)


def read_all(path):
    tensors = hf.Tensors(path)
    for name in tensors:
        assert np.asarray(tensors[name]).shape == tensors.shape_of(name)


def test_safetensors(tmp_path):
    cases = list(safetensors_cases())
    assert len(cases) > 200
    each(cases, tmp_path, "x.safetensors",
         lambda path: harness.attempt(lambda: read_all(path), tmp_path, naming=path))  # fmt: skip


def test_headers_that_are_large(tmp_path):
    """99 MB of JSON, as the library allows, may take 2.5 GB; as much as is read here takes 0.6."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(header(b"[", length=99_000_000))
    os.truncate(path, 10**8)
    harness.attempt(lambda: safetensors.File(path), tmp_path, code=2, naming=path)
    path.write_bytes(header(b"[" + b"{}," * 5_500_000 + b"{}]"))
    harness.attempt(lambda: safetensors.File(path), tmp_path, code=2, naming=path)


# ---- torch


class Calls:
    """Unpickling this calls a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def torch_cases(folder):
    import collections

    import torch

    good = folder / "good.bin"
    torch.save({"a": torch.zeros(2)}, good)
    whole = good.read_bytes()
    torch.save({"a": torch.zeros(2)}, good, _use_new_zipfile_serialization=False)
    old = good.read_bytes()
    trace = str(folder.parent / "executed")
    calls = {
        "os.system": Calls(os.system, f"touch {trace}"), "open": Calls(open, trace, "w"),
        "eval": Calls(eval, f"open({trace!r}, 'w')"), "bytearray": Calls(bytearray, 10**10),
        "exit": Calls(sys.exit, 0), "counter": collections.Counter({"a": 1}), "complex": 1j,
        "set": {1}, "path": pathlib.PurePosixPath("a"), "text": "x", "nothing": None,
    }  # fmt: skip
    for title, value in calls.items():
        for protocol in (2, 4):
            data = pickle.dumps({"a": value}, protocol)
            yield f"{title} {protocol}", data
            yield f"{title} {protocol}, packed", packed(data)
    dense = torch.zeros(2, 2)
    tensors = {
        "sparse": dense.to_sparse(), "csr": dense.to_sparse_csr(), "complex": dense + 1j,
        "meta": torch.zeros(10**6, 10**6, device="meta"), "expanded": torch.zeros(1).expand(10**9),
        "quantised": torch.quantize_per_tensor(dense, 1.0, 0, torch.qint8), "bool": dense > 0,
        "nested": {"b": {"c": dense}}, "list": [dense], "ints": dense.long(),
    }  # fmt: skip
    for title, value in tensors.items():
        for new in (True, False):
            try:
                torch.save({"a": value}, good, _use_new_zipfile_serialization=new)
            except (RuntimeError, NotImplementedError):
                continue
            yield f"{title} {new}", good.read_bytes()
    for data, title in ((whole, "new"), (old, "old")):
        for name, changed in harness.damaged(data, max(1, len(data) // 25), 40, seed=2):
            yield f"{title}, {name}", changed
    yield "a bomb", packed(pickle.dumps({"a": b"\0" * 2**24}, 2), zipfile.ZIP_DEFLATED)
    yield "many entries", packed(b"N.", names=[str(i) for i in range(2000)])
    yield "deep", b"\x80\x02" + b"(" * 10**5 + b"."
    yield "long", b"\x80\x02\x8b\xff\xff\xff\x7f"
    yield "doubled", b"\x80\x02](" + b"\x85q\x01h\x01\x86" * 5000 + b"."


def packed(data: bytes, compression=zipfile.ZIP_STORED, names=()) -> bytes:
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        for name in names:
            archive.writestr(f"archive/data/{name}", "")
    return out.getvalue()


def test_torch_files(tmp_path):
    pytest.importorskip("torch", reason="pip install 'metamorph_jax[oracle]'")
    inside = tmp_path / "inside"
    inside.mkdir()
    cases = list(torch_cases(inside))
    assert len(cases) > 150
    each(cases, inside, "x.bin",
         lambda path: harness.attempt(lambda: read_all(path), inside, naming=path))  # fmt: skip
    assert not (tmp_path / "executed").exists()


# ---- ONNX


def onnx_cases():
    from onnx import TensorProto, helper

    def model(change=lambda weights: None, rename=str, nodes=None):
        weights = {"embeddings.cls_token": np.zeros((1, 1, 4), np.float32),
                   "embeddings.position_embeddings": np.zeros((1, 5, 4), np.float32),
                   "embeddings.patch_embeddings.projection.weight":
                   np.zeros((4, 3, 2, 2), np.float32),
                   "encoder.layer.0.mlp.fc1.bias": np.zeros(16, np.float32)}  # fmt: skip
        made = [helper.make_tensor(rename(k), TensorProto.FLOAT, v.shape, v.tobytes(), raw=True)
                for k, v in weights.items()]  # fmt: skip
        change(made)
        nodes = nodes or [helper.make_node("Identity", ["x"], ["y"])]
        return helper.make_model(helper.make_graph(nodes, "g", [], [], made)).SerializeToString()

    whole = model()
    for n in (1, 10**12, 2**63, "9" * 5000, -1, "x", "٣", "\x1b[2J"):
        yield f"layer {n}", model(rename=lambda k, n=n: k.replace("layer.0", f"layer.{n}"))
    for drop in range(4):
        yield f"without {drop}", model(lambda made, drop=drop: made.pop(drop))
    for i in range(4):
        for dims in ((-1,), (0,), (2**40,), (2**62, 2), (), (1, 2, 3), (10**6, 10**6)):
            yield f"shape {i} {dims}", model(
                lambda made, i=i, dims=dims: (made[i].ClearField("dims"),
                                              made[i].dims.extend(dims)))  # fmt: skip
        for kind in (0, 3, 7, 8, 9, 10, 14, 16, 99):
            yield (
                f"type {i} {kind}",
                model(lambda made, i=i, kind=kind: setattr(made[i], "data_type", kind)),
            )

        def outside(made, i=i):
            made[i].data_location = TensorProto.EXTERNAL
            made[i].external_data.add(key="location", value="../../../etc/passwd")

        yield f"outside {i}", model(outside)
    yield from harness.damaged(whole, 12, 80, seed=3)


def test_onnx(tmp_path):
    pytest.importorskip("onnx", reason="pip install 'metamorph_jax[quickstart]'")
    cases = list(onnx_cases())
    assert len(cases) > 150
    each(cases, tmp_path, "x.onnx",
         lambda path: harness.attempt(lambda: onnx.read_dinov2(path), tmp_path,
                                      naming=path))  # fmt: skip


# ---- folders: every file in every bad form


def fifo(path):
    os.mkfifo(path)


def sparse(path):
    with path.open("wb") as f:
        f.truncate(2**40)


BAD_FILES = {
    "empty": b"", "list": b"[]", "text": b'"\\u001b[2J"', "number": b"1e999", "null": b"null",
    "cut": b'{"model_type": "lla', "zeros": b"\0" * 100, "latin": b'{"a": "\xe9"}',
    "deep": b'{"a":' * 2000 + b"1" + b"}" * 2000, "deep list": b"[" * 10**5,
    "half a pair": b'{"model_type": "\\ud800"}', "utf-16": '{"a": 1}'.encode("utf-16"),
    "digits": b'{"a": ' + b"1" * 10**5 + b"}", "pipe": fifo, "folder": pathlib.Path.mkdir,
    "sparse": sparse, "device": lambda path: path.symlink_to("/dev/zero"),
    "circle": lambda path: path.symlink_to(path),
}  # fmt: skip
NEEDED = ("config.json", "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
          "special_tokens_map.json", "vocab.json", "preprocessor_config.json")  # fmt: skip
CONFIG = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 6,
          "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def put(path, content):
    path.parent.mkdir(exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("file", NEEDED + BESIDE)
def test_files_of_a_folder(file, tmp_path):
    for kind, content in BAD_FILES.items():
        if kind == "circle" and file != "config.json":
            continue  # such a file is absent
        folder = tmp_path / kind.replace(" ", "_")
        put(folder / file, content)
        if file != "config.json":
            put(folder / "config.json", json.dumps(CONFIG).encode())
        words = ["convert", "--from", folder, "--out", tmp_path / "out"]
        harness.check(words, tmp_path, code=2, naming=folder)


@pytest.mark.parametrize("file", BESIDE[:2])
def test_tokenizers_of_a_folder(file, tmp_path):
    for kind, content in BAD_FILES.items():
        folder = tmp_path / kind.replace(" ", "_")
        put(folder / file, content)
        harness.attempt(lambda folder=folder: tokenizers.load(folder), tmp_path, code=2,
                        naming=folder)  # fmt: skip
        if file == "tokenizer.json":
            harness.attempt(lambda f=folder / file: tokenizers.load_file(f), tmp_path, code=2,
                            naming=folder)  # fmt: skip


TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}


def tokenizer_cases():
    for key in ("model", "pre_tokenizer", "normalizer", "post_processor", "decoder",
                "added_tokens", "version", "truncation", "padding"):  # fmt: skip
        for value in ODD_VALUES:
            yield f"{key} {value}", json.dumps(TOKENIZER | {key: value}).encode()
    for key in ("type", "vocab", "merges", "unk_token"):
        for value in ODD_VALUES:
            model = TOKENIZER["model"] | {key: value}
            yield f"model.{key} {value}", json.dumps(TOKENIZER | {"model": model}).encode()


def test_tokenizer_files(tmp_path):
    each(tokenizer_cases(), tmp_path, "tokenizer.json",
         lambda path: harness.attempt(lambda: tokenizers.load_file(path), tmp_path,
                                      naming=path))  # fmt: skip


@pytest.mark.parametrize("answer", ["", "y\n"])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_code_of_a_folder_is_never_run(where, answer, tmp_path):
    inside, trace = tmp_path / "model", tmp_path / "executed"
    put(inside / "evil.py", f"open({str(trace)!r}, 'w')\nclass Evil: pass\n".encode())
    put(inside / "tokenizer.json", json.dumps(TOKENIZER).encode())
    auto = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    fields = {"auto_map": auto, "tokenizer_class": "Evil", "model_type": "evil"}
    put(inside / where, json.dumps(fields).encode())
    if where != "config.json":
        put(inside / "config.json", json.dumps(CONFIG).encode())
    found = harness.run(["convert", "--from", inside, "--out", "out"], tmp_path, stdin=answer)
    harness.judge(found, code=2)
    harness.attempt(lambda: tokenizers.load(inside), tmp_path)
    assert not trace.exists()


# ---- adapters

HANGS = ("(a+)+$", "(.*)*x", "(a|aa)+$", ".*" * 30 + "x", "(" * 5000, "[", "(?P<a>", "x{99999}",
         "(?R)", "\\")  # fmt: skip


def adapter_cases():
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    for field in ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern",
                  "alpha_pattern", "bias", "use_dora", "modules_to_save", "init_lora_weights",
                  "target_modules", "fan_in_fan_out", "layers_pattern"):  # fmt: skip
        for value in (*ODD_VALUES, 0, float("nan"), float("inf"), {"a": 0}, {"a": None}):
            yield f"{field} {value}", good | {field: value}
    for pattern in HANGS:
        for field in ("rank_pattern", "alpha_pattern"):
            yield f"{field} {pattern[:20]}", good | {field: {pattern: 2}}
        yield f"target {pattern[:20]}", good | {"target_modules": pattern}


def test_adapter_configs(tmp_path, monkeypatch):
    monkeypatch.setattr(peft, "_PATTERNS_TAKE", 0.1)
    name = "model.layers.0." + "a" * 60 + "!"

    def read(path):
        fields = peft.read_config(path.parent)
        for field in ("rank_pattern", "alpha_pattern"):
            peft._Own(path, fields[field], 1)(name)

    cases = [(title, json.dumps(fields).encode()) for title, fields in adapter_cases()]
    each(cases, tmp_path, peft.CONFIG,
         lambda path: harness.attempt(lambda: read(path), tmp_path, naming=path))  # fmt: skip


def test_adapter_folders(tmp_path):
    for kind, content in BAD_FILES.items():
        folder = tmp_path / kind.replace(" ", "_")
        put(folder / peft.CONFIG, content)
        harness.attempt(lambda folder=folder: peft.read_config(folder), tmp_path, code=2,
                        naming=folder)  # fmt: skip
