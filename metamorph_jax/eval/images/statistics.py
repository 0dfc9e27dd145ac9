"""The arithmetic of scores of drawn images: Gaussians, the Fréchet distance, the inception score.

All of it is float64 and on the host. The Fréchet distance between two sets of features is

    |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2))

with means m and unbiased covariances C. It is called FID only for the 2048 features of the
Inception network of 2015 (Heusel et al. 2017, arXiv 1706.08500); for features of anything else it
is the "feature distance" of that tower. The inception score is that of Salimans et al. 2016
(arXiv 1606.03498), CLIPScore that of Hessel et al. 2021 (arXiv 2104.08718).
"""

import dataclasses
import io
import math
import os
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from metamorph_jax import files
from metamorph_jax.errors import DataError, FileError

SPLITS = 10  # of the inception score
CLIPSCORE_FACTOR = 2.5
# What reading a damaged .npz raises.
_DAMAGED = (KeyError, ValueError, TypeError, OSError, EOFError, MemoryError, zipfile.BadZipFile,
            zlib.error)  # fmt: skip
# The steps of pytorch-fid where the root of a product of covariances is not finite or not real.
_DIAGONAL, _IMAGINARY = 1e-6, 1e-3


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and scatter of a set of feature vectors, to which batches are added one by one.

    Attributes:
        count: N, vectors so far.
        mean: float64[C].
        scatter: float64[C, C], the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, width: int) -> "Gaussian":
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, features: np.ndarray) -> "Gaussian":
        """The Gaussian of float[N, C], N at least 1."""
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merged(self, other: "Gaussian") -> "Gaussian":
        """The Gaussian of both sets together (Chan's formula, which loses no digits)."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Gaussian(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """float64[C, C], unbiased.

        Raises:
            DataError: it has fewer than two vectors.
        """
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 images, not {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def note(self) -> str:
        """What a reader of a distance has to know about this set, or ""."""
        if self.count > len(self.mean):
            return ""
        return (
            f"{self.count} images for {len(self.mean)} features: the covariance is singular, and "
            "the distance far larger than that of more images"
        )


def read_gaussian(path: str | os.PathLike, size: int | None = None, whole=False) -> Gaussian:
    """The Gaussian of a file of statistics.

    Args:
        path: .npz with "mu" float[C] and "sigma" float[C, C], as pytorch-fid writes it, and perhaps
            "count" (without it, the images are taken to be enough), "size" (0: as they are) and
            "whole"; or .pt with running sums, as MiniGPT-5 keeps those of CC3M (`_running_sums`).
        size, whole: of `features.ImageSet`, that images were to be brought to. Files that don't say
            theirs are taken to be of these.

    Raises:
        FileError: it is not such a file, or of another size.
    """
    if str(path).endswith(".pt"):
        return _running_sums(path)
    asked = (size or 0, bool(size and whole))
    try:
        with np.load(files.regular(path), allow_pickle=False) as found:
            mean, covariance = (np.asarray(found[name], np.float64) for name in ("mu", "sigma"))
            count = int(found["count"]) if "count" in found else len(mean) + 1
            own = asked
            if "size" in found:
                own = int(found["size"]), "whole" in found and bool(found["whole"])
    except _DAMAGED as error:
        raise FileError(f"{files.shown(path)} is not a file of statistics (.npz with mu and sigma):"
                        f" {files.shown(error)}") from error  # fmt: skip
    if not (_sound(mean, covariance) and count > 1):
        raise FileError(f"{files.shown(path)}: mu {mean.shape} and sigma {covariance.shape} of "
                        f"{count} images are no mean and covariance")  # fmt: skip
    if own != asked:
        cut = {True: ", not cut", False: ""}
        raise FileError(f"{files.shown(path)} is of images at fid_size {own[0] or None}"
                        f"{cut[own[1]]}, not {size}{cut[asked[1]]}")  # fmt: skip
    return Gaussian(count, mean, covariance * (count - 1))


def _sound(mean: np.ndarray, covariance: np.ndarray) -> bool:
    shaped = mean.ndim == 1 and len(mean) and covariance.shape == mean.shape * 2
    return bool(shaped and np.isfinite(mean).all() and np.isfinite(covariance).all())


def _running_sums(path: str | os.PathLike) -> Gaussian:
    """The Gaussian of a torch file with [sum x, sum x x^T, number] of torchmetrics' features.

    Raises:
        FileError: it holds something else; or torch is missing.
    """
    from metamorph_jax.convert import archives

    archives.check(path)
    try:
        import torch

        found = torch.load(files.regular(path), map_location="cpu", weights_only=True)
        total, outer, count = (np.asarray(part, np.float64) for part in found)
        count = int(count)
    except ImportError as error:
        raise FileError(f"{files.shown(path)}: torch files need the oracle extra") from error
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise FileError(f"{files.shown(path)} holds no running sums (sum, sum of outer products, "
                        f"number): {files.shown(error)}") from error  # fmt: skip
    if not _sound(total, outer) or count < 2:
        raise FileError(f"{files.shown(path)}: sums {total.shape} and {outer.shape} of {count} "
                        "images are no statistics")  # fmt: skip
    mean = total / count
    return Gaussian(count, mean, outer - count * np.outer(mean, mean))


def write_gaussian(
    path: str | os.PathLike, gaussian: Gaussian, size: int | None = None, whole: bool = False
) -> None:
    """Writes what `read_gaussian` and pytorch-fid read."""
    named = {"mu": gaussian.mean, "sigma": gaussian.covariance, "count": gaussian.count}
    data = io.BytesIO()
    np.savez(data, **named, size=size or 0, whole=bool(size and whole))
    files.write_whole(path, data.getvalue())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The Fréchet distance between two Gaussians of the same features.

    Raises:
        DataError: a set has fewer than two images, features differ in number, or the root of the
            product of covariances has an imaginary part above 1e-3.
    """
    from scipy import linalg

    if a.mean.shape != b.mean.shape:
        raise DataError(f"{len(a.mean)} features against {len(b.mean)}: two different networks")
    first, second = a.covariance, b.covariance
    root = _quiet_root(linalg, first @ second)
    if not np.isfinite(root).all():
        more = _DIAGONAL * np.eye(len(first))
        root = _quiet_root(linalg, (first + more) @ (second + more))
    if np.iscomplexobj(root):
        imaginary = np.abs(np.diagonal(root).imag).max()
        if not imaginary <= _IMAGINARY:
            raise DataError(f"the root of the covariances is not real: {imaginary:g}i in it")
        root = root.real
    apart = a.mean - b.mean
    trace = np.trace(first) + np.trace(second) - 2 * np.trace(root)
    return float(apart @ apart + trace)


