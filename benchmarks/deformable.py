"""Deformable sampling, forward and with its gradients, against torch's grid_sample on the host.

    python benchmarks/deformable.py [--only llm] [--rounds 3] [--smoke]   # seconds and memory
    python benchmarks/deformable.py --plan            # prints benchmarks/deformable_plan.json
    python benchmarks/deformable.py --make-plan       # compiles it again for a TPU, some minutes

The sizes are MM-Interleaved's: the ViT-Adapter's two kinds of attention (batch 4), the language
model's over images of three levels, and the UNet's at 64 x 64 queries. Both methods and the peer
take turns. Memory is what the peak of a fresh process grows by in its first run, so it includes
what the libraries allocate once.

The plan is of the two methods for one v5e chip in bfloat16, eight images of three levels. Nothing
can be timed without a chip. `cycles` are the compiler's own estimates, loops counted as often as
they run, at 1.5 GHz. They leave out the Pallas kernel of "dense", for which `kernel_cycles` has the
least that its multiplications and additions need, and the gathers and scatters themselves.
"""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from common import Case, emit, has, interleaved, parser, report

from metamorph_jax.nn import deformable

PLAN = pathlib.Path(__file__).parent / "deformable_plan.json"
METHODS = ("gather", "dense")
LEVELS = ((32, 32), (16, 16), (8, 8))
# name -> batch, queries, heads, width of a head, points, maps
CASES = {
    "adapter-injector": (4, 256, 16, 32, 4, LEVELS),
    "adapter-extractor": (4, 1344, 16, 32, 4, ((16, 16),)),
    "llm-256-1-image": (1, 256, 16, 64, 8, LEVELS),
    "llm-2048-1-image": (1, 2048, 16, 64, 8, LEVELS),
    "llm-256-4-images": (1, 256, 16, 64, 8, LEVELS * 4),
    "llm-2048-4-images": (1, 2048, 16, 64, 8, LEVELS * 4),
    "unet-4096": (1, 4096, 16, 64, 8, ((64, 64), *LEVELS)),
}
SMOKE = {"smoke": (2, 8, 2, 4, 2, ((4, 4), (2, 2)))}
VECTOR = 4 * 8 * 128  # operations per cycle of its vector units
CLOCK = 1.5e9  # of a v5e: 197 TFLOP/s are four units of 128 x 128 multiply-adds at this rate


def inputs(B, Q, h, d, P, shapes):
    """Value, locations around one point per query, weights that sum to 1, and a cotangent."""
    r = np.random.default_rng(0)
    S, n = sum(H * W for H, W in shapes), len(shapes)
    centre = r.random((B, Q, 1, 1, 1, 2))
    locations = (centre + r.uniform(-0.15, 0.15, (B, Q, h, n, P, 2))).astype(np.float32)
    weights = r.random((B, Q, h, n, P)).astype(np.float32)
    weights /= weights.sum((3, 4), keepdims=True)
    value, cotangent = (r.normal(size=s).astype(np.float32) for s in ((B, S, h, d), (B, Q, h * d)))
    return value, locations, weights, cotangent


def ours(method, shapes):
    """(forward, forward and gradients) as functions of the inputs."""
    run = lambda v, x, w: deformable.sample(v, shapes, x, w, method=method)  # noqa: E731

    def both(*args):
        out, back = jax.vjp(run, *args[:3])
        return out, *back(args[3])

    return jax.jit(lambda *args: run(*args[:3])), jax.jit(both)


def torch_sides(shapes):
    """The same two functions by torch: a grid_sample per level, and one weighted sum."""
    import torch

    def run(value, locations, weights):
        B, _, h, d = value.shape
        Q, sampled = locations.shape[1], []
        for i, level in enumerate(value.split([H * W for H, W in shapes], dim=1)):
            level = level.permute(0, 2, 3, 1).reshape(B * h, d, *shapes[i])
            grid = (2 * locations[:, :, :, i] - 1).transpose(1, 2).flatten(0, 1)
            sampled.append(torch.nn.functional.grid_sample(level, grid, align_corners=False))
        weights = weights.transpose(1, 2).reshape(B * h, 1, Q, -1)
        out = (torch.cat(sampled, -1) * weights).sum(-1)
        return out.reshape(B, h * d, Q).transpose(1, 2)

    def forward(*args):
        with torch.no_grad():
            return run(*map(torch.from_numpy, args[:3])).numpy()

    def both(*args):
        leaves = [torch.from_numpy(a).requires_grad_() for a in args[:3]]
        out = run(*leaves)
        found = torch.autograd.grad(out, leaves, torch.from_numpy(args[3]))
        return [x.detach().numpy() for x in (out, *found)]

    return forward, both


def check(name, found, wanted):
    """Outputs, and gradients of values and weights; those of locations jump at pixel centres."""
    for k in (0, 1, 3):
        worst = np.abs(np.asarray(found[k]) - wanted[k]).max() / np.abs(wanted[k]).max()
        if not worst < 1e-4:
            raise ValueError(f"{name}: array {k} differs from torch's by {worst:.1e}")


def bench(name, sizes, rounds, peer) -> list[Case]:
    args = inputs(*sizes)
    sides = {m: ours(m, sizes[-1]) for m in METHODS}
    if peer:
        sides["peer"] = torch_sides(sizes[-1])
        wanted = sides["peer"][1](*args)
        for m in METHODS:
            check(f"{name} {m}", sides[m][1](*args), wanted)
    on_device = [jnp.asarray(a) for a in args]
    cases = []
    for k, what in enumerate(("forward", "with gradients")):
        runs = {
            side: lambda f=both[k], a=args if side == "peer" else on_device: f(*a)
            for side, both in sides.items()
        }
        times = interleaved(runs, rounds)
        for m in METHODS:
            cases.append(emit(Case(f"{name} {m} {what}", "s", times[m], times.get("peer"))))
    grown = {side: peak_growth(name, side) for side in sides}
    for m in METHODS:
        title = f"{name} {m} with gradients"
        cases.append(emit(Case(title, "MiB of memory", grown[m], grown.get("peer"))))
    return cases


