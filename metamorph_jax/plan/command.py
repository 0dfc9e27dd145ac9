"""`metamorph plan`: whether a step fits on other chips, and how fast it can be."""

import json
import pathlib
import sys

from metamorph_jax.data import option
from metamorph_jax.errors import TopologyError, UserError
from metamorph_jax.plan import chips
from metamorph_jax.sampling import WEIGHTS

DOES_NOT_FIT = 1


def add_arguments(parser) -> None:
    parser.description = (
        "Compiles the step that a config describes for other chips, with their real compiler, on "
        "this host, and prints its memory, its traffic and the least time it can take. Nothing is "
        "trained or downloaded. Beside each bound stands what published runs on that chip let one "
        "expect, below them the steps and chip-hours of the whole run. Takes one to five minutes "
        "and 2 to 6 GB of memory. Needs the compiler: pip install 'metamorph-jax[plan]' for TPUs, "
        "[cuda12] (4.6 GB) for GPUs. Exit code 1: it does not fit. Any option of the config can be "
        "changed: --config.a.b=value."
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:SIZE]", help="e.g. configs/metamorph/vpit.py:8b"
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="v4:2x2x4, v5e:8x8, v5p:2x4x4, v6e:8x8, tpu7x:2x2x4, h100:8; or a name such as v5p-64",
    )
    option.add_arguments(parser)
    parser.add_argument("--slices", type=int, default=1, help="number of slices of this shape")
    parser.add_argument(
        "--what", choices=("train", "generate"), default="train",
        help="generate: a step of `metamorph generate`, one token for each row, and its loading",
    )  # fmt: skip
    parser.add_argument(
        "--rows-per-device", type=float, metavar="N", help="replaces config.batch_size"
    )
    parser.add_argument(
        "--length", type=int, default=4096, help="for generate: positions in the cache"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="auto", help="for generate: form of the weights"
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON; - for the console")
    parser.add_argument("--hlo", metavar="FILE", help="write the text of the compiled program")
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the largest batch for each remat policy that leaves the share --free of the "
        "memory unused; takes some ten compilations",
    )
    parser.add_argument("--free", type=float, default=0.1, help="share of memory to leave unused")
    parser.add_argument(
        "--samples", type=int, metavar="N",
        help="plan a run over N samples instead of config.steps batches; a packed row holds "
        "config.optim.batch / config.batch_size of them, or one if optim.batch is not given",
    )  # fmt: skip
    parser.add_argument(
        "--price", type=float, metavar="DOLLARS",
        help="of an hour of one chip: prints what the run costs",
    )  # fmt: skip


def run(args) -> int:
    _check(args)
    chips.prepare_environment()  # before anything starts JAX
    config = option.load(args)
    try:
        topology = chips.parse(args.topology, args.slices)
        if args.slices > 1:
            config.mesh.slice = args.slices
        if args.search:
            found = search(args, config, topology)
        else:
            found = plan(config, topology, args.config, args.rows_per_device, args.what,
                         args.length, args.hlo, args.weights)  # fmt: skip
    except TopologyError as error:
        raise UserError(error) from error
    if found["fits"] and args.what == "train":
        found |= {"run": _run(config, found, args.samples, args.price)}
    if args.json == "-":
        print(json.dumps(found, indent=1))
    else:
        from metamorph_jax.plan import report

        print(report.table(found))
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["fits"] else DOES_NOT_FIT


def _check(args) -> None:
    for name in ("samples", "price"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be above 0, not {value}")
        if value is not None and args.what != "train":
            raise UserError(f"--{name} is for --what=train: generation has no steps to count")


def _run(config, found: dict, samples: int | None, price: float | None) -> dict:
    """Steps, chip-hours and cost of the whole run, see `cost.run`."""
    from metamorph_jax.plan import cost
    from metamorph_jax.train.config import resolve

    return cost.run(found, cost.rows_to_train(resolve(config).cfg, samples), price)


def plan(config, topology, name="", rows=None, what="train", length=4096, hlo=None,
         weights="auto") -> dict:  # fmt: skip
    """Compiles one program and returns its plan, see `report.make`.

    Args:
        config: as `metamorph train` takes it.
        topology: `chips.Topology`.
        name: of the config, for the table.
        rows: per device, None for the config's batch.
        what, length, weights: as on the command line.
        hlo: file for the compiled program's text, or None.
    """
    from metamorph_jax.plan import programs, report

    devices = chips.devices(topology)
    if what == "generate":
        program = programs.generate_step(config, devices, rows, length, weights)
    else:
        program = programs.train_step(config, devices, rows)
    compiled = programs.compile_program(program)
    if hlo and compiled.executable is not None:
        pathlib.Path(hlo).write_text(compiled.executable.as_text())
    return report.make(program, compiled, topology, name)


def search(args, config, topology) -> dict:
    """The plan with the highest bound on MFU among those that leave enough memory free.

    For each remat policy, starting with the one that keeps the most: one and two rows per device
    are compiled, the largest batch that should fit is extrapolated from them and compiled, and if
    it is too large, the search continues by bisection.
    """
    from metamorph_jax.models.llm.llama import REMAT

    tried, best = [], None

    def attempt(policy: str, rows: int) -> dict:
        if policy:
            config.model.remat = policy
        found = plan(config, topology, args.config, rows, args.what, args.length,
                     weights=args.weights)  # fmt: skip
        ok = found["fits"] and found["free_share"] >= args.free
        tried.append({"remat": policy, "rows_per_device": rows, "fits": ok,
                      "total_bytes": found.get("total_bytes"),
                      "mfu_bound": found.get("mfu_bound")})  # fmt: skip
        said = (f"{found['total_bytes'] / chips.GIB:.2f} GiB, MFU at most {found['mfu_bound']:.1%}"
                if "total_bytes" in found else "out of memory")  # fmt: skip
        print(f"remat {policy}, {rows} rows per device: {said}{'' if ok else ' (too much)'}",
              file=sys.stderr, flush=True)  # fmt: skip
        return found | {"enough": ok}

    policies = list(REMAT) if args.what == "train" and "remat" in config.model else [""]
    for policy in policies:
        one = attempt(policy, 1)
        candidates = [one]
        if one["enough"]:
            two = attempt(policy, 2)
            candidates.append(two)
            if two["enough"]:
                room = (1 - args.free) * one["hbm_capacity_bytes"] - one["total_bytes"]
                each = max(two["total_bytes"] - one["total_bytes"], 1)
                low, high = 2, 2 + int(room / each)  # fits; too large by extrapolation
                rows = most = high - 1
                while low < high - 1:
                    candidates.append(attempt(policy, rows))
                    low, high = (rows, high) if candidates[-1]["enough"] else (low, rows)
                    rows = high - 1 if high == most else (low + high) // 2
        for found in candidates:
            better = best is None or (found["enough"], found.get("mfu_bound", 0), found["rows"]) > (
                best["enough"], best.get("mfu_bound", 0), best["rows"])  # fmt: skip
            best = found if better else best
    best.pop("enough")
    if args.what == "train":
        remat = f"--config.model.remat={best['remat']} " if policies != [""] else ""
        best["use"] = f"{remat}--config.batch_size={best['rows']}"
    return best | {"search": tried}
