"""The reader of JSON and text: what it accepts, and the line that it says about everything else."""

import json
import os
import pathlib
import time

import pytest

from metamorph_jax import files
from metamorph_jax.errors import FileError, MissingFile


@pytest.fixture
def write(tmp_path):
    def put(data: bytes, name: str = "file.json") -> pathlib.Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return put


def test_reads_text_with_and_without_a_byte_order_mark(write):
    for start in (b"", b"\xef\xbb\xbf"):
        file = write(start + "ä €\r\n{}".encode())
        assert files.read_text(file) == "ä €\r\n{}"
        assert list(files.lines(file)) == [(1, "ä €"), (2, "{}")]
    assert files.read_json(write(b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}


def test_offsets_of_lines(write):
    file = write(b"\xef\xbb\xbfone\n\ntwo")
    assert list(files.raw_lines(file)) == [(1, 3, b"one\n"), (2, 7, b"\n"), (3, 8, b"two")]


NOT_FILES = {
    "missing": (lambda p: p / "none", "no file"),
    "below a file": (lambda p: put(p / "f", b"") / "x", "no file"),
    "folder": (lambda p: p, "is a folder, not a regular file"),
    "pipe": (lambda p: pipe(p / "pipe"), "is a pipe, not a regular file"),
    "device": (lambda p: "/dev/zero", "is a device, not a regular file"),
    "zero byte in the name": (lambda p: f"{p}/a\0b", "can't be read: embedded null byte"),
    "long name": (lambda p: f"{p}/{'a' * 5000}", "can't be read: File name too long"),
    "surrogate in the name": (lambda p: f"{p}/\ud800", "can't be read: "),
    "circle of links": (lambda p: circle(p / "link"), "can't be read: Too many levels"),
}


def put(path, data):
    path.write_bytes(data)
    return path


def pipe(path):
    os.mkfifo(path)
    return path


def circle(path):
    path.symlink_to(path)
    return path


@pytest.mark.parametrize("name", NOT_FILES)
@pytest.mark.parametrize("read", [files.regular, files.read_text, files.read_json,
                                  lambda p: list(files.lines(p))])  # fmt: skip
def test_only_regular_files_are_opened(tmp_path, name, read):
    make, message = NOT_FILES[name]
    with pytest.raises(FileError, match=message) as caught:
        read(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MissingFile | FileNotFoundError) == (message == "no file")


def test_sizes_are_bounded_before_anything_is_read(tmp_path):
    file = tmp_path / "sparse"
    with file.open("wb") as f:
        f.truncate(2**40)
    start = time.monotonic()
    with pytest.raises(FileError, match="sparse is larger than the 16,777,216 bytes"):
        files.read_json(file)
    with pytest.raises(FileError, match="sparse, line 1: longer than the 1,000 bytes"):
        list(files.lines(file, max_line=1000))
    assert time.monotonic() - start < 2


BAD_TEXT = {
    "cp1252": (b"ok\nna\xefve\n", "line 2: not UTF-8 .byte 0xef at byte 3 of the line"),
    "utf-16": ("a\n".encode("utf-16"), "line 1: not UTF-8 .it is UTF-16"),
    "surrogate": (b"\n\n\xed\xa0\x80", "line 3: not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_other_encodings_are_named_with_their_line(write, name):
    data, message = BAD_TEXT[name]
    file = write(data)
    for read in (files.read_text, lambda p: list(files.lines(p))):
        with pytest.raises(FileError, match=f"{file}, {message}"):
            read(file)


BAD_JSON = {
    "empty": (b"", "is not JSON"),
    "cut off": (b'{"a": 1', "is not JSON"),
    "zeros": (b"\0" * 64, "is not JSON"),
    "control characters": (b'{"a": \x1b[2J}', "is not JSON"),
    "list": (b"[]", "holds a list, not an object"),
    "string": (b'"\\u001b[2J"', "holds a string, not an object"),
    "number": (b"12", "holds a number, not an object"),
    "null": (b"null", "holds null, not an object"),
    "true": (b"true", "holds true or false, not an object"),
    "deep list": (b"[" * 200_000 + b"]" * 200_000, "nested deeper than 100 levels"),
    "deep table": (b'{"a":' * 101 + b"1" + b"}" * 101, "nested deeper than 100 levels"),
    "many digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    "half a pair": (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
    "half a pair as key": (b'{"\\udc00": 1}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_not_an_object(write, name):
    data, message = BAD_JSON[name]
    file = write(data)
    with pytest.raises(FileError, match=message) as caught:
        files.read_json(file)
    assert str(caught.value).startswith(str(file))
    assert str(caught.value).isprintable()


def test_good_json(write):
    deep = b'{"a":' * 100 + b"1" + b"}" * 100
    assert files.read_json(write(deep))["a"]
    assert files.read_json(write(b'{"a": "\\ud83d\\ude00"}')) == {"a": "😀"}
    assert files.read_json(write(b"[1]"), list) == [1]
    assert files.read_json(write(b"1"), None) == 1
    wide = json.dumps([{"a": [1]}] * 1000).encode()
    assert len(files.read_json(write(wide), list)) == 1000


def test_keys_that_occur_twice(write):
    file = write(b'{"a": 1, "b": {"c": 1, "c": 2}}')
    assert files.read_json(file) == {"a": 1, "b": {"c": 2}}
    with pytest.raises(FileError, match="c occurs twice"):
        files.read_json(file, unique=True)


def test_what_was_expected_is_said(write):
    with pytest.raises(FileError, match="holds a list, not an object; expected an index of shards"):
        files.read_json(write(b"[]"), what="an index of shards")


def test_shown():
    assert files.shown("a\x1b[2J\nb\ud800é") == "a\\x1b[2J\\nb\\ud800é"
    assert files.shown("x" * 500, 10) == "x" * 10 + "…"