def peak_growth(name: str, side: str) -> float:
    """MiB by which the peak of a process grows in its first run with gradients."""
    command = [sys.executable, __file__, "--memory-of", side, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return max(float(done.stdout.split()[-1]), 2**-8)  # a page: a toy size may fit what is there


def measure_memory(side, sizes) -> float:
    args = inputs(*sizes)
    both = torch_sides(sizes[-1])[1] if side == "peer" else ours(side, sizes[-1])[1]
    if side != "peer":
        both = both.lower(*args).compile()
        args = [jnp.asarray(a) for a in args]
    before = peak_rss()
    jax.block_until_ready(both(*args))
    return peak_rss() - before


def peak_rss() -> float:
    """MiB of this process. (getrusage's peak includes that of the process that started it.)"""
    return (
        int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
    )


def cycles(program: str, times: int) -> int:
    """The TPU compiler's estimate for a program's text, bodies of loops `times` times."""
    parts, name, entry = {}, None, None
    for line in program.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name = start[2]
            parts[name] = []
            entry = name if start[1] else entry
        elif name:
            parts[name].append(line)

    def total(name):
        found = 0
        for line in parts[name]:
            if " while(" in line:
                found += times * total(re.search(r"body=%?([\w.\-]+)", line)[1])
            elif one := re.search(r'"estimated_cycles":"?(\d+)', line):
                # An operation without an estimate has the largest number there is.
                found += int(one[1]) if int(one[1]) < 2**40 else 0
        return found

    return total(entry)


def plan_of(method: str, queries: int, gradients: bool, images=8) -> dict:
    """What the compiler says of one program for a v5e chip."""
    from metamorph_jax import sharding
    from metamorph_jax.plan import chips

    shapes, (h, d, P) = LEVELS * images, (16, 64, 8)
    mesh = sharding.make_mesh(devices=chips.devices(chips.parse("v5e:1x1"))[:1])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    struct = lambda s, t: jax.ShapeDtypeStruct(s, t, sharding=where)  # noqa: E731
    points = (1, queries, h, len(shapes), P)
    value = (1, sum(H * W for H, W in shapes), h, d)
    args = [struct(value, jnp.bfloat16), struct((*points, 2), jnp.float32),
            struct(points, jnp.float32), struct((1, queries, h * d), jnp.bfloat16)]  # fmt: skip
    with jax.set_mesh(mesh):
        chunk = deformable.chunk_size(value, queries, shapes, P, method)
        compiled = ours(method, shapes)[gradients].lower(*args).compile()
        work = deformable.work("", value, queries, shapes, P, method)
    memory = compiled.memory_analysis()
    estimate = cycles(compiled.as_text(), -(-queries // chunk))
    passes = 3 if gradients else 1
    # Each point and pixel: 2 for the coefficients; with gradients those again, and 4.
    operations = (8 if gradients else 2) * P * value[1] * h * queries
    kernel = operations // VECTOR if method == "dense" else 0
    return {
        "method": method,
        "queries": queries,
        "gradients": gradients,
        "images": images,
        "chunk": chunk,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "model_flops": passes * work.forward,
        "computed_flops": passes * (work.forward + work.recomputed / 3),
        "cycles": estimate,
        "kernel_cycles": kernel,
        "milliseconds": 1e3 * (estimate + kernel) / CLOCK,
    }


def make_plan() -> None:
    """Compiles all; the file has what is finished."""
    found = []
    for method in ("dense", "gather"):
        for queries in (2048, 4096):
            for gradients in (False, True):
                found.append(plan_of(method, queries, gradients))
                PLAN.write_text(json.dumps(found, indent=1) + "\n")
                print(json.dumps(found[-1]), flush=True)


def plan_table(plans: list[dict]) -> str:
    lines = [
        "| method | queries | gradients | temporary, MiB | GFLOP | cycles, M | kernel's, M | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        lines.append(
            f"| {p['method']} | {p['queries']} | {'yes' if p['gradients'] else 'no'} | "
            f"{p['temporary_bytes'] / 2**20:.0f} | {p['computed_flops'] / 1e9:.1f} | "
            f"{p['cycles'] / 1e6:.1f} | {p['kernel_cycles'] / 1e6:.1f} | {p['milliseconds']:.1f} |"
        )
    return "\n".join(lines)


def main():
    p = parser(__doc__.splitlines()[0], rounds=3)
    p.add_argument("--only", default="", help="cases whose name starts so")
    p.add_argument("--plan", action="store_true", help="print the stored plan")
    p.add_argument("--make-plan", action="store_true", help="compile for a TPU (needs libtpu)")
    p.add_argument("--memory-of", choices=("peer", *METHODS), help="used by the benchmark itself")
    args = p.parse_args()
    if args.plan or args.make_plan:
        if args.make_plan:
            from metamorph_jax.plan import chips

            chips.prepare_environment()
            make_plan()
        print(plan_table(json.loads(PLAN.read_text())))
        return
    if args.memory_of:
        print(measure_memory(args.memory_of, (CASES | SMOKE)[args.only]))
        return
    chosen = SMOKE if args.smoke else {k: v for k, v in CASES.items() if k.startswith(args.only)}
    rounds, peer = 1 if args.smoke else args.rounds, not args.no_peer and has("torch")
    report([case for k, v in chosen.items() for case in bench(k, v, rounds, peer)])


if __name__ == "__main__":
    main()
