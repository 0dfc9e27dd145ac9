"""Data of every bad kind, through `metamorph data check`, the stream, and `metamorph train`.

Each input is made by a rule. What can't be used is named by file and line, with exit code 1 (some
samples are bad) or 2 (the file is); nothing ends in a traceback, hangs, or forges a report.
"""

import collections
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from metamorph_jax.data import cache as caches
from metamorph_jax.data.config import DataConfig, OrderConfig, RowConfig, SourceConfig
from metamorph_jax.data.pipeline import open_sources
from metamorph_jax.data.stream import choices
from metamorph_jax.errors import BadSample, UserError
from metamorph_jax.recipes.metamorph import KINDS
from tests.hostile import harness

ROOT = pathlib.Path(__file__).parents[2]
CLIP = ROOT / "tests/cases/data/clip.mp4"
GOOD = {
    "id": "a",
    "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
}
FORGED = "x\x1b[2K\r\n\nnothing wrong found\u202e"


def judged(found: harness.Outcome, codes=(0, 1, 2)) -> harness.Outcome:
    """As `harness.judge`, where exit code 1 with a table means that some samples are bad."""
    if found.code == 1 and 1 in codes:
        assert found.out.startswith("source ") and found.err == "", (found.out, found.err)
        found.code = 0
        harness.judge(found)
        found.code = 1
    else:
        harness.judge(found)
    assert found.code in codes, (found.code, found.out, found.err)
    assert all(c.isprintable() or c == "\n" for c in found.out), repr(found.out)
    return found


def data_check(folder, *words, codes=(0, 1, 2)) -> harness.Outcome:
    return judged(harness.run(["data", "check", *words, "--threads=2"], folder), codes)


# ---- whole files


def _lines(*records) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


def _nested(depth: int, opening: str, closing: str) -> bytes:
    return (opening * depth + closing * depth).encode()


def _png(w: int, h: int, depth=8, colour=0, data=b"") -> bytes:
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))  # fmt: skip


def whole_files() -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """Name -> (bytes, exit codes that are right)."""
    good, text = _lines(GOOD, GOOD), json.dumps([GOOD, GOOD])
    made: dict[str, tuple[bytes, tuple[int, ...]]] = {
        "good.jsonl": (good, (0,)), "good.ndjson": (good, (0,)), "good.json": (text.encode(), (0,)),
        "bom.jsonl": (b"\xef\xbb\xbf" + good, (0,)), "bom.json": (text.encode("utf-8-sig"), (0,)),
        "crlf.jsonl": (good.replace(b"\n", b"\r\n"), (0,)),
        "no_end.jsonl": (good.rstrip(b"\n"), (0,)),
        "blank_lines.jsonl": (b"\n \n" + good + b"\n\n", (0,)),
    }  # fmt: skip
    nothing = {
        "empty": b"", "blank": b" \n\t\n", "bom": b"\xef\xbb\xbf", "zeros": b"\0" * 5000,
        "utf16": text.encode("utf-16"), "utf16be": b"\xfe\xff" + text.encode("utf-16-be"),
        "utf32": text.encode("utf-32"), "gzip": b"\x1f\x8b\x08\0" + os.urandom(100),
        "zip": b"PK\3\4" + os.urandom(100), "parquet": b"PAR1" + os.urandom(100) + b"PAR1",
        "pickle": b"\x80\x04\x95" + os.urandom(50), "png": _png(3, 3),
        "elf": b"\x7fELF" + b"\1" * 99,
        "html": b"<!DOCTYPE html><html>", "csv": b"id,image\n1,a.png\n", "number": b"7",
        "string": b'"text"', "null": b"null", "true": b"true", "nan": b"NaN", "object": b"{}",
        "cp1252": '[{"id": "café"}]'.encode("cp1252"), "half": text.encode()[:-9],
        "two": (text + text).encode(), "yaml": b"- id: a\n", "python": b"[{'id': 'a'}]",
        "deep_lists": _nested(100_000, "[", "]"), "deep_objects": _nested(50_000, '{"a":', "}"),
        "deep_open": b"[" * 100_000, "digits": b"[" + b"9" * 100_000 + b"]",
        "surrogate": b'["\\ud800"]', "git_lfs": b"version https://git-lfs.github.com/spec/v1\n",
    }  # fmt: skip
    for name, data in nothing.items():
        for extension in ("json", "jsonl", "arrayrecord"):
            # As lines, an object or a list may be one bad record.
            codes = (1, 2) if extension == "jsonl" else (2,)
            made[f"{name}.{extension}"] = data, codes
    for extension in ("csv", "parquet", "tar", "JSONL", "", "json.gz"):
        made[f"named.{extension}" if extension else "named"] = good, (2,)
    return made


