"""Parquet files as records: images in them, paths, and what is neither."""

import pickle

import numpy as np
import pytest

from metamorph_jax.data import images
from metamorph_jax.data.config import DataConfig, OrderConfig, RowConfig, SourceConfig
from metamorph_jax.data.pipeline import open_sources
from metamorph_jax.data.sources import documents, open_records, parquet
from metamorph_jax.data.stream import choices
from metamorph_jax.errors import FileError
from tests.data.conftest import conversation, make_image, png

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, rows, **kw):
    pq.write_table(pa.Table.from_pylist(rows), path, **kw)


def samples(path, count, **kw):
    config = DataConfig((SourceConfig(str(path), **kw),), OrderConfig(), row=RowConfig("document"))
    (source,) = open_sources(config, documents.KINDS)
    assert len(source) == count
    return [source.sample(k, choices(0, 0, 0, k)) for k in range(count)]


def test_conversations_with_images(tmp_path):
    """In their bytes, by path only, and without any."""
    make_image(2).save(tmp_path / "b.png")
    said, alone = conversation("<image>\nQ", "A"), conversation("Q", "A")
    write(tmp_path / "x.parquet", [
        {"id": "0", "image": {"bytes": png(1), "path": "gone.png"}, "conversations": said},
        {"id": "1", "image": {"bytes": None, "path": "b.png"}, "conversations": said},
        {"id": "2", "image": {"bytes": None, "path": None}, "conversations": alone},
        {"id": "3", "image": None, "conversations": alone},
    ], row_group_size=3)  # fmt: skip
    found = samples(tmp_path / "x.parquet", 4)
    assert [s.kind for s in found] == ["image", "image", "text", "text"]
    for sample, seed in zip(found, (1, 2), strict=False):
        np.testing.assert_array_equal(images.load(sample.images)[0], make_image(seed))
    assert found[0].where == f"{tmp_path}/x.parquet row 0, id '0'"
    records = open_records(str(tmp_path / "x.parquet"))
    again = pickle.loads(pickle.dumps(records))
    assert [again[k] for k in (3, 0, 2)] == [records[k] for k in (3, 0, 2)]


def test_documents_and_pairs(tmp_path):
    write(tmp_path / "o.parquet", [
        {"images": [{"bytes": png(1), "path": None}, None, {"bytes": png(2), "path": None}],
         "texts": [None, "A kite", None], "general_metadata": "{}"}
    ])  # fmt: skip
    options = documents.Documents(drop_single=0, image_first=1)
    (page,) = samples(tmp_path / "o.parquet", 1, documents=options)
    assert page.turns == (("user", "<image>"), ("assistant", "A kite<image>"))
    for image, seed in zip(images.load(page.images), (1, 2), strict=True):
        np.testing.assert_array_equal(image, make_image(seed))
    write(tmp_path / "p.parquet", [{"key": "7", "jpg": png(3), "caption": "Kite", "other": b"x"}])
    (pair,) = samples(tmp_path / "p.parquet", 1, documents=options)
    assert pair.turns[-1] == ("assistant", "kite")
    np.testing.assert_array_equal(images.load(pair.images)[0], make_image(3))


def test_row_groups_are_read_once_while_they_are_kept(tmp_path, monkeypatch):
    write(tmp_path / "x.parquet", [{"n": k} for k in range(20)], row_group_size=4)
    records = open_records(str(tmp_path / "x.parquet"))
    assert [records[k]["n"] for k in (19, 0, 7, 8, 1, 15)] == [19, 0, 7, 8, 1, 15]
    assert list(records._groups) == [1, 2, 0, 3]
    monkeypatch.setattr(parquet, "MAX_GROUP", 10)
    with pytest.raises(FileError, match="x.parquet has a row group of .* smaller row groups"):
        open_records(str(tmp_path / "x.parquet"))


def test_what_is_not_parquet(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    with pytest.raises(FileError, match="x.parquet is not Parquet"):
        open_records(str(tmp_path / "x.parquet"))
