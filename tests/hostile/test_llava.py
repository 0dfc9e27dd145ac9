"""LLaVA folders, judges' replies and files of benchmarks that want to break the program."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.eval import tasks
from metamorph_jax.models import build
from metamorph_jax.recipes import llava
from metamorph_jax.recipes.llava import fields, keys
from tests.hostile.harness import attempt, check, damaged
from tests.recipes.llava.tiny import ANYRES

ROWS = 64
CFG = dataclasses.replace(ANYRES, llm_options={"vocab_size": ROWS - 1}, tokenizer="")


@pytest.fixture(scope="module")
def tensors():
    """Of a small anyres model, by transformers' names."""
    model = nnx.eval_shape(lambda: llava.create(CFG, build.rngs(0)))
    rng = np.random.default_rng(0)
    nnx.update(model, nnx.map_state(
        lambda _, v: v.replace(jnp.asarray(0.1 * rng.normal(size=v.shape), v.dtype)),
        nnx.state(model)))  # fmt: skip
    return {k: np.asarray(v) for k, v in keys.export_llava(model, "hf").items()}


def write(folder, tensors, stated=None, index=None):
    """A folder in two shards; `stated` and `index` change its config.json and its index."""
    from safetensors.numpy import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names, places = list(tensors), {}
    for k in range(2):
        file = f"model-0000{k + 1}-of-00002.safetensors"
        part = {name: np.ascontiguousarray(tensors[name]) for name in names[k::2]}
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    table = fields.config_to_hf(CFG) | (stated or {})
    (folder / "config.json").write_text(json.dumps(table))
    index = {"metadata": {}, "weight_map": places} if index is None else index(places)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def convert(folder, tmp_path, **expected):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    found = check(["convert", "--from", folder, "--out", "out"], tmp_path, **expected)
    assert (tmp_path / "out").exists() == (found.code == 0)
    return found


@pytest.fixture
def whole(tensors, tmp_path):
    return write(tmp_path / "m", tensors)


def test_a_sound_one_is_converted(whole, tmp_path):
    convert(whole, tmp_path, code=0)


def test_damaged_shards(whole, tmp_path):
    shard = whole / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    for name, content in [*damaged(data[:4000], 1000, 6, 0), ("cut at its end", data[:-1])]:
        rest = b"" if name.startswith("cut") else data[4000:]
        shard.write_bytes(content + rest)
        convert(whole, tmp_path)
    shard.unlink()
    convert(whole, tmp_path, code=2, naming=shard.name)
    shard.symlink_to("/dev/zero")
    convert(whole, tmp_path, code=2, naming=shard.name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(tensors, tmp_path, value):
    for name in ("model.image_newline", "model.multi_modal_projector.linear_1.weight"):
        name = name if name in tensors else name.removeprefix("model.")
        changed = tensors[name].copy()
        changed.flat[3] = value
        folder = write(tmp_path / "m", tensors | {name: changed})
        convert(folder, tmp_path, code=2, naming=" in 1 tensors: ")


def test_wrong_shapes_and_names(tensors, tmp_path):
    for name in list(tensors)[::7]:
        x = tensors[name]
        for wrong in (x[:-1], x[..., None], np.zeros((0, *x.shape[1:]), x.dtype), x.reshape(-1)):
            reshaped = "class_embedding" in name and wrong.size == x.size  # whatever it has
            if wrong.shape != x.shape and not reshaped:
                convert(write(tmp_path / "m", tensors | {name: wrong}), tmp_path, code=2)
        without = {key: value for key, value in tensors.items() if key != name}
        convert(write(tmp_path / "m", without), tmp_path, code=2)
    convert(write(tmp_path / "m", tensors | {"stray\x1b[2J": np.zeros(2)}), tmp_path, code=2)


INDEXES = (
    [], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None},
    *({"weight_map": {"a": file}} for file in
      ("gone.safetensors", "../x.safetensors", "/etc/passwd", "", 3, None, "\0", "\ud800", ".")),
)  # fmt: skip


def test_indexes(tensors, tmp_path):
    for value in INDEXES:
        convert(write(tmp_path / "m", tensors, index=lambda _, v=value: v), tmp_path, code=2)
    elsewhere = lambda places: {"weight_map": places | {list(places)[0]: "gone.safetensors"}}  # noqa: E731
    folder = write(tmp_path / "m", tensors, index=elsewhere)
    convert(folder, tmp_path, code=2, naming="gone.safetensors")


VALUES = (None, True, -1, 0, 10**30, 1e400, float("nan"), "", "\ud800", "x" * 5000, [], [[]], {},
          [[32, 64], 3], [[32, 64], [1, 1]], [[-32, 32]], [[32.5, 64]], [["a", "b"]],
          [[32, 64, 96]], [[10**18, 10**18]], "[[32, 64]]")  # fmt: skip
KEYS = ("image_grid_pinpoints", "vision_feature_layer", "vision_feature_select_strategy",
        "image_token_index", "model_type", "projector_hidden_act", "text_config", "vision_config",
        "multimodal_projector_bias", "tie_word_embeddings")  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_values_of_every_field(whole, tmp_path, key):
    """Without a config file, too: `generate` reads the same fields."""
    stated = fields.config_to_hf(CFG)
    refused = 0
    for value in VALUES:
        (whole / "config.json").write_text(json.dumps(stated | {key: value}))
        refused += convert(whole, tmp_path).code
        check(["generate", "--checkpoint", whole, "--prompt", "x"], tmp_path, code=2)
    assert refused