WHOLE = whole_files()


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files(name, tmp_path):
    data, codes = WHOLE[name]
    (tmp_path / name).write_bytes(data)
    found = data_check(tmp_path, name, codes=codes)
    assert name in found.out + found.err or found.code == 0
    if found.code == 1:
        assert f"{name} line 1" in found.out


def _places(folder: pathlib.Path) -> dict[str, str]:
    """Kind -> path of something that is not a file of records."""
    made = {}
    for extension in ("json", "jsonl", "arrayrecord"):
        name = lambda kind, extension=extension: f"{kind}.{extension}"  # noqa: E731
        os.mkfifo(folder / name("pipe"))
        (folder / name("folder")).mkdir()
        (folder / name("zero")).symlink_to("/dev/zero")
        (folder / name("terminal")).symlink_to("/dev/tty")
        (folder / name("dangling")).symlink_to("nowhere")
        (folder / name("loop")).symlink_to(name("loop"))
        with (folder / name("sparse")).open("wb") as file:
            file.truncate(10**12)
        kinds = ("pipe", "folder", "zero", "terminal", "dangling", "loop", "sparse", "absent")
        made |= {f"{kind} {extension}": name(kind) for kind in kinds}
    made |= {"long": "x" * 300 + ".jsonl", "none": "", "bad tfds": "tfds:", "no split": "tfds:x",
             "no set": "tfds:no_such_set_at_all/train", "control": "a\x1b[2K\n.jsonl",
             "second": "pipe.arrayrecord,absent.arrayrecord"}  # fmt: skip
    return made


def test_what_is_not_a_file(tmp_path):
    for kind, path in _places(tmp_path).items():
        if path:
            found = data_check(tmp_path, path, codes=(2,))
            assert found.seconds < 5, kind


def test_train_and_check_refuse_the_same_files(tmp_path):
    """In `train`, too, every fault of a data file is one line and exit code 2."""
    for name in ("empty.json", "deep_lists.json", "utf16.json", "empty.jsonl",
                 "zip.arrayrecord", "named.csv"):  # fmt: skip
        (tmp_path / name).write_bytes(WHOLE[name][0])
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    paths = sorted(p.name for p in tmp_path.iterdir())
    for k, path in enumerate([*paths, "absent.jsonl", "tfds:x"]):
        found = harness.run(
            ["train", f"--config={ROOT}/tests/recipes/toy_config.py", f"--workdir={tmp_path}/w{k}",
             f"--config.data.sources.main.path={path}", "--config.data.order.epochs=1",
             "--config.compilation_cache=", "--config.tensorboard=false"],
            tmp_path,
        )  # fmt: skip
        # The commit of the code is written down.
        found.outside = [what for what in found.outside if "'git'" not in what]
        harness.judge(found, code=2, naming=path)


def test_a_broken_index_is_made_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines(GOOD, GOOD, GOOD))
    index = tmp_path / ".a.jsonl.offsets.npz"
    data_check(tmp_path, path, codes=(0,))
    saved = dict(np.load(index))
    for changes in (
        {"offsets": np.array([10**9] * 3)}, {"offsets": np.array([-5, 0, 0])},
        {"lengths": saved["lengths"][:1]},
        {"lines": np.zeros((3, 3))}, {"offsets": np.array(["a", "b", "c"])}, {"stamp": np.array(5)},
    ):  # fmt: skip
        np.savez(index, **(saved | changes))
        data_check(tmp_path, path, codes=(0,))
    index.unlink()
    os.mkfifo(index)
    data_check(tmp_path, path, codes=(0,))


