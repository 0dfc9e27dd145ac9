"""What a set of drawn images scores.

    FID, inception score      Inception      against real images; alone
    mean FID of single groups Inception      of the few images of each story, say
    feature distance (TOWER)  any tower      against real images; never called FID
    CLIP, image-text          CLIP           with the caption that each was drawn from
    CLIP, image-image         CLIP           with the real image that belongs to each

CLIP's are mean cosines of the images that there are, and once more with 0 for each image that was
to be drawn and was not, where that is known. `CLIPScore` is 2.5 max(cos, 0); the published one is
that of ViT-B/32 with the prefix "A photo depicts". A score without the network, its weights, the
size of images and the prefix means nothing, so `settings` goes wherever scores go.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from metamorph_jax.errors import ConfigError, DataError
from metamorph_jax.eval.images import features, statistics
from metamorph_jax.eval.images.features import Features, ImageSet

TEXT, IMAGE, CLIPSCORE = "CLIP, image-text", "CLIP, image-image", "CLIPScore"
INCEPTION, DEVIATION = "inception score", "inception score, deviation"
FAILED = ", failures as 0"  # after the name of a mean that counts images that were not drawn


@dataclasses.dataclass(frozen=True)
class Measures:
    """Which scores, and how.

    Attributes:
        inception: file of the Inception weights, for FID and inception score; "": neither.
        tower: weights of a vision tower, for the feature distance; "": none.
        clip: weights of CLIP with both towers; "": none.
        fid_size: short side to which both sets are brought before Inception sees them, centre cut
            out; None: as they are. See `features.ImageSet`.
        fid_64: FID at 64 px, too, under a name of its own: MM-Interleaved's numbers are such.
        prefix: words before each caption, for CLIP.
        statistics: .npz of the real images' Inception features, in place of the images themselves
            (`statistics.read_gaussian`), at the same `fid_size`. If it isn't there yet, it is
            written.
        fid_whole: `fid_size` is the short side (bilinear), and nothing is cut out: MiniGPT-5's
            numbers are such.
        full_score: the inception score is of the images as they are, not at `fid_size`.
    """

    inception: str = ""
    tower: str = ""
    clip: str = ""
    fid_size: int | None = 256
    fid_64: bool = False
    prefix: str = ""
    statistics: str = ""
    fid_whole: bool = False
    full_score: bool = False

    def __post_init__(self):
        if self.fid_size is not None and not 1 <= self.fid_size <= 4096:
            raise ConfigError("fid_size must be a size in pixels or None, at most 4096, not "
                              f"{self.fid_size}")  # fmt: skip

    @property
    def fid(self) -> str:
        """The name of FID at this size."""
        return f"FID ({self.at})"

    @property
    def at(self) -> str:
        """The size of images for FID, in words."""
        if self.fid_size is None:
            return "images as they are"
        return f"{self.fid_size} px" + ", not cut" * self.fid_whole

    @property
    def score(self) -> tuple[str, str]:
        """The names of the inception score and of its deviation."""
        where = " (images as they are)" if self.full_score and self.fid_size is not None else ""
        return INCEPTION + where, DEVIATION + where

    def images(self, paths: Sequence[str]) -> ImageSet:
        """A set of images as FID sees them."""
        return ImageSet(tuple(paths), self.fid_size, self.fid_whole)

    @property
    def reference_fid(self) -> str:
        """The name of FID as MM-Interleaved measures it."""
        return "FID (64 px, as MM-Interleaved)"

    @property
    def distance(self) -> str:
        """The name of the feature distance of this tower."""
        return f"feature distance ({self.tower})"

    def single_fid(self, group: str) -> str:
        """The name of the mean FID of units that are called so."""
        return f"mean FID of single {group} ({self.at})"

    def names(self, group: str = "") -> list[str]:
        """Of all scores that it may give; `group` as of `Drawn`."""
        found = [self.distance] if self.tower else []
        if self.inception:
            found += [self.fid, *self.score]
            found += [self.reference_fid] * self.fid_64 + [self.single_fid(group)] * bool(group)
        if self.clip:
            found += [name + end for name in (TEXT, IMAGE, CLIPSCORE) for end in ("", FAILED)]
        return found


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Drawn images, and what they are compared with.

    Attributes:
        paths: files.
        captions: that they were drawn from, as many; () or None for one: unknown.
        partners: the real image that belongs to each, as many; likewise.
        real: the set of real images that distances are to; (): no distances.
        units: what each belongs to, as many, which intervals draw whole; (): each is its own.
        failed: the unit of each image that was to be drawn and was not; None: unknown.
        group: what units are called, if a mean FID of units is wanted; "": it isn't.
    """

    paths: tuple[str, ...]
    captions: tuple[str | None, ...] = ()
    partners: tuple[str | None, ...] = ()
    real: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    failed: tuple[str, ...] | None = None
    group: str = ""

    def unit(self, index: int) -> str:
        """Of an image by its index."""
        return self.units[index] if self.units else f"image {index}"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Attributes:
    values: name -> score.
    intervals: name -> 95 % bootstrap interval, where one can be had.
    notes: what a reader has to know, a line each.
    bad: file -> reason, of images that could not be used.
    settings: what the scores depend on. JSON-able.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    notes: list[str]
    bad: dict[str, str]
    settings: dict


