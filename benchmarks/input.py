"""The input pipeline against the reference loader's work: samples per second, useful positions.

    python benchmarks/input.py [--rounds 5] [--smoke]

500 synthetic JPEGs of 640x480 (noise of several octaves, quality 90), one image and two questions
with answers each, JSON lines, a byte-level BPE of 8000 entries, 384 px SigLIP, `llama3` template.
Ours packs rows of 4096; the peer does what the reference loader does (transformers'
SigLIP processor on Pillow, tokenising each piece and then each round again for the masks, padding)
in torch's DataLoader with batches of 6. Both run endlessly and are timed after their first 500
samples, so starting the workers (forked by torch, spawned by Grain) is left out. `limit_fraction`:
share of what decoding and resizing alone allow on the cores in use.

Useful positions: real positions among those computed, on a mixture of lengths, in packed rows of
4096 against batches of 6 padded to their longest. Text log-normal (median 150, sigma 0.8); 30 % of
samples without an image, 50 % with one, the rest with 2 to 10; each takes 64 + 2 positions.
"""

import dataclasses
import json
import os
import pathlib
import tempfile
import time

import common
import numpy as np
from PIL import Image

from metamorph_jax.data import cache as caches
from metamorph_jax.data import images
from metamorph_jax.data.chat import Chat, Markers
from metamorph_jax.data.config import (
    CacheConfig,
    DataConfig,
    InputSpec,
    ReadingConfig,
    RowConfig,
    SourceConfig,
)
from metamorph_jax.data.packing import FirstFit, Size
from metamorph_jax.data.pipeline import all_refs, make_pipeline, open_sources
from metamorph_jax.data.views import Single
from metamorph_jax.recipe import Shard

SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<image_start>", "<image_end>",
)  # fmt: skip
TOWER_WIDTH = 1152


def noise(rng, w=640, h=480) -> Image.Image:
    """Noise of several octaves: about as hard to decode as a photograph."""
    total = np.zeros((h, w, 3), np.float32)
    for octave in range(6):
        size = (max(w >> octave, 1), max(h >> octave, 1))
        raw = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
        total += np.asarray(raw.resize((w, h), Image.Resampling.BILINEAR)) * 2.0**octave
    return Image.fromarray((total / (2**6 - 1)).astype(np.uint8))


def make_data(folder: pathlib.Path, count: int, seed: int = 0):
    """Writes images, records and a tokenizer; returns the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwyp"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(6000)]

    def text(n):
        return " ".join(words[int(i)] for i in np.minimum(rng.zipf(1.3, n), len(words)) - 1)

    records = []
    for k in range(count):
        noise(rng).save(folder / f"{k}.jpg", quality=90)
        values = ["<image>\n" + text(20) + "?", text(30), text(15) + "?", text(40)]
        turns = [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
        records.append({"id": str(k), "image": f"{k}.jpg", "conversations": turns})
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator((t["value"] for r in records for t in r["conversations"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=SPECIAL[0], pad_token=SPECIAL[1]
    )


class Ours:
    """Draws `count` samples a call from an endless pipeline."""

    def __init__(self, config: DataConfig, spec: InputSpec, chat: Chat, count: int):
        self.pipeline = make_pipeline(config, spec, chat, open_sources(config), Shard(1))
        self.count = count
        self.positions = self.useful = 0

    def __call__(self):
        end = self.pipeline.samples_seen + self.count
        while self.pipeline.samples_seen < end:
            batch = next(self.pipeline)
            self.positions += batch.segments.size
            self.useful += int((batch.segments > 0).sum())


class PeerData:
    """The reference loader's work on one sample, as a torch dataset of `length` samples."""

    def __init__(self, folder: pathlib.Path, tokenizer, length: int, size: int):
        import transformers

        kind = getattr(transformers, "SiglipImageProcessorPil", transformers.SiglipImageProcessor)
        self.processor = kind(
            size={"height": size, "width": size}, resample=3, do_rescale=True, do_normalize=True,
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        )  # fmt: skip
        self.folder, self.tokenizer, self.length = folder, tokenizer, length
        self.path = folder / "data.jsonl"
        self.offsets, at = [], 0
        with open(self.path, "rb") as f:
            for line in f:
                self.offsets.append(at)
                at += len(line)

    def __len__(self):
        return self.length

    def ids(self, text: str) -> list[int]:
        """Pieces around the marker, each with a BOS that is stripped again; sentinels between."""
        pieces = [[0, *self.tokenizer(p).input_ids] for p in text.split("<image>")]
        out = pieces[0]
        for piece in pieces[1:]:
            out = [*out, -200, *piece[1:]]
        return out

    def __getitem__(self, k):
        import torch

        with open(self.path, "rb") as f:
            f.seek(self.offsets[k % len(self.offsets)])
            record = json.loads(f.readline())
        image = Image.open(self.folder / record["image"]).convert("RGB")
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        head = "<|start_header_id|>{}<|end_header_id|>\n"
        rounds, text = [], SPECIAL[0]
        for i in range(0, len(record["conversations"]), 2):
            q, a = (t["value"] for t in record["conversations"][i : i + 2])
            q = q.replace("<image>", "<image_start><image><image_end>")
            question = head.format("user") + q + SPECIAL[4] + head.format("assistant")
            rounds.append((question + a + SPECIAL[4], question))
            text += question + a + SPECIAL[4]
        ids = torch.tensor(self.ids(text))
        labels, at = ids.clone(), 2
        labels[:2] = -100
        for whole, question in rounds:
            n, m = len(self.ids(whole)) - 1, len(self.ids(question)) - 1
            labels[at : at + m] = -100
            at += n
        return ids, labels, pixels


