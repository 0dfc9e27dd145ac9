"""`metamorph data check`: reads a whole data set and says what is wrong with it, without stopping.

It goes the way a training run goes, so what it calls bad is what training skips and counts. Beyond
that it decodes every picture, also those that truncation would leave out.
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


def check(
    config: DataConfig,
    tokenizer=None,
    tokens: int = 64,
    sources=None,
    threads: int = 2,
    examples: int = EXAMPLES,
    progress: bool = False,
) -> dict:
    """What is wrong with every sample of a config's sources.

    Args:
        config: as for training; `epochs`, order and caches don't matter.
        tokenizer: as for training. Without one, lengths in tokens are unknown, so nothing is cut;
            all other problems are found.
        tokens: visual tokens of an image.
        sources: see `make_pipeline`.
        threads: decoding threads.
        examples: how many details are kept of each problem.
        progress: say on stderr how far it is.

    Returns:
        {"sources": [{source, samples, good}], "problems": [{source, reason, used, count,
        examples}]}; `used` marks problems that training lives with.
    """
    stream = _stream(config, tokenizer, tokens, sources)
    total = len(stream)
    counts: collections.Counter = collections.Counter()
    details: dict = collections.defaultdict(list)
    samples: collections.Counter = collections.Counter()
    bad: collections.Counter = collections.Counter()
    start = last = time.monotonic()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for block in range(0, total, 256):
            work = pool.map(lambda n: _one(stream, n), range(block, min(block + 256, total)))
            for source, reason, detail, misnamed in work:
                name = stream.sources[source].name
                samples[name] += 1
                problems = [(path, "misnamed", True) for path in misnamed]
                if reason:
                    bad[name] += 1
                    problems.append((detail, reason, False))
                for text, why, used in problems:
                    counts[name, why, used] += 1
                    if len(details[name, why]) < examples:
                        details[name, why].append(text)
            if progress and time.monotonic() - last > 5:
                last = time.monotonic()
                done = block + 256
                left = (last - start) / done * max(total - done, 0)
                print(f"checked {done}/{total}, {left:.0f} s left", file=sys.stderr)
    return {
        "sources": [
            {"source": s.name, "samples": samples[s.name], "good": samples[s.name] - bad[s.name]}
            for s in stream.sources
        ],
        "problems": [
            {"source": n, "reason": r, "used": u, "count": c, "examples": details[n, r]}
            for (n, r, u), c in sorted(counts.items(), key=lambda x: (x[0][0], -x[1], x[0][1]))
        ],
    }


def _stream(config: InputConfig, tokenizer, tokens: int = 64, sources=None):
    row = RowConfig()
    if isinstance(config, DataConfig):
        row = config.row
    if tokenizer is None:
        row = dataclasses.replace(row, length=2**31 - 1, images=config.images.max_images)
    config = DataConfig(
        sources=tuple(dataclasses.replace(s, weight=0.0) for s in config.sources),
        order=dataclasses.replace(config.order, epochs=1, shuffle=False),
        reading=config.reading,
        images=config.images,
        row=row,
    )
    spec = InputSpec(Single(tokens))
    chat = Chat(tokenizer or _Characters(), row.template, row.system, row.single_bos)
    return make_stream(config, spec, chat, sources)


def _one(stream, n: int) -> tuple[int, str, str, list[str]]:
    """(source, reason or "", detail, misnamed pictures) of sample n."""
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
    parser.add_argument("action", choices=["check"], help="read everything, say what's wrong")
    parser.add_argument("paths", nargs="*", help=".json, .jsonl, .arrayrecord or tfds:NAME/SPLIT")
    parser.add_argument("--config", default="", help="check the sources of a training config")
    parser.add_argument("--root", default="", help="folder of the pictures; default: the file's")
    parser.add_argument("--kind", default="auto", help="kind of all records, or auto")
    parser.add_argument("--template", default="chatml", help="chat template")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json or its folder")
    parser.add_argument("--length", type=int, default=4096, help="positions of a row")
    parser.add_argument("--tokens-per-image", type=int, default=64)
    parser.add_argument("--images-per-row", type=int, default=70)
    parser.add_argument("--max-pixels", type=int, default=images.MAX_PIXELS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="details per problem")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 if every sample is usable, else 1."""
    if bool(args.paths) == bool(args.config):
        raise ConfigError("data check needs either files or --config")
    if args.config:
        values = load_config(args.config, args.overrides).to_dict()
        config = build(recipes.find(values["recipe"]).Data, values["data"], "config.data")
    else:
        config = DataConfig(
            sources=tuple(SourceConfig(p, root=args.root, kind=args.kind) for p in args.paths),
            row=RowConfig(args.template, length=args.length, images=args.images_per_row),
            images=ImageConfig(max_pixels=args.max_pixels),
        )
    try:
        tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
        sources = open_sources(config)
    except (FileNotFoundError, ValueError) as e:
        raise ConfigError(str(e)) from e
    report = check(
        config, tokenizer, args.tokens_per_image, sources, args.threads, args.examples,
        progress=not args.json,
    )  # fmt: skip
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0 if all(s["good"] == s["samples"] for s in report["sources"]) else 1


def load_tokenizer(path: str):
    """A tokenizer from a tokenizer.json, or from a folder that holds one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if os.path.isdir(path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no tokenizer at {path!r}: expected a tokenizer.json or a folder")
    return PreTrainedTokenizerFast(tokenizer_file=path)