def score(drawn: Drawn, measures: Measures) -> Scores:
    """All scores that the measures ask for and the images allow.

    Raises:
        DataError: no image can be used, or there are too few.
        UserError: a network can't be read.
    """
    found = Scores({}, {}, [], {}, dataclasses.asdict(measures))
    found.settings["images"] = len(drawn.paths)
    found.settings["real_images"] = len(drawn.real)
    if drawn.failed is not None:
        found.settings["not_drawn"] = len(drawn.failed)
    if measures.inception:
        _inception(drawn, measures, found)
    if measures.tower and drawn.real:
        _tower(drawn, measures, found)
    if measures.clip:
        _clip(drawn, measures, found)
    if found.bad:
        reason = next(iter(found.bad.values()))
        found.notes.append(f"{len(found.bad)} images could not be used; the first: {reason}")
    return found


def _inception(drawn: Drawn, measures: Measures, found: Scores) -> None:
    network = features.open_inception(measures.inception)
    mine = network.features(measures.images(drawn.paths))
    found.bad.update(mine.bad)
    real = _real(network, drawn, measures, found)
    if real is not None:
        _distance(measures.fid, statistics.Gaussian.of(mine.values), real, found)
    if measures.fid_64 and drawn.real:
        pair = [network.gaussian(ImageSet(paths, 64))[0] for paths in (drawn.paths, drawn.real)]
        _distance(measures.reference_fid, *pair, found)
    if drawn.group:
        _singly(network, mine, drawn, measures, found)
    if measures.full_score and measures.fid_size is not None:
        mine = network.features(ImageSet(drawn.paths))
    try:
        score = statistics.inception_score(network.logits(mine.values))
        found.values.update(zip(measures.score, score, strict=True))
    except DataError as error:
        found.notes.append(f"no {INCEPTION}: {error}")


def _singly(network, mine: Features, drawn: Drawn, measures: Measures, found: Scores) -> None:
    """The mean over units of the FID between a unit's images and the real ones of the same."""
    name = measures.single_fid(drawn.group)
    rows = [row for row, i in enumerate(mine.kept) if drawn.partners[i]]
    real = network.features(measures.images(drawn.partners[mine.kept[row]] for row in rows))
    pairs: dict[str, list] = {unit: [] for unit in (*drawn.units, *(drawn.failed or ()))}
    for k, vector in zip(real.kept, real.values, strict=True):
        row = rows[k]
        pairs[drawn.unit(mine.kept[row])].append((mine.values[row], vector))
    whole = [own for own in pairs.values() if len(own) > 1]
    if whole:
        distances = [statistics.frechet_distance_of_few(*map(np.stack, zip(*own, strict=True)))
                     for own in whole]  # fmt: skip
        found.values[name] = float(np.mean(distances))
        found.intervals[name] = statistics.interval(distances)
    few = len(pairs) - len(whole)
    found.notes.append(
        f"{name}: of {len(whole)} {drawn.group}; covariances of so few images are singular, so it "
        "compares only with numbers that were made alike"
        + (f"; {few} with fewer than two images are left out" if few else "")
    )


