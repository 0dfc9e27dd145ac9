"""Samplers of the diffusion decoder (DDIM, DDPM, DPM-Solver++ 2M, Euler, PNDM) in one `lax.scan`.

All are linear multistep rules, so each is a small frozen dataclass that writes one float32
table, a row per network call, and one step function serves them all:

    y  = prediction(scale_in * x, t)
    y  = mix[0] * y + mix[1:] . (earlier predictions)              PNDM only
    x0 = p * base + q * y            base = x, or the x of the call before (PNDM's second call)
    x  = a * base + b * x0 + c * x0 of the step before             c: DPM-Solver++ only
    x  = x + d * fresh noise                                       DDPM only

DDIM: Song et al. 2020. DDPM: Ho et al. 2020. DPM-Solver++: Lu et al. 2022. Euler and its sigmas:
Karras et al. 2022.
PNDM: Liu et al. 2022, without Runge-Kutta steps; it calls the network once more than it has steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from metamorph_jax.models.diffusion.schedule import Schedule, x0_weights

SPACINGS = ("leading", "linspace", "trailing")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a sampler, float64 until they enter the loop; N = number of network calls.

    Attributes:
        t: [N] timesteps given to the network.
        a, b, c, d, p, q: [N] see the module docstring.
        scale_in: [N] factor of the network's input.
        mix: [N, 4] weights of this prediction and the three before it (newest first).
        repeat: bool[N] True where the call refines the last step instead of making one.
        init_sigma: factor of the initial unit noise.
        sigmas: [N + 1] noise levels, for samplers that are defined by them.
    """

    t: np.ndarray
    a: np.ndarray
    b: np.ndarray
    p: np.ndarray
    q: np.ndarray
    c: np.ndarray | None = None
    d: np.ndarray | None = None
    scale_in: np.ndarray | None = None
    mix: np.ndarray | None = None
    repeat: np.ndarray | None = None
    init_sigma: float = 1.0
    sigmas: np.ndarray | None = None

    def rows(self, clip: bool = False) -> dict[str, jax.Array]:
        """What the loop reads, as float32 (and bool) arrays of length N; unused parts left out.

        Where nothing looks at x0, it is folded away here, in float64: x = a * base + b * y. Going
        through x0 would divide by a small sqrt(alphas_cumprod) and lose digits at high noise.
        """
        names = ("t", "a", "b", "p", "q", "c", "d", "scale_in", "mix")
        values = {k: getattr(self, k) for k in names}
        if self.c is None and not clip:
            p, q = values.pop("p"), values.pop("q")
            values |= {"a": self.a + self.b * p, "b": self.b * q}
        rows = {k: jnp.asarray(v, jnp.float32) for k, v in values.items() if v is not None}
        if self.repeat is not None:
            rows["repeat"] = jnp.asarray(self.repeat)
        if self.d is not None:
            rows["index"] = jnp.arange(len(self.t))
        return rows

    def fits(self, total: int) -> bool:
        """Whether all numbers are finite and all timesteps among the `total` of training."""
        values = [v for v in vars(self).values() if v is not None]
        inside = self.t.min() >= 0 and self.t.max() <= total - 1
        return bool(inside and all(np.isfinite(v).all() for v in values))


def timesteps(spacing: str, total: int, steps: int, offset: int) -> np.ndarray:
    """`steps` of `total` training timesteps, descending, float64 (fractional for linspace)."""
    if spacing == "leading":
        return np.arange(steps)[::-1] * float(total // steps) + offset
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    if spacing == "trailing":
        return np.round(total - np.arange(steps) * (total / steps)) - 1
    raise ValueError(f"spacing={spacing!r}, expected one of {SPACINGS}")


def _ddim_rows(s: Schedule, a, before) -> dict[str, np.ndarray]:
    """x_before = sqrt(before) x0 + sqrt(1 - before) noise, with the noise that x and x0 imply."""
    p, q = x0_weights(s, a)
    ratio = np.sqrt(1 - before) / np.sqrt(1 - a)
    return {"p": p, "q": q, "a": ratio, "b": np.sqrt(before) - ratio * np.sqrt(a)}


def _levels(s: Schedule, t: np.ndarray, last: float) -> np.ndarray:
    """alphas_cumprod at int timesteps; `last` for negative ones."""
    t = t.astype(int)
    return np.where(t >= 0, s.alphas_cumprod[np.maximum(t, 0)], last)


def step_noise(noise, index):
    """The noise that step number `index` adds, as far as it was drawn from `noise`.

    An image is a function of the noise that it starts from: the first two numbers of that are the
    seed of all further noise of this image, whatever is drawn beside it.

    noise, and what is returned: float32[B, h, w, c] standard normal.
    """
    first = jax.lax.bitcast_convert_type(noise.reshape(len(noise), -1)[:, :2], jnp.uint32)

    def one(seeds):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seeds[0]), seeds[1])
        return jax.random.normal(jax.random.fold_in(key, index), noise.shape[1:])

    return jax.vmap(one)(first)


