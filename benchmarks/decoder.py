"""The diffusion decoder against diffusers: UNet forward, training step, guided sampling.

    python benchmarks/decoder.py [--rounds 5] [--smoke]

UNet with channels 128/256/384/384 on 32x32x4 latents, batch 4, context 77x768, float32; sampling is
20 guided steps of DPM-Solver++ 2M for four images (so batch 8 in the network). The peer runs
beside ours, in turns, when torch and diffusers are installed. `limit_fraction`: FLOP/s of the
network's products and convolutions against the measured peak of a matrix product.
"""

import functools

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from metamorph_jax.convert.names import to_torch_dict
from metamorph_jax.models.diffusion import samplers
from metamorph_jax.models.diffusion.decoder import guided, zeros_like
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig
from metamorph_jax.types import Conditioning

STEPS, SCALE = 20, 7.5


def network_flops(cfg: UNetConfig, batch: int, tokens: int) -> float:
    """FLOPs of one forward pass as XLA counts them before optimisation; nearly all are products.

    The attention over pixels runs in a loop, which XLA counts once, so about a tenth is missing.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: UNet(cfg, nnx.Rngs(0))))
    side = cfg.sample_size
    shapes = (
        jax.ShapeDtypeStruct((batch, side, side, cfg.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        Conditioning(jax.ShapeDtypeStruct((batch, tokens, cfg.cross_attention_dim), jnp.float32)),
    )
    lowered = jax.jit(lambda s, *a: nnx.merge(graph, s)(*a)).lower(state, *shapes)
    return lowered.cost_analysis()["flops"]


class Ours:
    def __init__(self, cfg: UNetConfig, x, t, context, noise):
        self.graph, state = nnx.split(UNet(cfg, nnx.Rngs(0)))
        # Some layers start at zero; shaken, all of them count in the comparison with the peer.
        keys = iter(jax.random.split(jax.random.key(0), 1000))
        shake = lambda p: p + 0.02 * jax.random.normal(next(keys), p.shape)  # noqa: E731
        self.state = jax.tree.map(shake, state)
        self.inputs = x, t, Conditioning(context)
        self.noise = noise
        self.optimizer = optax.adamw(1e-4)
        self.moments = self.optimizer.init(self.state)

    @functools.cached_property
    def _forward(self):
        return jax.jit(lambda s, *a: nnx.merge(self.graph, s)(*a))

    def forward(self):
        return self._forward(self.state, *self.inputs)

    @functools.cached_property
    def _train(self):
        def loss(state, x, t, condition, noise):
            return jnp.square(nnx.merge(self.graph, state)(x, t, condition) - noise).mean()

        def step(state, moments, *batch):
            value, grads = jax.value_and_grad(loss)(state, *batch)
            updates, moments = self.optimizer.update(grads, moments, state)
            return optax.apply_updates(state, updates), moments, value

        return jax.jit(step, donate_argnums=(0, 1))

    def train(self):
        self.state, self.moments, value = self._train(
            self.state, self.moments, *self.inputs, self.noise
        )
        return value

    @functools.cached_property
    def _sample(self):
        def run(state, noise, condition):
            unet = nnx.merge(self.graph, state)
            null = zeros_like(condition)
            predict = guided(unet, condition, null, SCALE, unet.prepare)
            return samplers.DPMSolverPP().integrate(predict, noise, Schedule(), STEPS)

        return jax.jit(run)

    def sample(self):
        return self._sample(self.state, self.noise, self.inputs[2])


class Peer:
    """diffusers, eager, library defaults, with our weights."""

    def __init__(self, cfg: UNetConfig, weights, x, t, context, noise):
        import torch
        from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

        self.torch = torch
        self.unet = UNet2DConditionModel(
            sample_size=cfg.sample_size, in_channels=cfg.in_channels, out_channels=cfg.out_channels,
            block_out_channels=cfg.block_out_channels, layers_per_block=cfg.layers_per_block,
            down_block_types=cfg.down_block_types, up_block_types=cfg.up_block_types,
            cross_attention_dim=cfg.cross_attention_dim, attention_head_dim=cfg.num_heads,
            norm_num_groups=cfg.norm_num_groups,
        )  # fmt: skip
        self.unet.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()})
        nchw = lambda a: torch.from_numpy(np.moveaxis(np.asarray(a), -1, 1).copy())  # noqa: E731
        self.x, self.noise = nchw(x), nchw(noise)
        self.t = torch.from_numpy(np.array(t)).long()
        self.context = torch.from_numpy(np.array(context))
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4)
        self.scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )

    def forward(self):
        with self.torch.no_grad():
            return self.unet(self.x, self.t, self.context).sample.numpy()

    def train(self):
        self.optimizer.zero_grad()
        out = self.unet(self.x, self.t, self.context).sample
        loss = self.torch.nn.functional.mse_loss(out, self.noise)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def sample(self):
        torch = self.torch
        both = torch.cat([torch.zeros_like(self.context), self.context])
        x = self.noise
        self.scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                without, cond = self.unet(torch.cat([x, x]), t, both).sample.chunk(2)
                x = self.scheduler.step(without + SCALE * (cond - without), t, x).prev_sample
        return x.numpy()


def main():
    p = common.parser(__doc__.splitlines()[0], rounds=5)
    p.add_argument("--cases", default="forward,train,sample")
    args = p.parse_args()
    cfg = UNetConfig.tiny() if args.smoke else UNetConfig.small()
    rounds = 1 if args.smoke else args.rounds
    batch, tokens, side = (2 if args.smoke else 4), 77, cfg.sample_size
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    x, noise = (normal(batch, side, side, cfg.in_channels) for _ in range(2))
    context = normal(batch, tokens, cfg.cross_attention_dim)
    t = jnp.asarray(rng.integers(0, 1000, batch), jnp.int32)

    ours = Ours(cfg, x, t, context, noise)
    peer = None
    if common.has("torch", "diffusers") and not args.no_peer:
        weights = to_torch_dict(nnx.merge(ours.graph, ours.state))
        peer = Peer(cfg, weights, x, t, context, noise)
        difference = np.abs(np.moveaxis(peer.forward(), 1, -1) - np.asarray(ours.forward())).max()
        print(f"largest difference of the two forward passes: {difference:.2g}")
    peak = common.matmul_peak()
    print(f"matrix product peak: {peak / 1e9:.0f} GFLOP/s")
    flops = network_flops(cfg, batch, tokens)
    work = {"forward": flops, "train": 3 * flops, "sample": 2 * STEPS * flops}
    done = []
    for name in args.cases.split(","):
        runs = {"ours": getattr(ours, name)}
        if peer:
            runs["peer"] = getattr(peer, name)
        turns = dict(rounds=rounds, warmup=3) if name != "sample" else dict(rounds=min(rounds, 3))
        times = common.interleaved(runs, **turns)
        fraction = work[name] / times["ours"] / peak
        case = common.Case(f"unet {name} b{batch}", "s", times["ours"], times.get("peer"), fraction)
        done.append(common.emit(case))
    common.report(done)


if __name__ == "__main__":
    main()
