"""WebDataset tars as records, and data sets in several files."""

import os
import pickle
import tarfile

import numpy as np
import pytest

from metamorph_jax import cli
from metamorph_jax.data import images, option
from metamorph_jax.data.config import DataConfig, OrderConfig, RowConfig, SourceConfig
from metamorph_jax.data.pipeline import open_sources
from metamorph_jax.data.sources import documents, open_records, tars
from metamorph_jax.data.sources.records import RecordSource
from metamorph_jax.data.stream import choices
from metamorph_jax.errors import BadSample, FileError, MissingFile
from tests.data.conftest import make_image, png, write_jsonl, write_tar


def keys(records):
    return [records.where(k).split("sample ")[1] for k in range(len(records))]


def test_samples_of_a_tar(tmp_path):
    """Their order is kept; what belongs to no sample is passed over."""
    folder, link = tarfile.TarInfo("a"), tarfile.TarInfo("a/0002.png")
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
    write_tar(tmp_path / "x.tar", [
        ("__meta__/a.json", "{}"), ("readme", "no dot"), (".hidden.json", "{}"), ("", folder),
        ("./a/0002.JPG", png(2)), ("", link), ("a/0002.json", {"caption": "two"}),
        ("a/._0002.jpg", b"mac"),
        ("a/0001.seg.png", png(9)), ("a/0001.png", png(1)), ("a/0001.txt", "one\n"),
        ("b.c/0003.jpg", png(3)), ("b.c/0003.jpg", png(4)), ("b.c/0003.cls", "7"),
        ("a/0002.txt", "late"), ("d.v2.json", {"images": ["0.png", None], "texts": [None, "t"]}),
        ("d.0.png", png(5)),
    ])  # fmt: skip
    records = open_records(str(tmp_path / "x.tar"))
    assert keys(records) == ["a/0002", "a/0001", "b.c/0003", "b.c/0003", "a/0002", "d"]
    assert records[0] == {"caption": "two", "image": "a/0002.JPG"}
    assert records[1] == {"txt": "one\n", "image": "a/0001.png"}
    assert records[2]["image"] == "b.c/0003.jpg" and records[4] == {"txt": "late"}
    assert "images" not in records[5] and records[5]["image"] == "d.0.png"  # its json is "v2.json"
    for k, name, seed in ((0, "jpg", 2), (1, "png", 1), (1, "0001.seg.png", 9), (3, "jpg", 4)):
        assert images.read_ref(records.members(k)[name]) == png(seed)
    (loaded,) = images.load([records.members(3)["jpg"]])
    np.testing.assert_array_equal(loaded, make_image(4))
    again = pickle.loads(pickle.dumps(records))
    assert [again[k] for k in range(len(again))] == [records[k] for k in range(len(records))]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(kind, tmp_path):
    long = "folder/" * 40 + "é" * 30
    members = [(f"{long}{k}.{end}", png(k)) for k in range(3) for end in ("png", "b.png")]
    write_tar(tmp_path / "x.tar", members, kind)
    samples, fault = tars.scan(tmp_path / "x.tar")
    assert not fault and [m.name for sample in samples for m in sample] == [n for n, _ in members]
    assert [len(sample) for sample in samples] == [2, 2, 2]


def test_the_index_is_kept_and_made_again(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{k}.txt", f"text {k}") for k in range(5)])
    want = [{"txt": f"text {k}"} for k in range(5)]
    index = tmp_path / ".x.tar.offsets.npz"
    texts = lambda: [open_records(str(path))[k] for k in range(5)]  # noqa: E731
    assert texts() == want and index.exists()
    saved = dict(np.load(index))
    for changes in ({"ends": saved["ends"] + 1}, {"offsets": saved["offsets"] + 10**9},
                    {"sizes": saved["sizes"][:2]}, {"name_ends": np.array(["a"] * 5)}):  # fmt: skip
        np.savez(index, **saved | changes)
        tars._index.cache_clear()
        assert texts() == want
    write_tar(path, [(f"{k}.txt", f"next {k}") for k in range(5)])
    assert [r["txt"] for r in texts()] == [f"next {k}" for k in range(5)]


def test_a_tar_that_is_cut_off(tmp_path):
    """The samples before are used; the one that it ends in is named, and counted."""
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{k}.{end}", png(k)) for k in range(3) for end in ("jpg", "png")])
    whole = path.read_bytes()
    last = tars.scan(path)[0][-1]
    for cut in (last[0].offset + 5, last[1].offset + 5):
        path.write_bytes(whole[:cut])
        records = open_records(str(path))
        assert len(records) == 3 and records[1]["image"] == ["1.jpg", "1.png"]
        with pytest.raises(
            BadSample, match=r"broken_tar: it is cut off in member .*2\.[jp].*"
        ) as e:
            records[2]
        assert "sample '" in str(e.value) and records.where(2) == str(path)
    for cut in (last[1].offset + last[1].size, last[1].offset - 300):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadSample, match=f"broken_tar: it is cut off at byte {cut}; sample '2'"):
            open_records(str(path))[2]
    broken = bytearray(whole)
    broken[last[0].offset - 500 : last[0].offset - 400] = b"x" * 100
    path.write_bytes(broken)
    source = RecordSource("s", open_records(str(path)), None)
    with pytest.raises(BadSample, match=r"x\.tar: .*no header of a member at byte"):
        source.sample(2, np.random.default_rng(0))


