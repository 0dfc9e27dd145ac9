"""Vision heads alone, on the quick start's visual tokens: what each kind learns in two minutes.

    metamorph quickstart                                  # or its first step, which fills the cache
    python benchmarks/vision_head.py [--workdir quickstart] [--seeds 3] [--kinds mlp,velocity,flow]

A small causal transformer stands in for the language model: it reads a colour and a shape, then the
visual tokens of an image, and the head predicts the next one. 2,700 training images once, of pairs
of colour and shape that are not held out.

    mlp        regresses the next visual token
    velocity   flow matching whose network predicts the velocity
    flow       ours: the network predicts the visual token, from which the velocity follows

Eight images are sampled for each of the 24 pairs (temperature 0.7, guidance 1.5). A linear probe
reads their colour and shape. `near` is the mean cosine of a sample's tokens and those of the real
image that is nearest, and `spread` the standard deviation of the samples of a pair over that of the
real images of a pair: 0 where all are the same, 1 where they differ as real images do.
"""

import argparse
import json
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
KINDS = ("mlp", "velocity", "flow")
WIDTH, DEPTH, HEADS, HEAD_WIDTH = 192, 4, 6, 512
IMAGES, STEPS, RATE = 6, 450, 1e-3
SAMPLES, TEMPERATURE, GUIDANCE = 8, 0.7, 1.5


def load(workdir: pathlib.Path):
    """(float32[N, P, C] visual tokens of the training images, colours int[N], shapes int[N])."""
    from metamorph_jax.quickstart import data as qdata
    from metamorph_jax.quickstart.evaluate import cached_tokens
    from metamorph_jax.quickstart.run import QuickStart

    start = QuickStart(workdir, **json.loads((workdir / QuickStart.file).read_text()))
    numbers, _, color, shape = qdata.labelled_images(start.files, "train")
    return cached_tokens(start.cache, start.files, numbers), color, shape


def make_model(kind: str, tokens: int, channels: int, seed: int):
    """A module with `loss(x, color, shape, key)` and `sample(color, shape, key)`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from metamorph_jax.models.heads.visual_flow import LEAST, FlowConfig, FlowHead
    from metamorph_jax.models.heads.visual_regression import VisualHead

    class Velocity(FlowHead):
        """Its network's output is the velocity."""

        def velocity(self, x, t, state):
            left = jnp.maximum(1 - t, LEAST)[:, None]  # what `FlowHead` divides by
            return super().velocity(x, t, state) * left + x

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.fc1 = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            self.fc2 = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x, mask):
            x = x + self.attention(self.norm1(x), mask=mask)
            return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.read = nnx.Linear(channels, WIDTH, rngs=rngs)
            self.color, self.shape = (nnx.Embed(n, WIDTH, rngs=rngs) for n in (8, 3))
            self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, WIDTH)))
            self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            if kind == "mlp":
                self.head = VisualHead("mlp", WIDTH, channels, rngs=rngs)
            else:
                cfg = FlowConfig(HEAD_WIDTH, temperature=TEMPERATURE, guidance=GUIDANCE)
                cls = Velocity if kind == "velocity" else FlowHead
                self.head = cls(cfg, WIDTH, channels, channels**0.5, rngs=rngs)

        def states(self, x, color, shape):
            """float32[N, P, WIDTH] of which state p predicts x[:, p] from those before it."""
            first = (self.color(color) + self.shape(shape))[:, None]
            y = jnp.concatenate([first, self.read(x * channels**0.5)[:, :-1]], 1) + self.place[...]
            mask = jnp.tril(jnp.ones((tokens, tokens), bool))[None, None]
            for block in self.blocks:
                y = block(y, mask)
            return self.norm(y)

        def loss(self, x, color, shape, key):
            states = self.states(x, color, shape)
            if kind == "mlp":
                return 4 * (1 - (_unit(self.head(states)) * x).sum(-1)).mean()
            return self.head.losses(states, x, key).mean()

        def sample(self, color, shape, key):
            """float32[N, P, C] of unit norm."""
            N = len(color)

            def put(p, x):
                state = self.states(x, color, shape)[:, p]
                keys = jax.random.split(jax.random.fold_in(key, p), N)
                new = self.head(state) if kind == "mlp" else self.head.sample(state, keys)
                return x.at[:, p].set(_unit(new))

            return jax.lax.fori_loop(0, tokens, put, jnp.zeros((N, tokens, channels)))

    return Model(nnx.Rngs(seed))


def _unit(x):
    import jax.numpy as jnp

    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def measure(kind: str, seed: int, x, color, shape, steps: int) -> dict[str, float]:
    """Trains a head and measures its samples."""
    import jax
    import numpy as np
    import optax
    from flax import nnx

    from metamorph_jax.eval import probe
    from metamorph_jax.quickstart import data as qdata

    held = {(qdata.COLORS.index(c), qdata.SHAPES.index(s)) for c, s in qdata.HELD_OUT}
    drawn = np.array([pair not in held for pair in zip(color, shape, strict=True)])
    order = np.random.default_rng(seed).permutation(np.flatnonzero(drawn))
    model = make_model(kind, *x.shape[1:], seed)
    rate = optax.warmup_cosine_decay_schedule(0, RATE, 20, steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0))
    optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch, key):
        grads = nnx.grad(lambda m: m.loss(*batch, key))(model)
        optimizer.update(model, grads)

    clock = time.perf_counter()
    for n in range(steps):
        chosen = np.take(order, range(n * IMAGES, (n + 1) * IMAGES), mode="wrap")
        batch = x[chosen], color[chosen], shape[chosen]
        step(model, optimizer, batch, jax.random.key(n))
    pairs = [(c, s) for c in range(8) for s in range(3) for _ in range(SAMPLES)]
    asked = np.array(pairs, np.int32).T
    made = nnx.jit(lambda m: m.sample(*asked, jax.random.key(seed)))(model)
    made = np.asarray(made)

    reader = probe.fit_probe(x, [color, shape])
    read = reader.predict(made)
    right = (read[0] == asked[0]) & (read[1] == asked[1])
    new = np.array([pair in held for pair in pairs])
    flat, real = made.reshape(len(made), -1), x.reshape(len(x), -1)
    of_pair = [real[(color == c) & (shape == s)].std(0).mean() for c, s in sorted(set(pairs))]
    spread = flat.reshape(24, SAMPLES, -1).std(1).mean() / np.mean(of_pair)
    return {
        "color": float((read[0] == asked[0]).mean()),
        "shape": float((read[1] == asked[1]).mean()),
        "right": float(right[~new].mean()),
        "held_out": float(right[new].mean()),
        "near": float((flat @ real.T).max(1).mean() / x.shape[1]),
        "spread": float(spread),
        "seconds": time.perf_counter() - clock,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("quickstart"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--smoke", action="store_true", help="a few steps: shows that it runs")
    args = parser.parse_args()
    from metamorph_jax import platforms

    platforms.prepare()
    x, color, shape = load(args.workdir)
    print(f"{len(x)} images of {x.shape[1]} visual tokens; {platforms.cpu_name()}")
    found = {}
    for kind in args.kinds.split(","):
        for seed in range(args.seeds):
            one = measure(kind, seed, x, color, shape, 24 if args.smoke else STEPS)
            found.setdefault(kind, []).append(one)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in one.items())
            print(f"{kind:<9} seed {seed}  {shown}", flush=True)
    print(json.dumps({"kinds": found}))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