def step(row: dict, predict: Callable, carry: dict, clip=None, fresh: Callable | None = None):
    """One row of a table. carry: x, and base, x0, outputs where the sampler needs them.

    fresh: (index of the row) -> noise like x, for a table with `d`.
    """
    x = carry["x"]
    y = prediction = predict(x * row["scale_in"] if "scale_in" in row else x, row["t"])
    new, base = {}, x
    if "mix" in row:
        earlier = carry["outputs"]
        y = row["mix"][0] * y + jnp.tensordot(row["mix"][1:], earlier, 1)
        base = jnp.where(row["repeat"], carry["base"], x)
        pushed = jnp.concatenate([prediction[None], earlier[:-1]])
        new["outputs"] = jnp.where(row["repeat"], earlier, pushed)
        new["base"] = x
    if "p" in row:
        y = row["p"] * base + row["q"] * y
        y = y if clip is None else jnp.clip(y, *clip)
    new["x"] = row["a"] * base + row["b"] * y
    if "c" in row:
        new["x"] += row["c"] * carry["x0"]
        new["x0"] = y
    if "d" in row:
        new["x"] += row["d"] * fresh(row["index"])
    return new, prediction


class Sampler:
    """A table of rows, and one loop over it."""

    history: ClassVar[int] = 0  # earlier predictions that a row mixes

    def table(self, s: Schedule, steps: int) -> Table:
        """The rows for `steps` steps of this training schedule."""
        raise NotImplementedError

    def checked_table(self, s: Schedule, steps: int) -> Table:
        """`table`, if this sampler can make so many steps of the schedule.

        Raises:
            ValueError: there are more steps than training timesteps, or so many that two of them
                fall together or one lies outside of training.
        """
        total = s.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"{steps} steps: expected 1 to {total}, the training timesteps")
        try:
            with np.errstate(all="ignore"):
                table = self.table(s, steps)
        except IndexError:
            table = None
        if table is None or not table.fits(total):
            name = type(self).__name__
            raise ValueError(
                f"{steps} steps are too many for {name} with {total} training timesteps"
            )
        return table

    def integrate(
        self,
        predict: Callable,
        noise,
        schedule: Schedule,
        steps: int,
        *,
        clip: tuple | None = None,
        fresh: Callable | None = None,
        return_trajectory: bool = False,
    ):
        """From noise to x0, float32[B, h, w, c].

        Args:
            predict: (x float32[B, h, w, c], t float32 scalar) -> the network's prediction, like x.
            noise: float32[B, h, w, c] standard normal.
            schedule: the training schedule; says what the prediction means.
            steps: number of steps.
            clip: (low, high) that every x0 estimate is clipped to, numbers or [c]; for pixels.
            fresh: (index of a step, int32 scalar) -> the noise that it adds, float32[B, h, w, c]
                standard normal; None: `step_noise`. Not called by samplers that add none.
            return_trajectory: also return the states [N + 1, ...] and predictions [N, ...].

        Raises:
            ValueError: see `checked_table`.
        """
        table = self.checked_table(schedule, steps)
        rows = table.rows(clip is not None)
        noise = noise.astype(jnp.float32)
        fresh = fresh or functools.partial(step_noise, noise)
        x = noise * table.init_sigma
        carry = {"x": x}
        if "mix" in rows:
            carry |= {"base": x, "outputs": jnp.zeros((self.history, *x.shape))}
        if "c" in rows:
            carry["x0"] = jnp.zeros_like(x)

        def body(carry, row):
            carry, prediction = step(row, predict, carry, clip, fresh)
            return carry, (carry["x"], prediction) if return_trajectory else None

        carry, seen = jax.lax.scan(body, carry, rows)
        if return_trajectory:
            return carry["x"], (jnp.concatenate([x[None], seen[0]]), seen[1])
        return carry["x"]


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """Deterministic DDIM (eta 0). `to_one`: the last step goes to alpha 1, not to level 0."""

    spacing: str = "leading"
    offset: int = 1
    to_one: bool = False

    def table(self, s: Schedule, steps: int) -> Table:
        total = s.num_train_timesteps
        t = np.round(timesteps(self.spacing, total, steps, self.offset))
        last = 1.0 if self.to_one else s.alphas_cumprod[0]
        rows = _ddim_rows(s, _levels(s, t, last), _levels(s, t - total // steps, last))
        return Table(t=t, **rows)


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling with the small fixed variance, as `schedule.ancestral_step`. The last step
    goes to alpha 1, with the noise that the reference's smallest variance, 1e-20, leaves of it."""

    spacing: str = "leading"
    offset: int = 1

    def table(self, s: Schedule, steps: int) -> Table:
        total = s.num_train_timesteps
        t = np.round(timesteps(self.spacing, total, steps, self.offset))
        now, before = _levels(s, t, 1.0), _levels(s, t - total // steps, 1.0)
        p, q = x0_weights(s, now)
        alpha = now / before
        rest = 1 - now
        variance = np.maximum((1 - before) / rest * (1 - alpha), 1e-20)
        return Table(t=t, p=p, q=q, a=np.sqrt(alpha) * (1 - before) / rest,
                     b=np.sqrt(before) * (1 - alpha) / rest,
                     d=np.where(t > 0, np.sqrt(variance), 0.0))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PNDM(Sampler):
    """Pseudo linear multistep (PLMS): mixes up to four predictions, then steps as DDIM does."""

    spacing: str = "leading"
    offset: int = 1
    to_one: bool = False
    history: ClassVar[int] = 3

    def table(self, s: Schedule, steps: int) -> Table:
        if steps < 2:
            raise ValueError(f"PNDM needs at least 2 steps, got {steps}")
        total = s.num_train_timesteps
        stride = total // steps
        t = np.round(timesteps(self.spacing, total, steps, self.offset))
        # The second timestep is visited twice: first to reach it, then to redo that step with the
        # mean of both predictions.
        calls = np.concatenate([t[:2], t[1:]])
        start, end = calls.copy(), calls - stride
        start[1], end[1] = calls[1] + stride, calls[1]
        last = 1.0 if self.to_one else s.alphas_cumprod[0]
        rows = _ddim_rows(s, _levels(s, start, last), _levels(s, end, last))
        mix = np.zeros((len(calls), 4))
        first = [[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0],
                 [23 / 12, -16 / 12, 5 / 12, 0]]  # fmt: skip
        mix[:4] = first[: len(calls)]
        mix[4:] = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
        return Table(t=calls, **rows, mix=mix, repeat=np.arange(len(calls)) == 1)


def _training_sigmas(s: Schedule) -> np.ndarray:
    """sqrt((1 - a) / a), ascending. The library keeps the last level finite with zero_snr."""
    a = s.alphas_cumprod
    a = np.maximum(a, 2.0**-24) if s.zero_snr else a
    return np.sqrt((1 - a) / a)


def _karras(sigmas: np.ndarray, steps: int, rho: float = 7.0) -> np.ndarray:
    """`steps` levels from the highest to the lowest, even in sigma^(1/rho)."""
    low, high = sigmas[0] ** (1 / rho), sigmas[-1] ** (1 / rho)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** rho


def _sigma_to_t(sigma: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Fractional training timestep of a level, linear in log sigma."""
    return np.interp(np.log(sigma), np.log(sigmas), np.arange(len(sigmas)))


def _sigma_schedule(s: Schedule, t: np.ndarray, karras: bool, final_zero: bool, rounded: bool):
    """(t [N], sigmas [N + 1]) from training timesteps.

    With `karras` the levels lie between those of training, or (not `rounded`) between the first and
    the last of these timesteps, as the library's schedulers have it.
    """
    training = _training_sigmas(s)
    sigmas = np.interp(t, np.arange(len(training)), training)
    if karras:
        sigmas = _karras(training if rounded else sigmas[::-1], len(t))
        t = _sigma_to_t(sigmas, training)
        t = np.round(t) if rounded else t
    return t, np.append(sigmas, 0.0 if final_zero else training[0])


@dataclasses.dataclass(frozen=True)
class DPMSolverPP(Sampler):
    """DPM-Solver++ 2M, midpoint form; `karras` spaces the noise levels as Karras et al. do."""

    spacing: str = "linspace"
    offset: int = 0
    karras: bool = False
    final_zero: bool = True
    lower_order_final: bool = True

    def table(self, s: Schedule, steps: int) -> Table:
        total = s.num_train_timesteps
        # This solver's leading and linspace grids have one more point and leave out the lowest.
        extra = 0 if self.spacing == "trailing" else 1
        t = np.round(timesteps(self.spacing, total, steps + extra, self.offset))[:steps]
        t, sigmas = _sigma_schedule(s, t, self.karras, self.final_zero, rounded=True)
        alpha = 1 / np.sqrt(1 + sigmas**2)
        std = sigmas * alpha
        with np.errstate(divide="ignore"):
            lam = np.log(alpha) - np.log(std)
        h = lam[1:] - lam[:-1]
        gain = alpha[1:] * -np.expm1(-h)  # weight of the x0 direction
        ratio = np.concatenate([[0.0], 0.5 * h[1:] / h[:-1]])  # 1 / (2 r0) of the second order term
        if self.final_zero or (self.lower_order_final and steps < 15):
            ratio[-1] = 0.0
        p, q = x0_weights(s, alpha[:-1] ** 2)
        return Table(t=t, p=p, q=q, a=std[1:] / std[:-1], b=gain * (1 + ratio), c=-gain * ratio,
                     sigmas=sigmas)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
    """Euler steps in sigma space: x = x0 + sigma * noise."""

    spacing: str = "leading"
    offset: int = 1
    karras: bool = False
    final_zero: bool = True

    def table(self, s: Schedule, steps: int) -> Table:
        t = timesteps(self.spacing, s.num_train_timesteps, steps, self.offset)
        t, sigmas = _sigma_schedule(s, t, self.karras, self.final_zero, rounded=False)
        now, following = sigmas[:-1], sigmas[1:]
        scale_in = 1 / np.sqrt(now**2 + 1)
        p, q = x0_weights(s, scale_in**2)
        top = sigmas.max()
        init = top if self.spacing in ("linspace", "trailing") else np.sqrt(top**2 + 1)
        return Table(t=t, p=p * scale_in, q=q, a=following / now, b=1 - following / now,
                     scale_in=scale_in, init_sigma=float(init), sigmas=sigmas)  # fmt: skip


SAMPLERS = {"ddim": DDIM, "ddpm": DDPM, "pndm": PNDM, "dpm++": DPMSolverPP, "euler": Euler}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a trained decoder draws by default.

    Attributes:
        sampler: "auto" or a name in `SAMPLERS`; "auto" is DDIM for a decoder that must start from
            pure noise, DPM-Solver++ otherwise.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    sampler: str = "auto"
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self):
        if self.sampler not in ("auto", *SAMPLERS):
            known = ", ".join(("auto", *SAMPLERS))
            raise ValueError(f"sampling.sampler {self.sampler!r} is none of {known}")
        if self.steps < 1:
            raise ValueError(f"sampling.steps {self.steps} must be at least 1")


def make_sampler(name: str, from_pure_noise: bool) -> Sampler:
    """The sampler of a name in `SamplingConfig`.

    from_pure_noise: it must start at the very last training timestep, see `DiffusionConfig`.
    """
    if name == "auto":
        name = "ddim" if from_pure_noise else "dpm++"
    kind = SAMPLERS[name]
    if not from_pure_noise:
        return kind()
    ends = {"to_one": True} if name in ("ddim", "pndm") else {}
    return kind(spacing="trailing", **ends)
