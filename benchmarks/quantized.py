"""Packed frozen layers (int8, NF4), one forward pass, against the same layers in float32.

    python benchmarks/quantized.py [--rounds 5] [--smoke]

The layers of a language model of 68 M parameters (width 512, 8 layers, MLP 2048; no token tables),
on one row of 16 positions, where reading and unpacking weights is what there is to do, and on one
of 512, where the products are. `peer` is float32. `limit_fraction`: share of the speed of a float32
matrix product in the same run. The line before the cases says what each kind of weights takes.
"""

import dataclasses

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.models.llm import llama
from metamorph_jax.nn import quantized
from metamorph_jax.nn.attention import row_mask

KINDS = ("float32", *quantized.METHODS)


def make_forward(cfg: llama.LlamaConfig, kind: str, length: int):
    """(a function of nothing that runs all layers, bytes of their kernels)."""
    llm = llama.Llama(cfg, rngs=nnx.Rngs(0))
    if kind != "float32":
        quantized.quantize(llm, kind, r"layers\..*")
    graph, weights = nnx.split(llm)
    embeds = jax.random.normal(jax.random.key(1), (1, length, cfg.width))
    positions = jnp.arange(length)[None]
    mask = row_mask(jnp.ones((1, length), jnp.int32))
    run = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x, positions, mask))
    kernels = nnx.state(llm, lambda path, _: "layers" in path and "kernel" in str(path[-1]))
    return lambda: run(weights, embeds), sum(x.nbytes for x in jax.tree.leaves(kernels))


def flops(cfg: llama.LlamaConfig, length: int) -> float:
    """Floating-point operations of all layers' matrix products, attention included."""
    heads = cfg.heads * cfg.head_dim
    weights = cfg.width * (2 * heads + 2 * cfg.kv_heads * cfg.head_dim + 3 * cfg.mlp_width)
    return cfg.layers * length * (2 * weights + 4 * length * heads)


def main():
    args = common.parser(__doc__.splitlines()[0]).parse_args()
    size, lengths = ("tiny", (4, 16)) if args.smoke else ("bench-68m", (16, 512))
    if args.smoke:
        args.rounds = 1
    cfg = dataclasses.replace(llama.SIZES[size], dtype="float32")
    peak = common.matmul_peak(256 if args.smoke else 2048)
    cases = []
    for length in lengths:
        made = {kind: make_forward(cfg, kind, length) for kind in KINDS}
        if not cases:
            sizes = (f"{kind} {nbytes / 2**20:.1f} MiB" for kind, (_, nbytes) in made.items())
            print("kernels: " + ", ".join(sizes))
        runs = {kind: run for kind, (run, _) in made.items()}
        plain = np.asarray(runs["float32"]())
        for kind in quantized.METHODS:
            error = np.abs(np.asarray(runs[kind]()) - plain).mean() / np.abs(plain).mean()
            if not error < 0.5:
                raise ValueError(f"{kind} is off by {error:.2f} of the float32 states")
        times = common.interleaved(runs, args.rounds)
        for kind in quantized.METHODS:
            fraction = flops(cfg, length) / times[kind] / peak
            case = common.Case(f"{kind}_{length}", "s", times[kind], times["float32"], fraction)
            cases.append(common.emit(case))
    common.report(cases)


if __name__ == "__main__":
    main()
