"""`metamorph data check`: reads a whole data set and lists what is wrong with it.

It reads samples as a training run does, so what it calls bad is what training skips and counts. In
addition it decodes every image, also those that truncation would leave out.
"""

import argparse
import collections
import dataclasses
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from metamorph_jax import recipe as recipes
from metamorph_jax.config import build
from metamorph_jax.data import images, option, tokenizers
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import (
    CacheConfig,
    DataConfig,
    ImageConfig,
    InputConfig,
    InputSpec,
    RowConfig,
    SourceConfig,
)
from metamorph_jax.data.pipeline import make_stream, open_sources
from metamorph_jax.data.show import lines
from metamorph_jax.data.sources import documents
from metamorph_jax.data.stream import SampleStream
from metamorph_jax.data.views import Single
from metamorph_jax.errors import BadSample, ConfigError, UserError
from metamorph_jax.files import shown
from metamorph_jax.recipe import Shard

EXAMPLES = 5
LENGTH = 4096  # positions of a row
# Arguments that a config answers itself.
_OF_FILES = (
    "root", "kind", "template", "tokenizer", "length", "images_per_row", "max_pixels",
)  # fmt: skip


class _Characters:
    """Stands in for a tokenizer where none is given: one id per character."""

    unk_token_id = None

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def convert_tokens_to_ids(self, token):
        return 0x110000 + sum(map(ord, token))

    def __len__(self):
        return 0x200000


@dataclasses.dataclass
class _Found:
    """What is known of one sample: `notes` are reasons why it is not used as it is."""

    number: int
    source: int
    kind: str = ""
    reason: str = ""
    detail: str = ""
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class _Tally:
    """Counts of samples and problems by source, with the first few details of each problem."""

    def __init__(self, names: list[str], examples: int, show: int):
        self.names, self.examples, self.show = names, examples, show
        self.samples: collections.Counter[str] = collections.Counter()
        self.bad: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[tuple[str, str]] = collections.Counter()
        self.counts: collections.Counter = collections.Counter()
        self.details: dict = collections.defaultdict(list)
        self.shown: list[int] = []

    def add(self, found: _Found) -> None:
        name = self.names[found.source]
        self.samples[name] += 1
        for note, text in found.notes:
            self._note(text, name, note, True)
        if found.reason:
            self.bad[name] += 1
            self._note(found.detail, name, found.reason, False)
            return
        if self.kinds[name, found.kind] < self.show:
            self.shown.append(found.number)
        self.kinds[name, found.kind] += 1

    def _note(self, text: str, *problem) -> None:
        self.counts[problem] += 1
        if len(self.details[problem]) < self.examples:
            self.details[problem].append(text)

    def report(self) -> dict:
        ordered = sorted(self.counts.items(), key=lambda x: (x[0][0], -x[1], x[0][1]))
        return {
            "sources": [
                {"source": n, "samples": self.samples[n], "good": self.samples[n] - self.bad[n]}
                for n in self.names
            ],
            "kinds": [
                {"source": name, "kind": kind, "count": count}
                for (name, kind), count in sorted(self.kinds.items())
            ],
            "problems": [
                {
                    "source": problem[0],
                    "reason": problem[1],
                    "used": problem[2],
                    "count": count,
                    "examples": self.details[problem],
                }
                for problem, count in ordered
            ],
        }


def check(
    config: InputConfig,
    sources,
    tokenizer=None,
    positions_per_image: int = 66,
    threads: int = 2,
    examples: int = EXAMPLES,
    progress: bool = False,
) -> dict:
    """What is wrong with every sample of a config's sources.

    Args:
        config: as for training; order, caches and number of epochs don't matter.
        sources: of the config, see `pipeline.open_sources`.
        tokenizer: as for training. Without one, lengths in tokens are unknown, so nothing is cut;
            all other problems are found.
        positions_per_image: that its visual tokens and markers take.
        threads, examples, progress: see `check_stream`.

    Returns:
        See `check_stream`.
    """
    stream = _stream(config, sources, tokenizer, positions_per_image)
    return check_stream(stream, threads, examples, progress)