# ---- records

ODD = (
    None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, "", " ", "x", "\0", "\ud800",
    FORGED,
    "<image>", "../../etc/passwd", "/etc/passwd", "http://a.b/c.png", "data:image/png;base64,AAAA",
    "file:///etc/passwd", "a" * 10_000, "~/.ssh/id", [], {}, [[]], [None], [1, 2], ["x"],
    ["<image>"],
    [{}], [{"from": "human"}], {"from": "human", "value": "Q"}, [[["deep"]]], {"url": "x"},
    ["\ud800"], [FORGED], ["a.png", 7], ["a.png", None], ["a.png", "../a.png"],
)  # fmt: skip
KEYS = (
    "id", "image", "images", "video", "videos", "conversations", "messages", "system", "kind",
    "Image", "img", "target_instances", "metadata",
)  # fmt: skip


def odd_records():
    """Several hundred: each key with each odd value, and turns with each odd part."""
    picture = GOOD | {"image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]}  # fmt: skip
    for key in KEYS:
        for value in ODD:
            yield picture | {key: value}
    for value in ODD:
        for key in ("from", "value", "role", "content", "image", "weight", "tool_calls", FORGED):
            turn = {"from": "human", "value": "Q", key: value}
            yield {"id": FORGED, "conversations": [turn, {"from": "gpt", "value": "A"}]}
        part = {"type": "image_url", "image_url": value}
        for parts in ([part], [{"type": value}], [{"type": "text", "text": value}], [value]):
            yield {"messages": [{"role": "user", "content": parts},
                                {"role": "assistant", "content": "A"}]}  # fmt: skip
    marker = random.Random(0)
    for _ in range(100):
        names = ["<image>", "<video>", "<Image>", "<image_1>", "<|image|>", "<img>", "<|im_end|>",
                 "<audio>", "text", "\n", "<image"]  # fmt: skip
        said = ["".join(marker.choices(names, k=marker.randrange(6))) for _ in range(4)]
        paths = marker.choices(["a.png", "clip.mp4", "none.png", "pipe.png"], k=marker.randrange(4))
        roles = ("human", "gpt") * 2
        turns = [{"from": r, "value": text} for r, text in zip(roles, said, strict=True)]
        yield {"image": paths, "conversations": turns}
    for kind in ("vstar", "visual_cot", "frame_prediction", "video_qa", "images", "image", "text"):
        for value in ODD:
            yield picture | {"kind": kind, "target_instances": value, "image": value}
            yield picture | {
                "kind": kind,
                "target_instances": [{"name": value, "bbox": [1, 2, 3, 4]}],
            }
            yield picture | {"kind": kind, "target_instances": [{"name": "a", "bbox": value}]}


def media(folder: pathlib.Path) -> None:
    Image.new("RGB", (8, 6), (9, 99, 9)).save(folder / "a.png")
    shutil.copy(CLIP, folder / "clip.mp4")
    os.mkfifo(folder / "pipe.png")


def outcomes(folder: pathlib.Path, records) -> collections.Counter:
    """Reasons of all records of a stream, "" where they are used; each names its line."""
    path = folder / "odd.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    config = DataConfig((SourceConfig(str(path)),), OrderConfig(epochs=1), row=RowConfig("chatml"))
    (source,), counts = open_sources(config, KINDS), collections.Counter()
    for k in range(len(source)):
        try:
            sample = source.sample(k, choices(0, 0, 0, k))
            config.images.load(sample.images)
            counts[""] += 1
        except BadSample as bad:
            assert bad.detail.startswith(f"{path} line {k + 1}") or str(folder) in bad.detail
            counts[bad.reason] += 1
    return counts


def test_odd_records(tmp_path):
    media(tmp_path)
    records = list(odd_records())
    counts = collections.Counter()

    def read():
        counts.update(outcomes(tmp_path, records))

    harness.attempt(read, tmp_path, code=0)
    assert counts.total() == len(records) > 1500
    assert not [reason for reason in counts if reason.startswith("error_")]
    assert counts[""] > 100 and len(counts) > 12, counts
    found = data_check(tmp_path, "odd.jsonl", codes=(1,))
    lines = found.out.splitlines()
    assert "nothing wrong found" not in lines and "error_" not in found.out
    assert lines[1].split()[:2] == ["odd", str(len(records))]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["a.png", "clip.mp4", "<image>\nQ", "human", "gpt", "user", "vstar"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "type", "text", "bbox"]),
                      inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