def _real(network, drawn: Drawn, measures: Measures, found: Scores) -> statistics.Gaussian | None:
    """The Gaussian of the real images, from a file or from them."""
    if os.path.exists(measures.statistics):
        return statistics.read_gaussian(measures.statistics, measures.fid_size, measures.fid_whole)
    if not drawn.real:
        return None
    real, bad = network.gaussian(measures.images(drawn.real))
    found.bad.update(bad)
    if measures.statistics and real.count > 1:
        statistics.write_gaussian(measures.statistics, real, measures.fid_size, measures.fid_whole)
    return real


def _tower(drawn: Drawn, measures: Measures, found: Scores) -> None:
    network = features.open_tower(measures.tower)
    pair = [network.gaussian(ImageSet(paths)) for paths in (drawn.paths, drawn.real)]
    for _, bad in pair:
        found.bad.update(bad)
    _distance(measures.distance, pair[0][0], pair[1][0], found)


def _distance(name: str, mine, real, found: Scores) -> None:
    try:
        found.values[name] = statistics.frechet_distance(mine, real)
    except DataError as error:
        found.notes.append(f"no {name}: {error}")
        return
    for what, one in (("drawn", mine), ("real", real)):
        if one.note:
            found.notes.append(f"{name}, {what} images: {one.note}")


def _clip(drawn: Drawn, measures: Measures, found: Scores) -> None:
    if not (any(drawn.captions) or any(drawn.partners)):
        return
    network = features.open_clip(measures.clip)
    mine = network.features(ImageSet(drawn.paths))
    found.bad.update(mine.bad)
    cosine, cut = text_cosines(network, mine, drawn.captions, measures.prefix)
    if len(cosine):
        told = [i for i in mine.kept if drawn.captions[i]]
        _mean(TEXT, cosine, told, drawn, found)
        _mean(CLIPSCORE, statistics.clipscore(cosine), told, drawn, found)
        if cut:
            found.notes.append(f"{cut} captions were cut to CLIP's {network.length} tokens")
    kept = [(row, drawn.partners[i]) for row, i in enumerate(mine.kept)
            if drawn.partners and drawn.partners[i]]  # fmt: skip
    if kept:
        real = network.features(ImageSet(tuple(path for _, path in kept)))
        found.bad.update(real.bad)
        rows = [kept[i][0] for i in real.kept]
        cosine = statistics.cosines(mine.values[rows], real.values)
        _mean(IMAGE, cosine, [mine.kept[row] for row in rows], drawn, found)


def text_cosines(
    network: features.Clip, images: Features, captions: Sequence[str | None], prefix: str = ""
) -> tuple[np.ndarray, int]:
    """(float64[n] cosines of the images that have a caption, how many captions were cut)."""
    kept = [(row, captions[i]) for row, i in enumerate(images.kept) if captions and captions[i]]
    if not kept:
        return np.zeros(0), 0
    rows, texts = zip(*kept, strict=True)
    start = f"{prefix.strip()} " if prefix.strip() else ""
    vectors, cut = network.texts([start + text for text in texts])
    return statistics.cosines(images.values[list(rows)], vectors), cut


def _mean(
    name: str, values: np.ndarray, images: Sequence[int], drawn: Drawn, found: Scores
) -> None:
    """Adds the mean of float[N], and where failures are known, the one in which they are zeros.

    images: index of each
    """
    units = [drawn.unit(i) for i in images]
    both = {name: (values, units)}
    if drawn.failed is not None:
        zeros = np.zeros(len(drawn.failed))
        both[name + FAILED] = np.concatenate([values, zeros]), [*units, *drawn.failed]
    for each, (numbers, own) in both.items():
        found.values[each] = float(numbers.mean())
        found.intervals[each] = statistics.interval(numbers, units=own)


def as_json(found: Scores) -> dict:
    """For files."""
    return {
        "scores": found.values,
        "intervals": found.intervals,
        "settings": found.settings,
        "notes": found.notes,
        "bad_images": found.bad,
    }
