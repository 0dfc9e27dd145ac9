"""Takes moments of images to draw, made by MiniGPT-5's script, into the cache of a config.

    python -m metamorph_jax.recipes.minigpt5.moments --config=FILE.py[:SIZE] --from=FOLDER \\
        [--config.KEY=VALUE …]

FOLDER has `<name of the image>_output.pt`, in folders `train` and `val` where there are such. The
config names the data, the autoencoder (`model.sd_weights`) and the cache (`data.cache.drawings`).
A few files are compared with what the autoencoder makes of their images; those that were made of
pixels in another range are refused. Whatever has no file is computed when training begins.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Iterator

from metamorph_jax import files
from metamorph_jax.config import build
from metamorph_jax.convert import moments
from metamorph_jax.data import cache, images, option, pipeline
from metamorph_jax.data.config import DataConfig, InputSpec
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.errors import BadSample, ConfigError, MissingFile, UserError
from metamorph_jax.recipes.minigpt5.config import Config
from metamorph_jax.recipes.minigpt5.input import input_spec, moment_function
from metamorph_jax.recipes.minigpt5.sources import KINDS

_OVERRIDE = re.compile(r"--config\.([\w.]+)=(.*)", re.DOTALL)


def take(data: DataConfig, cfg: Config, folder: pathlib.Path) -> int:
    """Puts the moments of every image that has a file into the cache; returns how many it then has.

    Raises:
        ConfigError: the config names no cache, or no autoencoder.
        MissingFile: no image has a file.
        FileError, DataError: files hold something else, or are of another range.
    """
    if not data.cache.drawings:
        raise ConfigError("config.data.cache.drawings must name the folder of the cache")
    spec, compute = input_spec(cfg), moment_function(cfg)
    refs = dict.fromkeys(pipeline.all_refs(data, pipeline.open_sources(data, KINDS), answers=True))
    there = [(ref, file) for ref in refs if (file := _file(ref, folder)) is not None]
    if not there:
        raise MissingFile(
            f"{files.shown(folder)} has a file NAME_output.pt of none of {len(refs):,} images"
        )
    refs = [ref for ref, _ in there]
    rows = moments.checked(_read(there, data, spec), compute)
    wanted = cache.moment_spec(spec.drawings, data.images.background)
    return len(cache.put(data.cache.drawings, wanted, zip(refs, rows, strict=True)))


def _file(ref: ImageRef, folder: pathlib.Path) -> pathlib.Path | None:
    """The file of an image; mirrored ones have none."""
    if ref.mirror or ref.data is not None:
        return None
    path = pathlib.Path(ref.inside.name if ref.inside else ref.path)
    split = next((part for part in reversed(path.parts[:-1]) if part in ("train", "val")), "")
    for place in (folder / split, folder):
        file = place / f"{path.stem}_output.pt"
        if file.is_file():
            return file
    return None


def _read(
    there: list[tuple[ImageRef, pathlib.Path]], data: DataConfig, spec: InputSpec
) -> Iterator[tuple]:
    """See `moments.checked`; pixels only of those that it compares."""
    height, width, channels = spec.drawings.latents.shape
    for number, (ref, file) in enumerate(there):
        found = moments.read(file, (height, width, 2 * channels))
        pixels = None
        if number < moments.CHECKED:
            (image,) = images.load([ref], data.images.max_pixels, None, data.images.background)
            pixels = spec.drawings.preprocess(image)
        yield str(file), pixels, found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m metamorph_jax.recipes.minigpt5.moments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:SIZE]")
    parser.add_argument("--from", dest="folder", type=pathlib.Path, required=True, metavar="FOLDER")
    option.add_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    if wrong := [text for text in rest if not _OVERRIDE.fullmatch(text)]:
        parser.error(f"unknown argument {wrong[0]}")
    args.overrides = dict(_OVERRIDE.fullmatch(text).groups() for text in rest)
    try:
        values = option.load(args).to_dict()
        data = build(DataConfig, values["data"], "config.data")
        count = take(data, build(Config, values["model"], "config.model"), args.folder)
    except (UserError, BadSample) as error:
        print(f"moments: {files.escape(str(error))}", file=sys.stderr)
        return getattr(error, "code", 2)
    print(f"{data.cache.drawings} holds the moments of {count:,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
