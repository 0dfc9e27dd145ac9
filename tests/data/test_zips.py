"""Zips of JSON lines: read at random without unpacking them, and every kind of damage is named."""

import json
import pickle
import zipfile

import numpy as np
import pytest

from metamorph_jax.data.config import DataConfig, SourceConfig
from metamorph_jax.data.pipeline import open_sources
from metamorph_jax.data.sources import documents, zips
from metamorph_jax.data.sources.records import open_records
from metamorph_jax.data.sources.zips import ZippedRecords
from metamorph_jax.data.stream import choices
from metamorph_jax.errors import BadSample, FileError
from tests.data.conftest import make_image

ROWS = [{"n": k, "text": "é" * k} for k in range(5)]


def write(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return str(path)


def text(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_lines_of_all_members(compression, tmp_path):
    """In any order, from an index that is made once, and in another process as well."""
    members = {"a.jsonl": "\ufeff" + text(ROWS[:2]) + "\n\n", "__MACOSX/a.jsonl": "x"}
    members |= {"read.me": "x", "b.jsonl": text(ROWS[2:4]), "c.jsonl": text(ROWS[4:]) + "\n[]\n"}
    path = write(tmp_path / "x.jsonl.zip", members, compression)
    for _ in range(2):  # the second time from the index
        found = open_records(path)
        assert isinstance(found, ZippedRecords) and len(found) == 6
        assert [found[k] for k in (4, 0, 3, 1, 2)] == [ROWS[k] for k in (4, 0, 3, 1, 2)]
        assert len(found._unpacked) == zips.KEPT
        assert found.where(3) == f"{path}: b.jsonl line 2"
        with pytest.raises(BadSample, match="bad_json"):
            found[5]
        ((line, _),) = found.bad_lines
        assert line == 2
    assert (tmp_path / ".x.jsonl.zip.offsets.npz").is_file()
    assert pickle.loads(pickle.dumps(found))[1] == ROWS[1]


def test_a_shard_of_mmc4(tmp_path):
    """Its images lie in the folder of its number, as beside an unpacked shard."""
    (tmp_path / "7").mkdir()
    make_image(3).save(tmp_path / "7" / "n.png")
    record = {
        "text_list": ["One."], "image_info": [
            {"image_name": "n.png", "matched_text_index": 0, "matched_sim": 0.5}],
    }  # fmt: skip
    write(tmp_path / "docs_no_face_shard_7_v3.jsonl.zip", {"docs.jsonl": text([record])})
    own = documents.Documents(drop_single=0.0, image_first=0.0)
    config = DataConfig((SourceConfig(str(tmp_path / "docs_*.zip"), "d", documents=own),))
    (source,) = open_sources(config, documents.KINDS)
    sample = source.sample(0, choices(0, 0, 0, 0))
    assert sample.kind == "mmc4" and sample.images[0].path == str(tmp_path / "7" / "n.png")


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 and nothing")
    empty = write(tmp_path / "empty.zip", {"a.txt": "x"})
    for path, why in ((tmp_path / "no.zip", "no.zip is not a zip"), (empty, "no member that ends")):
        with pytest.raises(FileError, match=why):
            open_records(str(path))
    path = write(tmp_path / "big.zip", {"a.jsonl": text(ROWS)})
    with monkeypatch.context() as patch:
        patch.setattr(zips, "MAX_MEMBER", 9)
        with pytest.raises(FileError, match=r"a.jsonl has \d+ bytes, at most 9"):
            open_records(path)
    found = open_records(path)
    data = bytearray((tmp_path / "big.zip").read_bytes())
    data[45:60] = bytes(15)
    (tmp_path / "big.zip").write_bytes(data)
    found._unpacked.clear()
    with pytest.raises(BadSample, match="broken_zip.*a.jsonl is damaged"):
        found[0]
    with pytest.raises(FileError, match="a.jsonl is damaged"):
        open_records(path, str(tmp_path / "index"))


def test_an_index_of_other_members_is_made_anew(tmp_path):
    path = write(tmp_path / "x.zip", {"a.jsonl": text(ROWS)})
    found = open_records(path)
    good = [found.member, found.offsets, found.lengths, found.lines]
    assert found._fits(good)
    for k, wrong in ((0, good[0] + 1), (1, good[1] + 10**6), (3, good[3][:2])):
        assert not found._fits([wrong if n == k else x for n, x in enumerate(good)])
    assert not found._fits([np.array(["x"] * 5)] * 4)


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "comm.pkl"
    path.write_bytes(pickle.dumps(ROWS))
    with pytest.raises(FileError, match="comm.pkl is a pickle.*python -m metamorph_jax.data.sets"):
        open_records(str(path))
