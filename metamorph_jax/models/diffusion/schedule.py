"""The forward noising process, its prediction targets and loss weights.

    x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise,    a_t = prod(1 - beta)            (alphas_cumprod)

What a network predicts, as a linear function of x0 and noise, with s = sqrt(1 - a):
`epsilon` = noise, `v_prediction` = sqrt(a) noise - s x0, `sample` = x0.

Tables are numpy float64 and become float32 where they meet arrays.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from metamorph_jax.config import check_numbers

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Stable Diffusion's defaults. `zero_snr` rescales the betas: the last step is pure noise.

    `snr_shift` multiplies every signal-to-noise ratio by its square. A patch of a flat
    image averages out the noise of its pixels, so the layout of the image is decided at noise
    levels at which single pixels show nothing: 0.125 (with `squaredcos_cap_v2`) spends half of the
    steps there.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    zero_snr: bool = False
    snr_shift: float = 1.0

    def __post_init__(self):
        check_numbers(self, "num_train_timesteps", "beta_start beta_end snr_shift")
        if self.prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type={self.prediction_type!r}, expected {PREDICTIONS}")
        if self.beta_schedule not in _BETAS:
            raise ValueError(f"beta_schedule={self.beta_schedule!r}, expected {sorted(_BETAS)}")
        if self.zero_snr and self.prediction_type == "epsilon":
            raise ValueError("zero_snr: noise cannot be predicted where only noise is left;"
                             " use v_prediction or sample")  # fmt: skip

    @property
    def betas(self) -> np.ndarray:
        """float64[T]"""
        betas = _BETAS[self.beta_schedule](self)
        betas = _zero_snr(betas) if self.zero_snr else betas
        return betas if self.snr_shift == 1 else _shift_snr(betas, self.snr_shift)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """float64[T]"""
        return np.cumprod(1.0 - self.betas)


def _squared_cosine(s: Schedule) -> np.ndarray:
    bar = np.cos((np.linspace(0, 1, s.num_train_timesteps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


_BETAS = {
    "linear": lambda s: np.linspace(s.beta_start, s.beta_end, s.num_train_timesteps),
    "scaled_linear": lambda s: np.linspace(
        s.beta_start**0.5, s.beta_end**0.5, s.num_train_timesteps
    ) ** 2,
    "squaredcos_cap_v2": _squared_cosine,
}  # fmt: skip


def _zero_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(a_t) so that it ends at 0 and starts as before (Lin et al. 2023)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1.0 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def _shift_snr(betas: np.ndarray, shift: float) -> np.ndarray:
    """The betas whose signal-to-noise ratios are shift**2 times those of `betas`."""
    bar = np.cumprod(1.0 - betas)
    bar = bar * shift**2 / (bar * shift**2 + 1.0 - bar)
    return 1.0 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def _at(table: np.ndarray, t, like):
    """table[t] as float32, shaped to multiply `like`. t: int[B]."""
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def add_noise(s: Schedule, x0, noise, t):
    """x_t. x0, noise: float[B, ...]; t: int[B]."""
    a = s.alphas_cumprod
    return _at(np.sqrt(a), t, x0) * x0 + _at(np.sqrt(1 - a), t, x0) * noise


def velocity(s: Schedule, x0, noise, t):
    a = s.alphas_cumprod
    return _at(np.sqrt(a), t, x0) * noise - _at(np.sqrt(1 - a), t, x0) * x0


def target(s: Schedule, x0, noise, t):
    """What the network has to predict."""
    if s.prediction_type == "epsilon":
        return noise
    return x0 if s.prediction_type == "sample" else velocity(s, x0, noise, t)


def x0_weights(s: Schedule, a) -> tuple[np.ndarray, np.ndarray]:
    """(p, q) with x0 = p * x_t + q * prediction, for levels a = alphas_cumprod (float64)."""
    a = np.asarray(a, np.float64)
    if s.prediction_type == "epsilon":
        return 1 / np.sqrt(a), -np.sqrt(1 - a) / np.sqrt(a)
    if s.prediction_type == "v_prediction":
        return np.sqrt(a), -np.sqrt(1 - a)
    return np.zeros_like(a), np.ones_like(a)


def predict_x0(s: Schedule, prediction, x, t):
    """x0 as the prediction implies it. prediction, x: float[B, ...]; t: int[B]."""
    p, q = x0_weights(s, s.alphas_cumprod)
    return _at(p, t, x) * x + _at(q, t, x) * prediction


def snr(s: Schedule, t):
    """Signal-to-noise ratio: float32[B]."""
    a = s.alphas_cumprod
    return jnp.asarray(a / (1 - a), jnp.float32)[t]


def min_snr_weight(s: Schedule, t, gamma: float = 5.0):
    """Loss weight that caps every step's weight on x0 at gamma (Hang et al. 2023): float32[B]."""
    ratio = snr(s, t)
    capped = jnp.minimum(ratio, gamma)
    if s.prediction_type == "sample":
        return capped
    # With zero_snr the ratio can be 0, but then the prediction is a velocity.
    return capped / (ratio if s.prediction_type == "epsilon" else ratio + 1)


def velocity_weight(s: Schedule, t, cap: float = 5.0):
    """Loss weight that makes an x0 loss a velocity loss, SNR + 1, but at most `cap`: float32[B]."""
    if s.prediction_type != "sample":
        raise ValueError(f"velocity_weight needs x0 prediction, not {s.prediction_type!r}")
    return jnp.minimum(snr(s, t) + 1, cap)


def ancestral_step(s: Schedule, prediction, x, t: int, previous: int, noise):
    """One DDPM step from t to `previous` (negative: to the image itself), small fixed variance.

    prediction, x, noise: float[B, ...]; t and previous are Python ints.
    """
    a, before = s.alphas_cumprod[t], s.alphas_cumprod[previous] if previous >= 0 else 1.0
    p, q = (float(w) for w in x0_weights(s, a))
    x0 = p * x + q * prediction
    alpha, beta = a / before, 1 - a / before
    mean = float(np.sqrt(before) * beta / (1 - a)) * x0
    mean = mean + float(np.sqrt(alpha) * (1 - before) / (1 - a)) * x
    variance = max((1 - before) / (1 - a) * beta, 1e-20)
    return mean + float(np.sqrt(variance)) * noise if t > 0 else mean