# ---- judges' replies

REPLIES = (
    None, "", " ", "\n", "\0", "\ud800", "\x1b[2J 0.5", "nan", "nan nan", "inf 3", "1e999 2",
    "-inf 1", "7 8", "7, 8\nGood.", "0.5", "1.5", "0." + "1" * 200_000 + ".5", "1" * 200_000,
    "9 " * 100_000, "١ ٢", "0x1 0x2", "1_0 2", "{}", "Score: 0.7", "-1 -1", "1e308 1e308",
)  # fmt: skip
ROWS_OF = {
    "mmvet": {"more": {"question": "Q?"}, "gold": "a", "groups": {"capabilities": "ocr"}},
    "llava_bench_wild": {
        "more": {"question": "Q?", "role": "Assistant", "context": "c", "reference": "r",
                 "instruction": "Grade.", "question_id": 1, "reference_id": "x"},
        "gold": "r", "groups": {"category": "conv"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS_OF)
def test_what_judges_say(name, tmp_path, monkeypatch):
    """A score in range, or none; nothing that is no number ends in a table."""
    from metamorph_jax.eval.tasks import llava_bench

    monkeypatch.setattr(llava_bench, "_asked", lambda record: "asked")
    task = tasks.make(name, root=str(tmp_path))
    for reply in REPLIES:
        record = {"id": "1", "prompt": "p", "reply": "an answer", **ROWS_OF[name]}

        def score(reply=reply, record=record):
            (judged,) = task.judge([record], lambda texts: [reply] * len(texts))
            assert judged["score"] is None or np.isfinite(judged["score"])
            found = task.scores([judged] if judged["score"] is not None else [])
            assert all(np.isfinite(value) for value in found.values()), (reply, found)

        attempt(score, tmp_path, code=0)


# ---- MMMU's Parquet files, frames of videos

MMMU_ROW = {"id": "validation_Art_1", "question": "What is <image 1>?", "options": "['a', 'b']",
            "answer": "A", "question_type": "multiple-choice"}  # fmt: skip


def questions(spec, root):
    from metamorph_jax.eval import bench

    def read():
        for question in bench.questions_of(tasks.make(spec, root=str(root))):
            for image in question.images:
                _ = image() if callable(image) else image

    return read


def test_parquet_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the eval extra")
    pytest.importorskip("pyarrow.parquet", reason="needs the eval extra")

    file = tmp_path / "Art" / "validation-0.parquet"
    file.parent.mkdir()

    def put(row):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)

    image = {"bytes": b"x", "path": "x.png"}
    put(MMMU_ROW | {"image_1": image})
    attempt(questions("mmmu", tmp_path), tmp_path, code=0)
    for name, content in damaged(file.read_bytes(), 400, 60, 0, (1, 5)):
        file.write_bytes(content)
        attempt(questions("mmmu", tmp_path), tmp_path, naming="" if name else file)
    for key in (*MMMU_ROW, "image_1"):
        for value in (None, 3, 1.5, "", "\x1b", "[", "[3]", "__import__('os')", "(" * 500, [], {},
                      {"bytes": None}, {"path": "x"}, {"bytes": "text"}, True):  # fmt: skip
            if value == {}:
                continue  # Parquet has no such column
            put(MMMU_ROW | {"image_1": image} | {key: value})
            attempt(questions("mmmu", tmp_path), tmp_path)
        less = {k: v for k, v in (MMMU_ROW | {"image_1": image}).items() if k != key}
        put(less)
        attempt(questions("mmmu", tmp_path), tmp_path)


def test_frames_of_videos(tmp_path):
    """A folder of frames that is empty, a file, a pipe, or names frames elsewhere."""
    from metamorph_jax.eval.tasks import mvbench

    row = {"video": "v", "question": "What?", "candidates": ["x", "y"], "answer": "x",
           "start": 0.0, "end": 1.0}  # fmt: skip
    (tmp_path / "json").mkdir()
    place = tmp_path / "video" / "perception" / "videos"
    place.mkdir(parents=True)

    def ask(code=None, **changes):
        mvbench._frames.cache_clear()
        (tmp_path / "json" / "action_count.json").write_text(json.dumps([row | changes]))
        spec = "mvbench:only=action_count,frames=3"

        def read():
            from metamorph_jax.errors import BadSample, FileError

            try:
                questions(spec, tmp_path)()
            except BadSample as error:  # such a question is left out, with this reason
                raise FileError(error) from error

        return attempt(read, tmp_path, code=code)

    ask(2)
    (place / "v").mkdir()
    ask(2)
    (place / "v" / "00001.jpg").write_bytes(b"")
    ask()
    for start, end in ((None, None), (5, 1), (-1e9, 1e9), ("x", 1), (0, float("inf")), (0, 0),
                       (float("nan"), 1), ([], 1), (True, 1)):  # fmt: skip
        ask(start=start, end=end)
    for name in ("../v", "/etc", "", "\0", "v" * 5000, 3, None, "\ud800"):
        ask(video=name)
    shutil.rmtree(place / "v")
    (place / "v").symlink_to("/dev/zero")
    ask(2)
