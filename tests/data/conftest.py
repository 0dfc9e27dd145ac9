import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image


class Letters:
    """A toy ChatML tokenizer: one id per character; vocabulary 1000."""

    special = ("<|im_start|>", "<|im_end|>")
    unk_token_id, unk_token = 0, "<unk>"

    def encode(self, text, add_special_tokens=False):
        return [ord(c) % 900 for c in text]

    def convert_tokens_to_ids(self, token):
        return 900 + self.special.index(token) if token in self.special else 0

    def __len__(self):
        return 1000


class Ends(Letters):
    """Letters with a BOS and an EOS."""

    special = ("^", "$")
    bos_token, bos_token_id, eos_token = "^", 900, "$"

    def encode(self, text, add_special_tokens=False):
        return [900] * add_special_tokens + super().encode(text)

    def decode(self, ids):
        return "".join("^" if i == 900 else chr(i) for i in ids)


@pytest.fixture
def letters():
    return Letters()


def make_image(seed, w=24, h=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))


def png(seed, w=24, h=16):
    out = io.BytesIO()
    make_image(seed, w, h).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members, kind=tarfile.USTAR_FORMAT):
    """Members are (name, bytes, text or dict)."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            data = json.dumps(data) if isinstance(data, dict) else data
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def conversation(*texts):
    return [{"from": ("human", "gpt")[k % 2], "value": t} for k, t in enumerate(texts)]


@pytest.fixture
def clip(tmp_path):
    """30 frames at 10 a second, frame k grey 8 k, one red pixel corner."""
    av = pytest.importorskip("av")
    path = str(tmp_path / "v.mp4")
    with av.open(path, "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.bit_rate = 10_000_000
        for k in range(30):
            pixels = np.full((32, 32, 3), 8 * k, np.uint8)
            pixels[:16, :16] = (255, 0, 0)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.fixture
def dataset(tmp_path):
    """A folder with images and 40 records of mixed kinds, five of them bad. (path, folder)."""
    records = []
    for k in range(40):
        n = k % 4
        paths = [f"p{k}_{i}.png" for i in range(n)]
        for i, name in enumerate(paths):
            make_image(100 * k + i).save(tmp_path / name)
        marks = "<image>" * max(n - 1, min(n, 1))
        records.append({
            "id": f"r{k}",
            **({"image": paths if n > 1 else paths[0]} if n else {}),
            "conversations": conversation(
                f"{marks}\nQuestion {'x' * (k % 7)}?", "A" * (k % 11 + 1) + "<image>" * (n > 1)
            ),
        })  # fmt: skip
    (tmp_path / "p1_0.png").unlink()  # missing
    (tmp_path / "p5_0.png").write_bytes(b"")  # zero byte
    data = (tmp_path / "p9_0.png").read_bytes()
    (tmp_path / "p9_0.png").write_bytes(data[: len(data) // 2])  # truncated
    make_image(7).save(tmp_path / "p13_0.png", format="JPEG")  # misnamed: used
    records[17]["conversations"][0]["value"] = "no marker"
    records[20]["conversations"][1]["value"] = ""  # nothing to learn
    path = tmp_path / "data.jsonl"
    write_jsonl(path, records)
    return path, tmp_path