_RECORDS = st.dictionaries(
    st.sampled_from(["id", "image", "images", "video", "kind", "conversations", "messages",
                     "target_instances", "system"]) | st.text(max_size=4),
    _VALUES, max_size=5,
)  # fmt: skip


ANY = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@ANY
@given(records=st.lists(_RECORDS, min_size=1, max_size=5))
def test_records_of_any_values(records, tmp_path):
    """Each is used or is a bad sample that names its line; nothing else is raised."""
    if not (tmp_path / "a.png").exists():
        media(tmp_path)
    counts = outcomes(tmp_path, records)
    assert counts.total() == len(records)
    assert not [reason for reason in counts if reason.startswith("error_")]


@ANY
@given(lines=st.lists(st.binary(max_size=30) | _RECORDS.map(lambda r: json.dumps(r).encode()),
                      max_size=4))  # fmt: skip
def test_lines_of_any_bytes(lines, tmp_path):
    """A file is opened, or refused by name; its samples are used or bad."""
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\n".join(lines))
    config = DataConfig((SourceConfig(str(path)),), OrderConfig(epochs=1), row=RowConfig("chatml"))
    try:
        (source,) = open_sources(config, KINDS)
    except UserError as error:
        assert "odd.jsonl" in str(error)
        return
    for k in range(len(source)):
        with contextlib.suppress(BadSample):
            source.sample(k, choices(0, 0, 0, k))


def test_boxes_of_any_size(tmp_path):
    media(tmp_path)
    numbers = (0, -1, 1e18, -1e18, 1e308, float("nan"), float("inf"), 5, 2**63)
    rng = random.Random(1)
    records = []
    for k in range(150):
        box = [rng.choice(numbers) for _ in range(4)]
        box = box if k % 3 else [1, 2, rng.choice((5, 1e18)), 9e99]
        said = [{"from": ("human", "gpt")[i % 2], "value": "Q"} for i in range(4)]
        marks = [{"name": FORGED, "bbox": box}] * rng.choice((1, 1, 1, 1, 2000))
        records.append({"kind": "vstar", "image": "a.png", "target_instances": marks,
                        "conversations": said[:2]})  # fmt: skip
        crop = f"a.png###[{','.join(map(str, box))}]"
        records.append({"kind": "visual_cot", "image": ["a.png", crop], "conversations": said})
    counts = collections.Counter()
    harness.attempt(lambda: counts.update(outcomes(tmp_path, records)), tmp_path, code=0)
    assert counts[""] > 20 and set(counts) <= {"", "bad_boxes", "bad_crop"}, counts


