"""Tars and documents of every bad kind: used, or named by file and record; nothing else is raised.

A tar is damaged at every header and in its data; a record of each layout has each of its values
replaced by each odd one.
"""

import collections
import io
import json
import os
import tarfile

import pytest
from PIL import Image

from metamorph_jax.data.config import DataConfig, OrderConfig, RowConfig, SourceConfig
from metamorph_jax.data.pipeline import open_sources
from metamorph_jax.data.sources import documents
from metamorph_jax.data.stream import choices
from metamorph_jax.errors import BadSample, UserError
from metamorph_jax.sampling.requests import read_requests
from tests.hostile import harness
from tests.hostile.test_data import FORGED, ODD

PICTURE = io.BytesIO()
Image.new("RGB", (8, 6), (9, 99, 9)).save(PICTURE, "PNG")
RECORDS = {
    "mmc4": {
        "text_list": ["One.", "Two."],
        "image_info": [{"image_name": "a.png", "matched_text_index": 1, "matched_sim": 0.5}],
        "similarity_matrix": [[0.1, 0.5]],
    },
    "obelics": {"images": ["a.png", None], "texts": [None, "One."], "metadata": "[]"},
    "omnicorpus": {"images": ["a.png", None], "texts": [None, "One."], "valid_image": [True]},
    "comm": {
        "title": "T",
        "step_info": [[{"type": "text", "content": "A"}, {"type": "image", "image_path": "a.png"}]],
    },
    "pair": {"image": "a.png", "caption": "One.", "txt": "Two."},
}


def outcomes(path, kind="auto") -> collections.Counter:
    """Reasons of all records of a file, "" where they are used; each names the file."""
    source = SourceConfig(str(path), kind=kind)
    config = DataConfig((source,), OrderConfig(epochs=1), row=RowConfig("document"))
    counts = collections.Counter()
    (found,) = open_sources(config, documents.KINDS)
    for k in range(len(found)):
        try:
            sample = found.sample(k, choices(0, 0, 0, k))
            config.images.load(sample.images)
            counts[""] += 1
        except BadSample as bad:
            assert str(path.parent) in bad.detail and bad.detail.isprintable(), bad.detail
            counts[bad.reason] += 1
    return counts


def variants(value):
    """The value with each of its parts, itself included, replaced by each odd one."""
    yield from ODD
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: other} for other in variants(value[key]))
        yield value | {FORGED: FORGED}
    if isinstance(value, list):
        for k in range(len(value)):
            yield from ([*value[:k], other, *value[k + 1 :]] for other in variants(value[k]))
        yield value * 3


@pytest.mark.parametrize("kind", RECORDS)
def test_odd_documents(kind, tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE.getvalue())
    os.mkfifo(tmp_path / "pipe.png")
    lines = [value for value in variants(RECORDS[kind]) if isinstance(value, dict)]
    lines += [line | {"kind": other} for line in lines[::7] for other in RECORDS]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = collections.Counter()

    def read():
        counts.update(outcomes(path))
        counts.update(outcomes(path, kind))

    harness.attempt(read, tmp_path, code=0)
    assert counts.total() == 2 * len(lines) > 100
    assert counts[""] > 10 and len(counts) > 4, counts
    assert not [reason for reason in counts if reason.startswith("error_")], counts


def test_odd_annotations(tmp_path, capsys):
    """Each record of a file of prompts is a request, or is named with what was expected."""
    good = {
        "sentences": ["A kite.", "Down."], "images": ["a.png"], "sentence_ixs": [1],
        "image_first": True, "generate_mode": "generate_both", "num_iter": 2, "id": "a",
    }  # fmt: skip
    records = list(variants(good))
    path = tmp_path / "annt.json"
    path.write_text(json.dumps([r for r in records if json.dumps(r).find("\\ud800") < 0]))
    found, bad = read_requests(str(path))
    said = capsys.readouterr().err.splitlines()
    assert bad == len(said) > 200 and len(found) > 10
    assert all(line.startswith(f"{path}, record ") and line.isprintable() for line in said)


def tar_of(members, kind=tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def damaged_tars():
    """(name, bytes) of tars that are cut, changed, or lie about sizes and names."""
    members = [
        (f"{'long' * 40 * (k == 1)}{k}.{end}", data)
        for k in range(3)
        for end, data in (("png", PICTURE.getvalue()), ("txt", b"A kite"))
    ]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = tar_of(members, kind)[:7000]
        yield from harness.damaged(whole, 331, 60, kind, (1, 3, 40))
    start = tar_of(members[:2])[: 4 * 512]
    for size in (
        b"77777777777\0",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"-0000000001\0",
        b"x" * 12,
    ):
        for type_ in b"0LKxgS5\0Z":
            head = bytearray(tar_of([("b.txt", b"text")])[:512])
            head[124:136], head[156] = size, type_
            head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 8 * 32)
            yield f"size {size!r} of type {type_}", start + bytes(head) + b"5 a=b\n" * 100
    for text in (b"10 path=", b"-5 path=a\n", b"9" * 600, b"0 =\n", b"18 size=-99999999\n",
                 b"30 size=9999999999999999999\n", b"12 path=\0\0\0\n", b"\xff\xfe"):  # fmt: skip
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, len(text)
        yield (
            f"attributes {text[:20]!r}",
            start
            + info.tobuf(tarfile.USTAR_FORMAT)
            + text.ljust(1024, b"\0")
            + tar_of(members[4:]),
        )


def test_damaged_tars(tmp_path):
    """Samples before the damage may be used; the rest is one bad sample, or the file is refused."""
    path, counts = tmp_path / "odd.tar", collections.Counter()

    def read():
        for name, data in damaged_tars():
            path.write_bytes(data)
            path.with_name(".odd.tar.offsets.npz").unlink(missing_ok=True)
            try:
                counts.update(outcomes(path))
            except UserError as error:
                counts["refused"] += 1
                assert "odd.tar" in str(error) and str(error).isprintable(), (name, error)

    found = harness.attempt(read, tmp_path, code=0)
    assert found.seconds < 30
    assert min(counts[reason] for reason in ("", "refused", "broken_tar")) > 10, counts
    assert not [reason for reason in counts if reason.startswith("error_")], counts


def test_members_that_are_no_texts(tmp_path):
    """JSON that is none, texts of other encodings, pickles that nobody loads, huge members."""
    members = [
        ("0.json", b"{"), ("1.json", b"[" * 100_000), ("2.txt", b"\xff\xfea"), ("3.json", b"[]"),
        ("4.pkl", b"cos\nsystem\n(S'touch owned'\ntR."), ("5.txt", b" " * 2**20),
        ("../../6.png", PICTURE.getvalue()), ("../../6.txt", b"up"), ("7.png", b"GIF89a"),
        ("7.txt", b"no GIF"), ("8.png", b""), ("8.txt", b"empty"),
    ]  # fmt: skip
    path = tmp_path / "odd.tar"
    path.write_bytes(tar_of(members))
    counts = collections.Counter()
    harness.attempt(lambda: counts.update(outcomes(path, "pair")), tmp_path, code=0)
    assert counts == {
        "bad_json": 3, "bad_text": 1, "no_image": 2, "": 1, "broken_image": 1, "zero_byte": 1,
    }  # fmt: skip
    assert not (tmp_path / "owned").exists()
