"""A vision head that samples: from a hidden state to one of the visual tokens that may come next.

A request leaves much of an image open, and a head that regresses the next visual token answers with
the mean of all that could come. This one learns their distribution: given the state, it moves
noise to a visual token along a velocity that is learned by regression (rectified flow: Liu et al.
2023, arXiv 2209.03003; Lipman et al. 2023, arXiv 2210.02747). A small MLP that does so on the
states of an autoregressive model is the head of MAR (Li et al. 2024, arXiv 2406.11838), there with
diffusion.

    x_t  = (1 - t) noise + t x                       x: scaled visual token; t in [0, 1]
    v    = (f(x_t, t, state) - x_t) / (1 - t)
    loss = mean over channels of (v - (x - noise))^2
    x   <- noise + sum over steps of v / steps       Euler, from t = 0 to 1

    f: x_t ─ linear ─ depth x [norm, shift and scale, linear, SiLU, linear, gate] ─ norm ─ linear
       shift, scale and gate are made of the state and of t

The network predicts the visual token, from which the velocity follows (Li & He 2025, arXiv
2511.13720): visual tokens fill few of their channels' dimensions and noise fills all of them, so
that a small network which predicts the velocity itself learns noise above all
(`benchmarks/vision_head.py` compares both). Timesteps are drawn from a logit-normal distribution
(Esser et al. 2024, arXiv 2403.03206). In training, some states are replaced by a learned one, for
classifier-free guidance. All of it computes in float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.models.diffusion.blocks import linear, zeros
from metamorph_jax.models.diffusion.unet import time_features

_TIME = 1000.0  # t in the units of `time_features`
LEAST = 0.04  # of 1 - t where it divides; the last of 25 steps has it


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """A flow head, and how it samples.

    Attributes:
        width, depth: of the MLP.
        draws: noises and timesteps that each visual token is trained with in one step.
        drop_state: share of these whose state is replaced by the learned one.
        steps: evaluations for a visual token.
        guidance: scale of classifier-free guidance; 1 is none.
        temperature: the noise is scaled by it; 0 gives every request the same image.
    """

    width: int = 1024
    depth: int = 3
    draws: int = 4
    drop_state: float = 0.1
    steps: int = 12
    guidance: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        check_numbers(self, "width depth draws steps")
        if not 0 <= self.drop_state < 1:
            raise ValueError(f"drop_state {self.drop_state}: expected a share from 0 to below 1")
        if not (math.isfinite(self.guidance) and math.isfinite(self.temperature)):
            raise ValueError("guidance and temperature must be finite")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")
        if self.guidance != 1 and not self.drop_state:
            raise ValueError(
                f"guidance {self.guidance} needs a head that was trained without states, too: "
                "drop_state is 0"
            )


class _Block(nnx.Module):
    def __init__(self, width: int, rngs):
        self.modulation = linear(width, 3 * width, rngs, jnp.float32, kernel_init=zeros)
        self.fc1 = linear(width, width, rngs, jnp.float32)
        self.fc2 = linear(width, width, rngs, jnp.float32)

    def __call__(self, x, condition):
        """Both float32[..., width]; the condition has passed its SiLU."""
        shift, scale, gate = jnp.split(self.modulation(condition), 3, axis=-1)
        y = self.fc2(nnx.silu(self.fc1(_norm(x) * (1 + scale) + shift)))
        return x + gate * y


def _norm(x):
    """Layer norm without weights; shift and scale take their place."""
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6)


class FlowHead(nnx.Module):
    """See the module docstring.

    Args:
        width_in: D of the states; width_out: C of visual tokens.
        scale: visual tokens are multiplied by it, so that their channels are about as large as
            those of the noise.
    """

    def __init__(self, cfg: FlowConfig, width_in: int, width_out: int, scale: float, *, rngs):
        W, f32 = cfg.width, jnp.float32
        self.cfg, self.scale, self.channels = cfg, scale, width_out
        self.embed = linear(width_out, W, rngs, f32)
        self.state = linear(width_in, W, rngs, f32)
        self.time_1 = linear(W, W, rngs, f32)
        self.time_2 = linear(W, W, rngs, f32)
        self.null = nnx.Param(jnp.zeros(width_in), logical=("embed",))
        self.blocks = nnx.List([_Block(W, rngs) for _ in range(cfg.depth)])
        self.modulation = linear(W, 2 * W, rngs, f32, kernel_init=zeros)
        self.out = linear(W, width_out, rngs, f32, kernel_init=zeros)

    def velocity(self, x: jax.Array, t: jax.Array, state: jax.Array) -> jax.Array:
        """float32[N, C] of x_t: float32[N, C], t: float[N] and states float[N, D]."""
        time = time_features(t * _TIME, self.cfg.width)
        time = self.time_2(nnx.silu(self.time_1(time)))
        condition = nnx.silu(time + self.state(state.astype(jnp.float32)))
        y = self.embed(x)
        for block in self.blocks:
            y = block(y, condition)
        shift, scale = jnp.split(self.modulation(condition), 2, axis=-1)
        token = self.out(_norm(y) * (1 + scale) + shift)
        return (token - x) / jnp.maximum(1 - t, LEAST)[:, None]

    def losses(self, states: jax.Array, targets: jax.Array, key: jax.Array) -> jax.Array:
        """float32[...] loss of each visual token, a mean over `draws`.

        Args:
            states: float[..., D]; targets: float[..., C].
            key: for noise, timesteps and dropped states.
        """
        cfg, lead = self.cfg, targets.shape[:-1]
        keys = jax.random.split(key, 3)
        repeat = lambda x: jnp.tile(x.reshape(-1, x.shape[-1]), (cfg.draws, 1))  # noqa: E731
        x = repeat(jax.lax.stop_gradient(targets.astype(jnp.float32)) * self.scale)
        noise = jax.random.normal(keys[0], x.shape)
        t = nnx.sigmoid(jax.random.normal(keys[1], x.shape[:1]))
        dropped = jax.random.uniform(keys[2], x.shape[:1]) < cfg.drop_state
        states = self.without(repeat(states), dropped)
        at = t[:, None]
        found = self.velocity((1 - at) * noise + at * x, t, states)
        error = jnp.square(found - (x - noise)).mean(-1)
        return error.reshape(cfg.draws, -1).mean(0).reshape(lead)

    def without(self, states: jax.Array, dropped: jax.Array) -> jax.Array:
        """float[N, D] states, the learned one where bool[N] says so."""
        return jnp.where(dropped[:, None], self.null[...].astype(states.dtype), states)

    def sample(self, states: jax.Array, keys: jax.Array) -> jax.Array:
        """float32[N, C] visual tokens, one for each of the states float[N, D].

        Args:
            keys: keys[N], one for each; a token depends on its own state and key only.
        """
        cfg, N = self.cfg, len(states)
        draw = lambda key: jax.random.normal(key, (self.channels,))  # noqa: E731
        noise = cfg.temperature * jax.vmap(draw)(keys)
        guided = cfg.guidance != 1
        if guided:
            states = jnp.concatenate([states, self.without(states, jnp.ones(N, bool))])

        def step(n, x):
            t = jnp.full(len(states), n / cfg.steps, jnp.float32)
            v = self.velocity(jnp.concatenate([x, x]) if guided else x, t, states)
            if guided:
                given, null = jnp.split(v, 2)
                v = null + cfg.guidance * (given - null)
            return x + v / cfg.steps

        return jax.lax.fori_loop(0, cfg.steps, step, noise) / self.scale
