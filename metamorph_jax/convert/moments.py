"""Moments of an autoencoder that were computed elsewhere: torch files as MiniGPT-5's script makes
them, `<image>_output.pt` with float[2c, h, w], mean and logarithm of the variance.

That script feeds the autoencoder values in [0, 1] where the model was trained with [-1, 1]. Such
files draw pale, shifted latents, and nothing else shows it; so a few are compared with what the
autoencoder makes of the images itself.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from metamorph_jax import files
from metamorph_jax.convert import archives
from metamorph_jax.errors import DataError, WeightError

CHECKED = 4  # files that are compared
_NEAR = 0.2  # of the means' deviation inside an image; another way to resize differs by less


def read(path: str | pathlib.Path, shape: tuple[int, int, int]) -> np.ndarray:
    """float32[h, w, 2c] of a torch file; no code in it is run.

    Raises:
        WeightError: it is damaged, or holds something else.
    """
    archives.check(path)
    try:
        import torch

        found = torch.load(files.regular(path), map_location="cpu", weights_only=True)
        found = found.detach().float().numpy()
    except ImportError as error:
        raise WeightError(f"{files.shown(path)}: torch files need the oracle extra") from error
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        raise WeightError(
            f"{files.shown(path)} is not a file of one tensor: {files.shown(error)}"
        ) from error
    found = found.reshape(found.shape[-3:]).transpose(1, 2, 0) if found.ndim >= 3 else found
    if found.shape != shape or not np.isfinite(found).all():
        raise WeightError(
            f"{files.shown(path)} holds numbers of shape {found.shape} (height, width, channels), "
            f"expected {shape}, mean and logarithm of the variance of a latent"
        )
    return found


def checked(
    found: Iterable[tuple[str, np.ndarray, np.ndarray]],
    compute: Callable[[np.ndarray], np.ndarray],
) -> Iterator[np.ndarray]:
    """The moments one by one, of which the first few are compared with the autoencoder's own.

    Args:
        found: (name, pixels uint8[side, side, 3] of the image to draw, moments float32[h, w, 2c]).
        compute: pixels uint8[1, side, side, 3] -> its moments, of values in [-1, 1].

    Raises:
        DataError: moments are of values in [0, 1], or of another image or autoencoder.
    """
    for number, (name, pixels, moments) in enumerate(found):
        if number < CHECKED:
            _check(name, pixels, moments, compute)
        yield moments


def _check(name: str, pixels: np.ndarray, moments: np.ndarray, compute) -> None:
    mean = lambda x: np.split(x, 2, axis=-1)[0]  # noqa: E731
    # What a script that scales to [0, 1] gives is what ours makes of an image of half the contrast.
    pale = np.round(pixels / 2 + 127.5).astype(np.uint8)
    true, wrong = (mean(compute(x[None])[0]) for x in (pixels, pale))
    far = lambda other: float(np.abs(mean(moments) - other).mean())  # noqa: E731
    spread = max(float(true.std((0, 1)).mean()), 1e-6)
    most = _NEAR * spread
    if far(true) <= min(most, far(wrong)):
        return
    if far(wrong) <= most:
        raise DataError(
            f"{files.shown(name)} was made from pixels in [0, 1], as MiniGPT-5's own script does, "
            "but the image decoder was trained with latents of [-1, 1]: leave these files out, and "
            "the cache is filled with the right ones"
        )
    raise DataError(
        f"{files.shown(name)} is not what the autoencoder of config.model.sd_weights makes of the "
        f"image: means differ by {far(true):.3g}, those of an image deviate by {spread:.3g}"
    )