def collate(items):
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([i for i, _, _ in items], batch_first=True, padding_value=1)
    labels = pad([i for _, i, _ in items], batch_first=True, padding_value=-100)
    return ids, labels, ids.ne(1), torch.stack([p for _, _, p in items])


class Peer:
    """Draws `count` samples a call from an endless DataLoader."""

    def __init__(self, folder, tokenizer, count: int, size: int, workers: int):
        import torch

        data = PeerData(folder, tokenizer, 10**6, size)
        self.count = count
        self.loader = iter(
            torch.utils.data.DataLoader(
                data, 6, shuffle=True, num_workers=workers, collate_fn=collate
            )
        )

    def __call__(self):
        seen = 0
        while seen < self.count:
            seen += len(next(self.loader)[0])


@dataclasses.dataclass
class Share(common.Case):
    """A case whose number is better when larger, although it isn't a rate."""

    @property
    def ratio(self):
        return None if self.peer is None else self.ours / self.peer


def decode_limit(folder: pathlib.Path, size: int) -> float:
    """Images a second that one core decodes and resizes, doing nothing else."""
    process = images.Preprocess(size)
    paths = sorted(folder.glob("*.jpg"))[:60]
    start = time.perf_counter()
    for path in paths:
        process(images.decode(path.read_bytes(), path.name))
    return len(paths) / (time.perf_counter() - start)


def lengths(n: int, seed: int = 0, limit: int = 4096):
    """(positions, images) of n samples of the mixture in the docstring."""
    rng = np.random.default_rng(seed)
    text = np.maximum(np.exp(np.log(150) + 0.8 * rng.standard_normal(n)).astype(int), 8)
    kind = rng.random(n)
    count = np.select(
        [kind < 0.3, kind < 0.8, kind < 0.9], [0, 1, rng.integers(2, 4, n)], rng.integers(4, 11, n)
    )
    return np.minimum(text + 66 * count, limit), count


def useful_positions(n: int) -> common.Case:
    size, count = lengths(n)
    packer = FirstFit(Size(4096, RowConfig.images), RowConfig.open_rows)
    rows = []
    for positions, held in zip(size.tolist(), count.tolist(), strict=True):
        rows += packer.add(positions, Size(positions, held))
    packed = sum(map(sum, rows)) / (4096 * len(rows))
    batches = size[: n // 6 * 6].reshape(-1, 6)
    padded = batches.sum() / (batches.max(1) * 6).sum()
    return Share("useful_positions", "share", packed, float(padded), packed)


def main():
    args = common.parser(__doc__.splitlines()[0]).parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    count, size = (24, 48) if args.smoke else (500, 384)
    rounds = 1 if args.smoke else args.rounds
    peers = not args.no_peer and common.has("torch", "transformers")
    cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokenizer = make_data(folder, count)
        spec = InputSpec(Single(64, images.Preprocess(size)), TOWER_WIDTH, "random")
        marks = tokenizer.convert_tokens_to_ids(["<image_start>", "<image_end>"])
        chat = Chat(tokenizer, markers=Markers((marks[0],), (marks[1],)))
        base = DataConfig(
            sources=(SourceConfig(str(folder / "data.jsonl")),),
            row=RowConfig(images=32, length=4096 if not args.smoke else 1024),
        )
        refs = list(all_refs(base, open_sources(base)))
        root, views = str(folder / "cache"), spec.views
        caches.build(root, caches.image_spec(views), refs, views, progress=False)
        rng = np.random.default_rng(0)
        random = lambda x: rng.random((len(x), 64, TOWER_WIDTH), np.float32)  # noqa: E731
        feature_spec = caches.feature_spec(views, spec)
        caches.build(root, feature_spec, refs, views, random, progress=False)

        def read(cache=None, **reading):
            return dataclasses.replace(
                base,
                cache=CacheConfig(**{cache: root}) if cache else CacheConfig(),
                reading=ReadingConfig(**{"threads": 0, **reading}),
            )

        limit = decode_limit(folder, size)
        ours = {
            "jpeg_0_workers": (read(), 0),
            "jpeg_2_threads": (read(threads=2), 2),
            "jpeg_2_workers": (read(workers=2, ahead=8), 2),
            "cached_images_0_workers": (read("images"), 0),
            "cached_images_2_threads": (read("images", threads=2), 2),
            "cached_features_0_workers": (read("features"), 0),
            "cached_features_2_threads": (read("features", threads=2), 2),
        }
        if not args.smoke:
            ours["cached_features_2_workers"] = (read("features", workers=2), 2)
        runs = {key: Ours(config, spec, chat, count) for key, (config, _) in ours.items()}
        if peers:
            for workers in (0, 2):
                runs[f"peer{workers}"] = Peer(folder, tokenizer, count, size, workers)
        first = {key: common.seconds(run) for key, run in runs.items()}  # with the start of workers
        medians = common.interleaved(runs, rounds, warmup=0)
        for key, (_, cores) in ours.items():
            peer = count / medians[f"peer{cores}"] if peers else None
            rate = count / medians[key]
            share = rate / (limit * max(cores, 1)) if key.startswith("jpeg") else None
            cases.append(common.emit(common.Case(f"input_{key}", "samples/s", rate, peer, share)))
        for run in runs.values():
            if isinstance(run, Ours):
                run.pipeline.close()
    cases.append(common.emit(useful_positions(2000 if args.smoke else 120_000)))
    common.report(cases)
    starts = ", ".join(f"{key} {value:.1f}" for key, value in first.items())
    print(f"\nfirst {count} samples, with the start of the workers, in seconds: {starts}")
    print(f"decoding and resizing alone, one core: {limit:.0f} images/s")


if __name__ == "__main__":
    main()