def check_stream(
    stream: SampleStream,
    threads: int = 2,
    examples: int = EXAMPLES,
    progress: bool = False,
    show: int = 0,
) -> dict:
    """What is wrong with every sample of a stream of one epoch.

    Args:
        stream: without a cache.
        threads: decoding threads.
        examples: how many details are kept of each problem.
        progress: whether to report the progress on stderr.
        show: how many samples of each kind are shown as the model reads them.

    Returns:
        {"sources": [{source, samples, good}], "kinds": [{source, kind, count}], "problems":
        [{source, reason, used, count, examples}]}; `used` marks problems that training lives with.
        With `show`, "shown": the lines of each sample.
    """
    total = len(stream)
    tally = _Tally([s.name for s in stream.sources], examples, show)
    start = last = time.monotonic()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for block in range(0, total, 256):
            done = min(block + 256, total)
            for found in pool.map(lambda n: _one(stream, n), range(block, done)):
                tally.add(found)
            if progress and time.monotonic() - last > 5:
                last = time.monotonic()
                left = (last - start) / done * (total - done)
                print(f"checked {done}/{total}, {left:.0f} s left", file=sys.stderr)
    shown_ = [list(lines(stream, n)) for n in tally.shown]
    return tally.report() | ({"shown": shown_} if show else {})


def _stream(config: InputConfig, sources, tokenizer, positions_per_image: int) -> SampleStream:
    none = RowConfig("chatml", images=config.images.max_images)
    row = config.row if isinstance(config, DataConfig) else none
    if tokenizer is None:
        row = dataclasses.replace(row, length=2**31 - 1, sample_length=0, official_masks=False)
    config = DataConfig(
        sources=config.sources, order=config.order, images=config.images, row=row
    )  # fmt: skip
    chat = Chat.of(tokenizer or _Characters(), row)
    return make_stream(_once(config), InputSpec(Single(positions_per_image)), chat, sources)


def _once(config: DataConfig) -> DataConfig:
    """The config with every record once, in the order of the files, and without caches."""
    return dataclasses.replace(
        config,
        sources=tuple(dataclasses.replace(s, weight=0.0) for s in config.sources),
        order=dataclasses.replace(
            config.order, epochs=1, shuffle=False, grouping="none", shares="weights"
        ),  # fmt: skip
        reading=dataclasses.replace(config.reading, workers=0),
        cache=CacheConfig(),
    )


def _one(stream: SampleStream, n: int) -> _Found:
    item, sample, broken = stream.read(n)
    found = _Found(n, item["source"], reason=item.get("bad", ""), detail=item.get("detail", ""))
    if sample is None:
        return found
    found.kind = sample.kind
    notes = collections.Counter({note: item.get(note, 0) for note in ("cut", "transparent")})
    try:
        left_out = sample.images[len(item["cache"]) :] if not found.reason else ()
        stream.config.images.load(left_out, notes)  # nobody has decoded these yet
    except BadSample as e:
        found.reason, found.detail = e.reason, f"{sample.where}: {e.detail}"
    if not found.reason:
        found.notes = [(note, sample.where) for note in ("cut", "transparent") if notes[note]]
        found.notes += [("broken_images", f"{sample.where}: {one}") for one in broken]
        found.notes += [
            ("misnamed", f"{sample.where}: {ref.name}")
            for ref in sample.images
            if ref.frame is None and images.misnamed(ref.name, images.read_ref(ref)[:16])
        ]
    return found