@pytest.mark.parametrize("data, why", [
    (b"\x1f\x8b" + b"a" * 999, "compressed .gzip.; decompress it"), (b"a" * 999, "no header"),
    (b"short", "cut off at byte 5"),
])  # fmt: skip
def test_what_is_not_a_tar(data, why, tmp_path):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(FileError, match=rf"x\.tar is not a tar file: .*{why}"):
        open_records(str(tmp_path / "x.tar"))


def test_several_files(tmp_path, capsys):
    for k in (8, 9, 11):
        write_tar(tmp_path / f"p-{k:04}.tar", [(f"{k}{i}.txt", f"{k} {i}") for i in range(2)])
    write_jsonl(tmp_path / "00.txt", [{"image": "a.png", "caption": "A"}])
    write_jsonl(tmp_path / "01.txt", [{"image": "b.png", "caption": "B"}, {}])
    texts = lambda records: [records[k]["txt"] for k in range(len(records))]  # noqa: E731
    want = [f"{k} {i}" for k in (8, 9, 11) for i in range(2)]
    records = open_records(str(tmp_path / "p-{0008..0011}.tar"))
    assert texts(records) == want
    assert "1 of 4 files are missing and left out (p-0010.tar)" in capsys.readouterr().err
    assert texts(open_records(str(tmp_path / "p-*.tar"))) == want
    assert records.where(3) == f"{tmp_path}/p-0009.tar sample 91"
    assert records.file(4) == str(tmp_path / "p-0011.tar")
    pairs = open_records(str(tmp_path / "{00..01}.txt"))
    assert [pairs[k].get("caption") for k in range(3)] == ["A", "B", None]
    assert pairs.where(2) == f"{tmp_path}/01.txt line 2" and pairs.members(0) == {}
    os.rename(tmp_path / "00.txt", tmp_path / "a,{0..1}*.txt")  # a name like any other
    assert len(open_records(str(tmp_path / "a,{0..1}*.txt"))) == 1
    with pytest.raises(MissingFile, match="no file .*q-"):
        open_records(str(tmp_path / "q-{00..99}.tar"))
    for wide in (
        "{0..99999999}",
        "{0..999}{0..9999}",
        "{5..4}",
        "{" + "9" * 99 + ".." + "9" * 99 + "}",
    ):
        with pytest.raises(FileError, match="more than|not a range"):
            open_records(str(tmp_path / f"{wide}.tar"))
    args = type("Args", (), dict(data=[str(tmp_path / "p-{0008..0009}.tar")], data_root=""))
    assert option.files(args) == args.data


def test_pythons_quotes_are_named(tmp_path):
    (tmp_path / "0.txt").write_text("{'image': 'a.png', 'caption': 'A'}\n")
    with pytest.raises(BadSample, match="line 1 is not JSON.*Python's quotes"):
        open_records(str(tmp_path / "0.txt"))[0]


def test_images_with_captions_from_tars(tmp_path, capsys):
    """As img2dataset writes them; a sample without one of them is bad, by name."""
    write_tar(tmp_path / "0.tar", [
        ("000000007.png", png(7)), ("000000007.json", {"caption": "Web", "top_caption": "A Kite"}),
        ("000000007.txt", "Web"),
        ("000000008.png", png(8)), ("000000009.txt", "no image"),
    ])  # fmt: skip
    source = SourceConfig(str(tmp_path / "0.tar"), kind="pair")
    config = DataConfig((source,), OrderConfig(epochs=1), row=RowConfig("chatml"))
    (found,) = open_sources(config, documents.KINDS)
    texts = {found.sample(0, choices(0, 0, 0, k)).turns for k in range(20)}
    assert texts == {(("user", "<image>"), ("assistant", "web")), (("assistant", "web<image>"),)}
    assert cli.main(["data", "check", str(tmp_path / "0.tar"), "--kind=pair", "--threads=1"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["0", "3", "1", "2", "pair", "1"]
    assert [line.split()[:3] for line in table[4:]] == [
        ["0", f"no_{w}", "1"] for w in ("caption", "image")
    ]
    (loaded,) = images.load(found.sample(0, choices(0, 0, 0, 0)).images)
    np.testing.assert_array_equal(loaded, make_image(7))
    for k, why in (
        (1, "no_caption: .*0.tar sample 000000008"),
        (2, "no_image: .*sample 000000009"),
    ):
        with pytest.raises(BadSample, match=why):
            found.sample(k, choices(0, 0, 0, k))
