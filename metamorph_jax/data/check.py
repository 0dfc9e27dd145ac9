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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from metamorph_jax import recipe as recipes
from metamorph_jax.config import build, load_config
from metamorph_jax.data import images
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import (
    DataConfig,
    ImageConfig,
    InputConfig,
    InputSpec,
    RowConfig,
    SourceConfig,
)
from metamorph_jax.data.pipeline import make_stream, open_sources
from metamorph_jax.data.sources.kinds import Kind
from metamorph_jax.data.views import Single
from metamorph_jax.errors import BadSample, ConfigError

EXAMPLES = 5


class _Characters:
    """Stands in for a tokenizer where none is given: one id per character."""

    unk_token_id = None

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]

    def convert_tokens_to_ids(self, token):
        return 0x110000 + sum(map(ord, token))

    def __len__(self):
        return 0x200000


class _Tally:
    """Counts of samples and problems by source, with the first few details of each problem."""

    def __init__(self, names: list[str], examples: int):
        self.names, self.examples = names, examples
        self.samples: collections.Counter[str] = collections.Counter()
        self.bad: collections.Counter[str] = collections.Counter()
        self.counts: collections.Counter = collections.Counter()
        self.details: dict = collections.defaultdict(list)

    def add(self, source: int, reason: str, detail: str, misnamed: list[str]) -> None:
        name = self.names[source]
        self.samples[name] += 1
        for path in misnamed:
            self._note(path, name, "misnamed", True)
        if reason:
            self.bad[name] += 1
            self._note(detail, name, reason, False)

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
        threads: decoding threads.
        examples: how many details are kept of each problem.
        progress: whether to report the progress on stderr.

    Returns:
        {"sources": [{source, samples, good}], "problems": [{source, reason, used, count,
        examples}]}; `used` marks problems that training lives with.
    """
    stream = _stream(config, sources, tokenizer, positions_per_image)
    total = len(stream)
    tally = _Tally([s.name for s in stream.sources], examples)
    start = last = time.monotonic()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for block in range(0, total, 256):
            done = min(block + 256, total)
            for found in pool.map(lambda n: _one(stream, n), range(block, done)):
                tally.add(*found)
            if progress and time.monotonic() - last > 5:
                last = time.monotonic()
                left = (last - start) / done * (total - done)
                print(f"checked {done}/{total}, {left:.0f} s left", file=sys.stderr)
    return tally.report()


def _stream(config: InputConfig, sources, tokenizer, positions_per_image: int):
    row = config.row if isinstance(config, DataConfig) else RowConfig("chatml")
    if tokenizer is None:
        row = dataclasses.replace(row, length=2**31 - 1, images=config.images.max_images)
    config = DataConfig(
        sources=tuple(dataclasses.replace(s, weight=0.0) for s in config.sources),
        order=dataclasses.replace(config.order, epochs=1, shuffle=False),
        images=config.images,
        row=row,
    )
    chat = Chat.of(tokenizer or _Characters(), row)
    return make_stream(config, InputSpec(Single(positions_per_image)), chat, sources)


def _one(stream, n: int) -> tuple[int, str, str, list[str]]:
    """(source, reason or "", detail, paths of misnamed images) of sample n."""
    item = stream[n]
    source, reason, detail = item["source"], item.get("bad", ""), item.get("detail", "")
    misnamed: list[str] = []
    try:
        refs = stream.sample(n).images
        misnamed = [r.path for r in refs if r.frame is None and _is_misnamed(r.path)]
        cut = refs[len(item["cache"]) :] if not reason else ()
        images.load(cut, stream.config.images.max_pixels)  # nobody has decoded these yet
    except BadSample as e:
        reason, detail = reason or e.reason, detail or e.detail
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        reason, detail = reason or f"error_{type(e).__name__}", detail or str(e)
    return source, reason, detail, misnamed if not reason else []


def _is_misnamed(path: str) -> bool:
    try:
        with open(path, "rb") as f:
            return images.misnamed(path, f.read(16))
    except OSError:
        return False


def table(report: dict) -> str:
    """The report for people."""
    lines = [f"{'source':<24}{'samples':>10}{'good':>10}{'bad':>8}"]
    for s in report["sources"]:
        lines.append(
            f"{s['source']:<24}{s['samples']:>10}{s['good']:>10}{s['samples'] - s['good']:>8}"
        )
    if not report["problems"]:
        return "\n".join([*lines, "", "nothing wrong found"])
    lines += ["", f"{'source':<24}{'problem':<24}{'count':>8}  examples"]
    for p in report["problems"]:
        name = p["reason"] + (" (used)" if p["used"] else "")
        for k, example in enumerate(p["examples"] or [""]):
            head = f"{p['source']:<24}{name:<24}{p['count']:>8}  " if k == 0 else " " * 58
            lines.append(head + example)
        if p["count"] > len(p["examples"]):
            lines.append(" " * 58 + f"… and {p['count'] - len(p['examples'])} more")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `metamorph data check`."""
    parser.add_argument("action", choices=["check"], help="read everything, list what is wrong")
    parser.add_argument("paths", nargs="*", help=".json, .jsonl, .arrayrecord or tfds:NAME/SPLIT")
    parser.add_argument("--config", default="", help="check the sources of a training config")
    parser.add_argument("--root", default="", help="folder of the images; default: the file's")
    parser.add_argument("--kind", default="auto", help="kind of all records, or auto")
    parser.add_argument("--template", default="chatml", help="chat template")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json or its folder")
    parser.add_argument("--length", type=int, default=4096, help="positions of a row")
    parser.add_argument(
        "--positions-per-image", type=int, default=66, help="visual tokens and markers of an image"
    )
    parser.add_argument("--images-per-row", type=int, default=70, help="most images of a sample")
    parser.add_argument("--max-pixels", type=int, default=images.MAX_PIXELS, help="of an image")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="details per problem")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 if every sample is usable, else 1."""
    if bool(args.paths) == bool(args.config):
        raise ConfigError("data check needs either files or --config")
    config, kinds = _config(args)
    try:
        tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
        sources = open_sources(config, kinds)
    except (FileNotFoundError, ValueError) as e:
        raise ConfigError(str(e)) from e
    report = check(
        config, sources, tokenizer, args.positions_per_image, args.threads, args.examples,
        progress=not args.json,
    )  # fmt: skip
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0 if all(s["good"] == s["samples"] for s in report["sources"]) else 1


def _config(args: argparse.Namespace) -> tuple[InputConfig, Mapping[str, Kind]]:
    """(what to check, kinds of records that the config's recipe brings)."""
    if args.config:
        values = load_config(args.config, args.overrides).to_dict()
        recipe = recipes.find(values["recipe"])
        return build(recipe.Data, values["data"], "config.data"), recipe.KINDS
    config = DataConfig(
        sources=tuple(SourceConfig(p, root=args.root, kind=args.kind) for p in args.paths),
        row=RowConfig(args.template, length=args.length, images=args.images_per_row),
        images=ImageConfig(max_pixels=args.max_pixels),
    )
    return config, {}


def load_tokenizer(path: str):
    """A tokenizer from a tokenizer.json, or from a folder that holds one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if os.path.isdir(path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no tokenizer at {path!r}: expected a tokenizer.json or a folder")
    return PreTrainedTokenizerFast(tokenizer_file=path)
