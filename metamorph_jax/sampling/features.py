"""`metamorph features`: what a model makes of the images of a folder, in files for one's own use.

    metamorph features --images photos --out photos_features --workdir RUN --layer connector
    metamorph features --images photos --out photos_features --config configs/x.py:8b

`--layer tower` gives the visual tokens, float[P, C], as the connector reads them; `--layer
connector` gives what the language model reads, float[P, D]. With --config alone, only the tower
that it names is loaded. In `--out` there will be:

    features-00000.safetensors, …    or .arrayrecord; none larger than --max-shard-size
    images.jsonl                     a line for each image: where its features are, or why not
    meta.json                        what made them: model, layer, shape, dtype, preprocessing

The same command started again continues after the last whole file. docs/data.md shows how to read
them.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from metamorph_jax import files
from metamorph_jax.errors import BadSample, ConfigError, FileError, UserError
from metamorph_jax.files import shown
from metamorph_jax.lock import Lock
from metamorph_jax.sampling import WEIGHTS

LAYERS = ("tower", "connector")
FORMATS = ("safetensors", "arrayrecord")
MOST = 4096  # views at a time, threads
NAMED = 20  # images that are named on the terminal when they can't be used


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes what a model makes of the images of a folder."
    parser.add_argument("--images", required=True, metavar="DIR", help="with the images")
    parser.add_argument("--out", required=True, metavar="DIR", help="where features go")
    group = parser.add_argument_group("model")
    group.add_argument("--workdir", help="of a finished training stage")
    group.add_argument("--checkpoint", metavar="SPEC", help="published weights")
    group.add_argument(
        "--config",
        metavar="FILE[:SIZE]",
        help="what --checkpoint is (default: what its config.json says); alone, its "
        "config.model.vision is used",
    )
    group.add_argument("--recipe", metavar="MODULE", help="your own recipe of --workdir")
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="how the language model's are kept meanwhile",
    )
    group.add_argument("--mesh", metavar="AXIS=SIZE,…", help="see metamorph generate")
    group = parser.add_argument_group("features")
    group.add_argument(
        "--layer",
        choices=LAYERS,
        default="tower",
        help="visual tokens, or what the language model reads (default: tower)",
    )
    group.add_argument("--format", choices=FORMATS, default="safetensors")
    group.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    group.add_argument("--max-shard-size", default="500MB", metavar="SIZE", help="of a file")
    group.add_argument("--batch-size", type=int, default=32, help="views at a time")
    group.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="that decode")


@dataclasses.dataclass(frozen=True)
class Reader:
    """How features are made.

    Attributes:
        load: path -> uint8[views, h, w, 3]; BadSample if it can't be used.
        compute: uint8[n, h, w, 3] -> float32[n, P, width], for n views.
        made_by: what features depend on, JSON-able.
    """

    load: Callable[[str], np.ndarray]
    compute: Callable[[np.ndarray], np.ndarray]
    made_by: dict


def run(args) -> int:
    """Writes the features; 0 if all images could be read, else 1."""
    from metamorph_jax.convert.command import parse_size
    from metamorph_jax.data import images

    _check(args)
    most = parse_size(args.max_shard_size)
    names = [name for name in images.names_in(args.images) if _is_text(name)]
    with Lock(args.out, "writes", "--out"):
        return write_all(args, names, most)


def write_all(args, names: list[str], most: int) -> int:
    """Writes what the folder lacks; 0 if all images could be read, else 1."""
    folder = Folder(args.out, args.format, args.dtype, most)
    reader = open_reader(args)
    folder.open(reader.made_by)
    todo = [name for name in names if folder.lacks(name, os.path.join(args.images, name))]
    if len(todo) < len(names):
        print(f"{len(names) - len(todo)} of {len(names)} images were done before", file=sys.stderr)
    try:
        write(folder, reader, args.images, todo, args.batch_size, args.threads)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"--out {shown(args.out)} can't be written: {why}") from error
    bad = {name: folder.index[name]["bad"] for name in names if "bad" in folder.index[name]}
    print(f"{len(names) - len(bad)} of {len(names)} images in {folder.count} files: "
          f"{shown(args.out)}")  # fmt: skip
    for name, reason in itertools.islice(bad.items(), NAMED):
        print(f"  {shown(name)}: {reason}")
    if len(bad) > NAMED:
        print(f"  and {len(bad) - NAMED} more, which images.jsonl names")
    return 1 if bad else 0


def _is_text(name: str) -> bool:
    """Whether a file's name is UTF-8, as the index is; says so if it isn't."""
    try:
        name.encode()
    except UnicodeEncodeError:
        print(f"{shown(name)}: its name is not UTF-8; skipped", file=sys.stderr)
        return False
    return True


def _check(args) -> None:
    if bool(args.workdir) == bool(args.config or args.checkpoint):
        raise UserError("give either --workdir, or --checkpoint, or --config, or the latter two")
    if args.layer == "connector" and not (args.workdir or args.checkpoint):
        raise UserError("--layer connector needs a trained one: --workdir or --checkpoint")
    if args.workdir and args.overrides:
        raise UserError("a --workdir has its own config")
    if not (1 <= args.batch_size <= MOST and 1 <= args.threads <= MOST):
        raise UserError(f"--batch-size and --threads must be at least 1, at most {MOST}")


# ---- the model


def open_reader(args) -> Reader:
    """The model that the command line names.

    Raises:
        UserError: there is no such model, or it can't read images.
    """
    if args.workdir or args.checkpoint:
        return _of_model(args)
    return _of_tower(args)


def _of_model(args) -> Reader:
    import jax

    from metamorph_jax import recipe
    from metamorph_jax.sampling.generate import parse_mesh
    from metamorph_jax.sampling.trained import load_generator

    if args.recipe:
        recipe.find(args.recipe)
    if jax.process_count() > 1:
        raise UserError("features runs on one host: start it on a single one")
    generator = load_generator(
        args.workdir, weights_of=args.checkpoint, config=args.config, overrides=args.overrides,
        weights=args.weights, mesh=parse_mesh(args.mesh),
    )  # fmt: skip
    connector = args.layer == "connector"

    def compute(pixels: np.ndarray) -> np.ndarray:
        try:
            features = generator.reader.see(pixels)
        except ValueError as error:
            raise UserError(error) from error
        return generator.reader.project(features) if connector else features

    names = ("workdir", "checkpoint", "config", "overrides", "layer")
    made_by = {name: getattr(args, name) for name in names}
    prompts = generator.prompts
    return _reader(prompts.images, prompts.views, compute, made_by)


def _of_tower(args) -> Reader:
    from metamorph_jax import config as configs
    from metamorph_jax.convert import specs, vision
    from metamorph_jax.data.config import ImageConfig
    from metamorph_jax.models.vision.encoder import VisionConfig

    values = configs.load_config(args.config, args.overrides).to_dict()
    table = values.get("model", {}).get("vision")
    if not isinstance(table, dict):
        raise ConfigError(f"{args.config} has no config.model.vision: name a --workdir")
    cfg = configs.build(VisionConfig, table, "config.model.vision")
    if cfg.vit is None:
        raise ConfigError(f"{args.config} has no tower (config.model.vision.tower)")
    if cfg.weights == specs.RANDOM:
        print("config.model.vision.weights is random: so are these features", file=sys.stderr)
    data = values.get("data", {}).get("images", {})
    image_config = configs.build(ImageConfig, data, "config.data.images")
    spec = vision.input_spec(cfg)
    vision.report_changes(image_config, cfg)
    views = image_config.change(spec.views)
    made_by = {"tower": spec.tower, "layer": args.layer}
    return _reader(image_config, views, vision.feature_function(cfg), made_by)


def _reader(image_config, views, compute, made_by: dict) -> Reader:
    from metamorph_jax.data.sources.base import ImageRef

    def load(path: str) -> np.ndarray:
        (image,) = image_config.load([ImageRef(path)])
        return views.pixels(image)

    process = views.preprocess
    about = {"pixels": views.fingerprint(), "mean": list(process.mean), "std": list(process.std),
             "background": image_config.background}  # fmt: skip
    return Reader(load, compute, made_by | about)


# ---- from images to features


def write(
    folder: "Folder", reader: Reader, root: str, names: Sequence[str], batch: int, threads: int
) -> None:
    """Writes the features of images into the folder, in the order of their names.

    Args:
        folder: opened.
        reader: makes the features.
        root: folder of the images.
        names: of images, below it.
        batch: views of each call of the model; the last ones are filled up.
        threads: that read and decode.
    """
    from tqdm import tqdm

    from metamorph_jax.data.cache import stamp

    def load(name: str):
        path = os.path.join(root, name)
        try:
            return name, stamp(path), reader.load(path)
        except BadSample as error:
            return name, _stamp(path), error

    progress = tqdm(total=len(names), unit="image", desc="features", disable=None)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(names), batch):
            loaded = list(pool.map(load, names[start : start + batch]))
            good = [one for one in loaded if not isinstance(one[2], BadSample)]
            features = _computed(reader, [pixels for *_, pixels in good], batch)
            for name, seen, result in loaded:
                if isinstance(result, BadSample):
                    folder.note_bad(name, seen, result)
                else:
                    folder.add(name, seen, next(features))
            progress.update(len(loaded))
    folder.finish()
    progress.close()


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _computed(reader: Reader, pixels: list[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    """float32[views, P, width] of each image; the model always gets `batch` views."""
    if not pixels:
        return
    views, found = np.concatenate(pixels), []
    for start in range(0, len(views), batch):
        part = views[start : start + batch]
        filled = np.concatenate([part, part[-1:].repeat(batch - len(part), 0)])
        found.append(np.asarray(reader.compute(filled))[: len(part)])
    ends = np.cumsum([len(one) for one in pixels])
    yield from np.split(np.concatenate(found), ends[:-1])


# ---- files


class Folder:
    """Files of features with their index. A file is written whole or not at all.

    Attributes:
        index: name of an image -> its line in images.jsonl.
        count: files that are there.
    """

    def __init__(self, path: str, format: str, dtype: str, most: int):
        self.path, self.format, self.dtype, self.most = pathlib.Path(path), format, dtype, most
        self.index: dict[str, dict] = {}
        self.count = 0
        self._meta: dict = {}
        self._waiting: list[tuple[dict, np.ndarray]] = []
        self._bytes = 0

    def open(self, made_by: dict) -> None:
        """Makes the folder, or reads what is in it.

        Raises:
            UserError: it holds features that were made in another way, or can't be written.
        """
        self._meta = json.loads(json.dumps(made_by | {"dtype": self.dtype, "format": self.format}))
        meta = self.path / "meta.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if meta.exists():
                self._compare(files.read_json(meta))
            else:
                files.write_whole(meta, (json.dumps(self._meta, indent=1) + "\n").encode())
            self._read_index()
        except OSError as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--out {shown(self.path)} can't be used: {why}") from error

    def _compare(self, before: dict) -> None:
        changed = sorted(k for k in self._meta if before.get(k) != self._meta[k])
        if changed:
            raise UserError(
                f"{shown(self.path)} holds features that were made in another way "
                f"({', '.join(changed)}): choose another --out or remove it"
            )

    def _read_index(self) -> None:
        index, whole = self.path / "images.jsonl", 0
        if index.exists():
            for _, start, line in files.raw_lines(index):
                entry = _whole(line)
                if entry is None:  # what comes after a damaged line is written again
                    break
                self.index[entry["image"]] = entry
                whole = start + len(line)
            os.truncate(index, whole)
        numbers = [int(_FILE.fullmatch(entry["file"])[1])
                   for entry in self.index.values() if "file" in entry]  # fmt: skip
        self.count = max(numbers, default=-1) + 1

    def lacks(self, name: str, path: str) -> bool:
        """Whether the features of an image are still to be written: not there, or it changed."""
        entry = self.index.get(name)
        if entry is None or (entry["size"], entry["time"]) != _stamp(path):
            return True
        return "file" in entry and not (self.path / entry["file"]).is_file()

    def note_bad(self, name: str, seen: tuple[int, int], error: BadSample) -> None:
        self._write_index([_entry(name, seen) | {"bad": error.reason}])

    def add(self, name: str, seen: tuple[int, int], features: np.ndarray) -> None:
        """features: float[views, P, width]."""
        with np.errstate(over="ignore"):
            features = np.ascontiguousarray(features, self.dtype)
        if not np.isfinite(features).all():
            return self.note_bad(name, seen, BadSample("not_finite", name))
        if self._waiting and self._bytes + features.nbytes > self.most:
            self.finish()
        self._waiting.append((_entry(name, seen), features))
        self._bytes += features.nbytes

    def finish(self) -> None:
        """Writes what waits into a file of its own, and then the lines of its images."""
        if not self._waiting:
            return
        name = f"features-{self.count:05d}.{self.format}"
        arrays = {entry["image"]: features for entry, features in self._waiting}
        about = {"made_by": json.dumps(self._meta)}
        writer = _write_safetensors if self.format == "safetensors" else _write_arrayrecord
        writer(self.path / name, arrays, about)
        self._write_index([
            entry | {"file": name, "record": k, "shape": list(features.shape)}
            for k, (entry, features) in enumerate(self._waiting)
        ])  # fmt: skip
        self.count, self._waiting, self._bytes = self.count + 1, [], 0

    def _write_index(self, entries: list[dict]) -> None:
        with open(self.path / "images.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self.index |= {entry["image"]: entry for entry in entries}


_FILE = re.compile(r"features-(\d{5,9})\.(?:safetensors|arrayrecord)")


def _whole(line: bytes) -> dict | None:
    """A line of the index, or None if it is damaged or was not written to its end."""
    try:
        entry = files.parse(line, "the line", dict)
        known = [entry["image"], entry["size"], entry["time"], entry.get("bad", "")]
        named = _FILE.fullmatch(entry["file"]) if "file" in entry else entry["bad"]
    except (FileError, KeyError, TypeError):
        return None
    right = [isinstance(v, k) for v, k in zip(known, (str, int, int, str), strict=True)]
    return entry if line.endswith(b"\n") and named and all(right) else None


def _entry(name: str, seen: tuple[int, int]) -> dict:
    return {"image": name, "size": seen[0], "time": seen[1]}


def _write_safetensors(path: pathlib.Path, arrays: dict[str, np.ndarray], about: dict) -> None:
    from safetensors.numpy import save

    files.write_whole(path, save(arrays, about))


def _write_arrayrecord(path: pathlib.Path, arrays: dict[str, np.ndarray], about: dict) -> None:
    """Each record is a small safetensors file of its own, with the one tensor "features"."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from safetensors.numpy import save

    partial = path.with_name(f".{path.name}.partial")
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    for name, features in arrays.items():
        writer.write(save({"features": features}, about | {"image": name}))
    writer.close()
    partial.replace(path)