def test_long_texts(tmp_path):
    """A million letters without a full stop, and much more than that."""
    texts = (
        "a",
        " ",
        "\n",
        "<",
        "<image",
        "é",
        "<|im_end|>",
        "focus on",
        "bounding box",
        ".",
        "a b",
    )
    records = []
    for text in texts:
        for kind in ("text", "vstar", "visual_cot"):
            said = [{"from": ("human", "gpt")[k % 2], "value": text * (200_000 // len(text))}
                    for k in range(4)]  # fmt: skip
            records.append({"kind": kind, "image": ["a.png", "a.png###[1,2,3,4]"],
                            "target_instances": [{"name": "a", "bbox": [1, 2, 3, 4]}],
                            "conversations": said})  # fmt: skip
    media(tmp_path)
    counts = collections.Counter()
    found = harness.attempt(lambda: counts.update(outcomes(tmp_path, records)), tmp_path, code=0)
    assert found.seconds < 10
    huge = [GOOD | {"conversations": [{"from": "human", "value": "Q"},
                                      {"from": "gpt", "value": "a" * 3_000_000}]}]  # fmt: skip
    (tmp_path / "huge.jsonl").write_bytes(_lines(*huge))
    found = data_check(tmp_path, "huge.jsonl", codes=(1,))
    assert "too_long" in found.out and "huge.jsonl line 1, id 'a'" in found.out
    with (tmp_path / "line.jsonl").open("wb") as file:
        file.write(_lines(GOOD)[:-1] + b" " * 40_000_000)
    assert "line 1" in data_check(tmp_path, "line.jsonl", codes=(2,)).err


# ---- images and videos


def odd_media():
    """(name, bytes): images and videos that are not what they seem."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        out = io.BytesIO()
        image.save(out, name)
        data = out.getvalue()
        rng = random.Random(name)
        for k in range(12):
            cut = data[: rng.randrange(len(data))]
            flipped = bytearray(data)
            for _ in range(1 + k):
                flipped[rng.randrange(min(len(data), 20 + 200 * (k % 2)))] ^= 1 << rng.randrange(8)
            yield f"cut{k}.{name.lower()}", cut
            yield f"flipped{k}.{name.lower()}", bytes(flipped)
        yield f"noise.{name.lower()}", data[:12] + os.urandom(200)
    for k, (w, h) in enumerate([(0, 5), (5, 0), (1, 60_000_000), (60_000_000, 1), (2**31 - 1, 1),
                                (2**31 - 1,) * 2, (100_000, 100_000), (70_000, 10)]):  # fmt: skip
        for depth, colour in ((8, 0), (16, 0), (8, 2), (16, 6), (1, 0), (8, 3), (7, 5)):
            yield f"size{k}_{depth}_{colour}.png", _png(w, h, depth, colour, b"\0" * 100)
    clip = CLIP.read_bytes()
    rng = random.Random(2)
    for k in range(30):
        data = bytearray(clip)
        for _ in range(1 + k):
            data[rng.randrange(len(data))] ^= 255
        yield f"flipped{k}.mp4", bytes(data)
        yield f"cut{k}.mp4", clip[: rng.randrange(len(clip))]
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    for k, address in enumerate(("/etc/passwd", "http://127.0.0.1:9/a.ts", "clip.mp4")):
        yield f"playlist{k}.mp4", playlist.format(address).encode()
    yield "concat.mp4", b"ffconcat version 1.0\nfile /etc/passwd\n"
    yield "dash.mp4", b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>'
    yield "sdp.mp4", b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 9 RTP/AVP 96\r\n"
    yield "empty.mp4", b""
    yield "noise.webm", b"\x1a\x45\xdf\xa3" + os.urandom(300)


def test_odd_media(tmp_path):
    records = []
    for name, data in odd_media():
        (tmp_path / name).write_bytes(data)
        records.append(name)
    for extension in ("png", "mp4", "mpg", "m4v"):
        os.mkfifo(tmp_path / f"pipe.{extension}")
        (tmp_path / f"zero.{extension}").symlink_to("/dev/zero")
        (tmp_path / f"folder.{extension}").mkdir()
        with (tmp_path / f"sparse.{extension}").open("wb") as file:
            file.truncate(10**11)
        records += [f"{kind}.{extension}" for kind in ("pipe", "zero", "folder", "sparse", "none")]
    said = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    path = tmp_path / "media.jsonl"
    path.write_bytes(_lines(*({"id": n, "image": n, "conversations": said} for n in records)))
    found = data_check(tmp_path, "media.jsonl", "--examples=1000", codes=(1,))
    assert len(records) > 280 and "error_" not in found.out, found.out
    good = int(found.out.splitlines()[1].split()[2])
    assert 5 < good < len(records) / 2
    for name in ("pipe.png", "zero.mp4", "playlist0.mp4", "playlist2.mp4", "size2_8_0.png"):
        assert f"id '{name}'" in found.out


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"kind": 3}', "\0", "[" * 1000, "null"])
def test_cache_that_is_none(meta, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/meta.json").write_text(meta)
    with pytest.raises(UserError, match="meta.json"):
        caches.ArrayCache(str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no cache in"):
        caches.ArrayCache(str(tmp_path))