def table(report: dict) -> str:
    """The report for people; what comes from files is escaped."""
    lines = [f"{'source':<24}{'samples':>10}{'good':>10}{'bad':>8}  kinds"]
    for s in report["sources"]:
        kinds = [f"{k['kind']} {k['count']}" for k in report["kinds"] if k["source"] == s["source"]]
        bad = s["samples"] - s["good"]
        lines.append(
            f"{shown(s['source'], 23):<24}{s['samples']:>10}{s['good']:>10}{bad:>8}  "
            + ", ".join(kinds)
        )
    for sample in report.get("shown", ()):
        lines += ["", *sample]
    if not report["problems"]:
        return "\n".join([*lines, "", "nothing wrong found"])
    lines += ["", f"{'source':<24}{'problem':<24}{'count':>8}  examples"]
    for p in report["problems"]:
        name = p["reason"] + (" (used)" if p["used"] else "")
        for k, example in enumerate(p["examples"] or [""]):
            head = f"{shown(p['source'], 23):<24}{name:<24}{p['count']:>8}  "
            lines.append((head if k == 0 else " " * 58) + shown(example, 600))
        if p["count"] > len(p["examples"]):
            lines.append(" " * 58 + f"… and {p['count'] - len(p['examples'])} more")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `metamorph data check`."""
    parser.add_argument("action", choices=["check"], help="read everything, list what is wrong")
    parser.add_argument(
        "paths", nargs="*", help=".json, .jsonl, .tar, .arrayrecord or tfds:NAME/SPLIT"
    )
    parser.add_argument("--config", default="", help="check the sources of a training config")
    option.add_arguments(parser)
    parser.add_argument("--root", default="", help="folder of the images; default: the file's")
    parser.add_argument("--kind", default="auto", help="kind of all records, or auto")
    parser.add_argument("--template", default="chatml", help="chat template")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json or its folder")
    parser.add_argument(
        "--length", type=int, default=LENGTH, help="positions of a row; goes with --tokenizer"
    )
    parser.add_argument(
        "--positions-per-image", type=int, default=66, help="visual tokens and markers of an image"
    )
    parser.add_argument("--images-per-row", type=int, default=70, help="most images of a sample")
    parser.add_argument("--max-pixels", type=int, default=images.MAX_PIXELS, help="of an image")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="details per problem")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N",
        help="show N samples of each kind as the model reads them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 if every sample is usable, else 1."""
    if args.data and not args.config:  # the same as files and --root
        args.paths, args.root = option.files(args), args.data_root or args.root
    if bool(args.paths) == bool(args.config):
        raise ConfigError("data check needs either files (or --data) or --config")
    try:
        stream = _stream_of_config(args) if args.config else _stream_of_files(args)
    except UserError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from e
    report = check_stream(stream, args.threads, args.examples, not args.json, args.show)
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0 if all(s["good"] == s["samples"] for s in report["sources"]) else 1


def _stream_of_config(args: argparse.Namespace) -> SampleStream:
    """The samples of a config as a run of it reads them: its tokenizer, lengths and limits."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name in _OF_FILES:
        if getattr(args, name) != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} goes with files; change the config's own option instead")
    values = option.load(args).to_dict()
    recipe = recipes.find(values["recipe"])
    data = build(recipe.Data, values["data"], "config.data")
    if not (isinstance(data, DataConfig) and "model" in values):  # there are no rows
        return _stream(data, open_sources(data, recipe.KINDS), None, args.positions_per_image)
    model = build(recipe.Config, values["model"], "config.model")
    return recipe.open_data(_once(data), model, Shard(1)).samples


def _stream_of_files(args: argparse.Namespace) -> SampleStream:
    if args.length != LENGTH and not args.tokenizer:
        raise ConfigError("--length counts tokens, so it goes with --tokenizer")
    most = max(args.images_per_row, ImageConfig().max_images)
    config = DataConfig(
        sources=tuple(SourceConfig(p, root=args.root, kind=args.kind) for p in args.paths),
        row=RowConfig(args.template, length=args.length, images=args.images_per_row),
        images=ImageConfig(max_pixels=args.max_pixels, max_images=most),
    )
    tokenizer = tokenizers.read(args.tokenizer) if args.tokenizer else None
    asked = documents.KINDS if args.kind in documents.KINDS else None
    sources = open_sources(config, asked)
    return _stream(config, sources, tokenizer, args.positions_per_image)
