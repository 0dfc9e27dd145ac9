"""Plans of the reference configs for TPUs and GPUs, and how they compare with MaxText.

    python benchmarks/plan.py                  # tables from benchmarks/plans/*.json, seconds
    python benchmarks/plan.py --make NAME …    # compiles these again (1 to 5 minutes; SD 1.5: 20)
    python benchmarks/plan.py --make all

Needs the TPU compiler (`pip install 'metamorph-jax[plan]'`) to make plans, and nothing to print
them. "Expected" is the bound times the share of theirs that published runs on that chip reach
(`metamorph_jax/plan/cost.py`). MaxText's numbers are those of its own train step, compiled in the
same way (0.2.5 with JAX 0.12.0; Llama-3.1-8B alone, rows of 4096, float32 weights and moments, full
remat).
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks/plans"

VPIT, CONNECTOR, DECODER = (f"configs/metamorph/{n}.py" for n in ("vpit", "connector", "decoder"))
LLAVA, ANYRES = "configs/llava/stage2.py", "configs/llava/anyres.py"
INTERLEAVED = "configs/mm_interleaved/pretrain.py"
VOKENS, VOKEN_STORIES = (f"configs/minigpt5/{n}.py" for n in ("stage1", "stage2_vist"))
ALONE = "benchmarks/llm_only.py"
# name -> config, topology, rows per device, options to change
PLANS = {
    "llm8b-v5e-64": (ALONE, "v5e-64", 1, {}),
    "llm8b-v6e-64": (ALONE, "v6e-64", 4, {}),
    "llm8b-v5p-64": (ALONE, "v5p-64", 4, {}),
    "connector-8b-v5e-64": (f"{CONNECTOR}:8b", "v5e-64", 1, {}),
    "connector-8b-v6e-64": (f"{CONNECTOR}:8b", "v6e-64", 2, {}),
    "connector-8b-v5p-64": (f"{CONNECTOR}:8b", "v5p-64", 4, {}),
    "vpit-8b-v5e-64": (f"{VPIT}:8b", "v5e-64", 1, {}),
    "vpit-8b-v5e-256": (f"{VPIT}:8b", "v5e-256", 1, {}),
    "vpit-8b-v6e-64": (f"{VPIT}:8b", "v6e-64", 2, {}),
    "vpit-8b-v5p-64": (f"{VPIT}:8b", "v5p-64", 4, {}),
    "vpit-70b-v5p-256": (f"{VPIT}:70b", "v5p-256", 2, {}),
    "vpit-qwen3-1.7b-v5e-16": (f"{VPIT}:qwen3-1.7b", "v5e-16", 1, {}),
    "vpit-qwen3-1.7b-v6e-16": (f"{VPIT}:qwen3-1.7b", "v6e-16", 2, {}),
    "connector-qwen3-8b-v5e-64": (f"{CONNECTOR}:qwen3-8b", "v5e-64", 1, {}),
    "vpit-qwen3-8b-v5e-64": (f"{VPIT}:qwen3-8b", "v5e-64", 1, {}),
    "vpit-qwen3-8b-v6e-64": (f"{VPIT}:qwen3-8b", "v6e-64", 2, {}),
    "vpit-qwen3-8b-v5p-64": (f"{VPIT}:qwen3-8b", "v5p-64", 4, {}),
    "decoder-sd15-v5e-16": (f"{DECODER}:8b", "v5e-16", 132, {}),
    "connector-8b-h100-8": (f"{CONNECTOR}:8b", "h100:8", 1, {}),
    "vpit-8b-h100-8": (f"{VPIT}:8b", "h100:8", 1, {}),
    "llava-7b-v5e-64": (f"{LLAVA}:7b", "v5e-64", 1, {}),
    "llava-7b-v5p-64": (f"{LLAVA}:7b", "v5p-64", 2, {}),
    "llava-13b-v5e-64": (f"{LLAVA}:13b", "v5e-64", 1, {}),
    "llava-13b-v5p-64": (f"{LLAVA}:13b", "v5p-64", 2, {}),
    "llava-anyres-7b-v5e-64": (f"{ANYRES}:7b", "v5e-64", 1, {}),
    "llava-anyres-7b-v5p-64": (f"{ANYRES}:7b", "v5p-64", 2, {}),
    "mm-interleaved-7b-v5e-64": (f"{INTERLEAVED}:7b", "v5e-64", 1, {}),
    "mm-interleaved-13b-v5e-256": (f"{INTERLEAVED}:13b", "v5e-256", 1, {}),
    "mm-interleaved-13b-v5p-64": (f"{INTERLEAVED}:13b", "v5p-64", 4, {}),
    "mm-interleaved-smoke-v5e-8": (f"{INTERLEAVED}:smoke", "v5e-8", 1, {}),
    "minigpt5-stage1-7b-v5e-16": (f"{VOKENS}:7b", "v5e-16", 1, {}),
    "minigpt5-stage1-7b-v5p-16": (f"{VOKENS}:7b", "v5p-16", 2, {}),
    "minigpt5-stage1-7b-h100-1": (f"{VOKENS}:7b", "h100:1", 16, {"accumulate": 8}),
    "minigpt5-stage2-7b-v5e-16": (f"{VOKEN_STORIES}:7b", "v5e-16", 1, {}),
    "minigpt5-stage2-7b-v5p-16": (f"{VOKEN_STORIES}:7b", "v5p-16", 2, {}),
    "minigpt5-stage2-7b-h100-1": (f"{VOKEN_STORIES}:7b", "h100:1", 16, {"accumulate": 8}),
    "minigpt5-smoke-v5e-8": (f"{VOKENS}:smoke", "v5e-8", 1, {}),
    "vpit-smoke-v5e-8": (f"{VPIT}:smoke", "v5e-8", 2, {}),
    "decoder-smoke-v5e-4": (f"{DECODER}:smoke", "v5e-4", 2, {}),
}
# What the levers do to one of them.
_LEVERS = {
    "remat-none": {"model.remat": "none"},
    "remat-dots": {"model.remat": "dots"},
    "remat-attention": {"model.remat": "attention"},
    "remat-offload": {"model.remat": "offload"},
    "momentum-bfloat16": {"optim.momentum_dtype": "bfloat16"},
    "tensor-4": {"mesh.tensor": 4},
    "lora-nf4": {"model.lora": {"rank": 16}, "model.frozen_weights": "nf4"},
}
PLANS |= {
    f"vpit-8b-v5e-64-{lever}": (f"{VPIT}:8b", "v5e-64", 1, changes)
    for lever, changes in _LEVERS.items()
}
# `metamorph generate`, by how the language model's weights are kept.
_DECODING = {
    "decode-8b-v5e-1-int8": (f"{VPIT}:8b", "v5e:1x1", 4, {}),
    "decode-8b-v6e-1-bfloat16": (f"{VPIT}:8b", "v6e:1x1", 4, {}),
    "decode-8b-v6e-1-int8": (f"{VPIT}:8b", "v6e:1x1", 4, {}),
    "decode-mm-interleaved-13b-v5e-1-nf4": (f"{INTERLEAVED}:13b", "v5e:1x1", 1, {}),
    "decode-mm-interleaved-13b-v6e-1-int8": (f"{INTERLEAVED}:13b", "v6e:1x1", 1, {}),
    "decode-mm-interleaved-13b-v5e-4-bfloat16": (
        f"{INTERLEAVED}:13b", "v5e:2x2", 0.25, {"mesh.tensor": 4}
    ),
}  # fmt: skip
PLANS |= _DECODING
# MaxText without and with its tiled loss: (peak GiB, GB on the wire), and what we aim at.
PEERS = {
    "llm8b-v5e-64": ((5.59, 59.2), (4.81, 89.3), (4.9, 60.0)),
    "llm8b-v6e-64": ((11.74, 59.4), (9.19, 89.9), (9.3, 60.0)),
    "llm8b-v5p-64": ((16.20, 44.9), (11.40, 68.6), (11.5, 46.0)),
}


def make(name: str) -> dict:
    """Compiles one plan."""
    from metamorph_jax.config import load_config
    from metamorph_jax.plan import chips, command

    config, topology, rows, changes = PLANS[name]
    path, mark, arg = config.partition(":")
    loaded = load_config(f"{ROOT / path}{mark}{arg}", changes)
    decoding = {}
    if name in _DECODING:
        length = 2048 if config.startswith(INTERLEAVED) else 4096
        decoding = {"what": "generate", "length": length, "weights": name.rsplit("-", 1)[1]}
    return command.plan(loaded, chips.parse(topology), config, rows, **decoding)


def against_peers(plans: dict[str, dict]) -> str:
    lines = [
        "| GiB peak / GB on the wire | MaxText | tiled loss | goal | ours | reached |",
        "|---|---|---|---|---|---|",
    ]
    for name, (plain, tiled, goal) in PEERS.items():
        if name not in plans or "total_bytes" not in plans[name]:
            continue
        ours = plans[name]["peak_bytes"] / 2**30, plans[name]["total_wire_bytes"] / 1e9
        reached = [a <= b for a, b in zip(ours, goal, strict=True)]
        said = {(True, True): "both", (True, False): "memory", (False, True): "wire"}
        pair = lambda p: f"{p[0]:.2f} / {p[1]:.1f}"  # noqa: E731
        lines.append(f"| {name} | {pair(plain)} | {pair(tiled)} | {pair(goal)} | {pair(ours)} | "
                     f"{said.get(tuple(reached), 'neither')} |")  # fmt: skip
    return "\n".join(lines)


def overview(plans: dict[str, dict]) -> str:
    from metamorph_jax.plan import cost

    lines = [
        "| plan | rows per chip | memory, GiB | free | on the wire, GB | bound by | MFU at most | "
        "expected | per s and chip at most | expected | compiled, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, p in plans.items():
        if "total_bytes" not in p:
            lines.append(f"| {name} | {p['rows_per_device']:g} | out of memory | | | | | | | | |")
            continue
        tokens, likely = p["tokens_per_second_per_chip"], cost.expected(p)
        speed = f"{tokens:,.0f} tokens" if tokens else (
            f"{p['rows_per_second'] / p['devices']:.1f} images")  # fmt: skip
        mfu, rate = "-", "-"
        if likely:
            mfu, rate = f"{likely['mfu']:.0%}", f"{likely['tokens_per_second_per_chip']:,.0f}"
        lines.append(
            f"| {name} | {p['rows_per_device']:g} | {p['total_bytes'] / 2**30:.2f} of "
            f"{p['hbm_capacity_bytes'] / 2**30:.2f} | {p['free_share']:.0%} | "
            f"{p['total_wire_bytes'] / 1e9:.1f} | {p['bound_by']} | {p['mfu_bound']:.0%} | "
            f"{mfu} | {speed} | {rate} | {p['compile_seconds']:.0f} |"
        )
    return "\n".join(lines)


def runs(plans: dict[str, dict]) -> str:
    """Chip-hours of whole runs: as many rows as the config trains on, in the planned batch."""
    from metamorph_jax.config import load_config
    from metamorph_jax.plan import cost
    from metamorph_jax.train.config import resolve

    lines = [
        "| run | rows | steps | chip-hours at least | expected |",
        "|---|---|---|---|---|",
    ]
    for name, p in plans.items():
        if PLANS[name][3] or p["config"] == ALONE or not cost.published(p):
            continue  # a lever's run is that of its plan; nobody trains the language model alone
        rows = cost.rows_to_train(resolve(load_config(f"{ROOT / p['config']}")).cfg)
        run = cost.run(p, rows)
        hours = (f"{run[key]['chip_hours']:,.0f}" for key in ("bound", "expected"))
        lines.append(f"| {name} | {rows:,} | {run['steps']:,} | {' | '.join(hours)} |")
    return "\n".join(lines)


def stored() -> dict[str, dict]:
    files = {n: FOLDER / f"{n}.json" for n in PLANS}
    return {n: json.loads(f.read_text()) for n, f in files.items() if f.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make", nargs="+", metavar="NAME", default=[], help="plans, or all")
    args = parser.parse_args()
    names = list(PLANS) if args.make == ["all"] else args.make
    unknown = set(names) - set(PLANS)
    if unknown:
        parser.error(f"no plans {', '.join(sorted(unknown))}; known: {', '.join(PLANS)}")
    if names:
        from metamorph_jax.plan import chips, report

        chips.prepare_environment()
        for name in names:
            found = make(name)
            print(report.table(found), flush=True)
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    plans = stored()
    print("", overview(plans), runs(plans), against_peers(plans), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