def frechet_distance_of_few(a: np.ndarray, b: np.ndarray) -> float:
    """`frechet_distance` of two small sets, from their features, without a matrix of all features.

    With centred features A, B, divided by the roots of their numbers less one, C1 = A^T A and
    C2 = B^T B, so that Tr (C1 C2)^(1/2) is the sum of the singular values of A B^T.

    a, b: float[n, C], float[m, C]

    Raises:
        DataError: a set has fewer than two images, or features differ in number.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape[1] != b.shape[1]:
        raise DataError(f"{a.shape[1]} features against {b.shape[1]}: two different networks")
    if min(len(a), len(b)) < 2:
        raise DataError(f"a covariance needs at least 2 images, not {min(len(a), len(b))}")
    apart = a.mean(0) - b.mean(0)
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(apart @ apart + (a**2).sum() + (b**2).sum() - 2 * root)


def _quiet_root(linalg, matrix: np.ndarray) -> np.ndarray:
    """The root of a matrix, without the library's warnings about singular ones."""
    import warnings

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return linalg.sqrtm(matrix)


def inception_score(
    logits: np.ndarray, splits: int = SPLITS, seed: int | None = 0
) -> tuple[float, float]:
    """(mean, population standard deviation) over `splits` contiguous parts of exp(mean KL).

    Args:
        logits: float[N, classes].
        seed: images are shuffled with it first; None: they stay in order.

    Raises:
        DataError: there are fewer images than parts.
    """
    from scipy.special import log_softmax

    if len(logits) < splits:
        raise DataError(f"an inception score of {splits} parts needs as many images, not "
                        f"{len(logits)}")  # fmt: skip
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    if seed is not None:
        log_p = log_p[np.random.default_rng(seed).permutation(len(log_p))]
    ends = [i * len(log_p) // splits for i in range(splits + 1)]
    scores = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        part = log_p[start:end]
        p = np.exp(part)
        divergence = (p * (part - np.log(p.mean(0)))).sum(1)
        scores.append(math.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[N] of two float[N, C], row by row."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / lengths


def clipscore(cosine: np.ndarray) -> np.ndarray:
    """CLIPScore of cosines between images and captions: 2.5 max(cos, 0)."""
    return CLIPSCORE_FACTOR * np.maximum(cosine, 0)


def interval(
    values: np.ndarray, seed: int = 0, times: int = 1000, units: Sequence[str] | None = None
) -> tuple[float, float]:
    """95 % bootstrap interval of a mean.

    values: float[N]; units: what each belongs to, which is drawn whole (None: each is its own)
    """
    values = np.asarray(values, np.float64)
    rng, sums, counts = np.random.default_rng(seed), values, np.ones(len(values))
    if units is not None:
        _, place = np.unique(list(units), return_inverse=True)
        sums, counts = np.bincount(place, values), np.bincount(place)
    means = []
    for _ in range(times):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
