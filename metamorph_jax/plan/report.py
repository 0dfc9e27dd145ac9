"""The plan as a table and as JSON: memory, traffic, and the least time that a step can take.

The roofline is a bound that no program can beat: arithmetic (recomputation included), memory and
links each run at their published peak, all at the same time. `cost` says what to expect beside it.
Memory traffic is a lower bound:
arguments read, results written, and gathered or reduced tensors and temporaries written and read
once. Bytes between slices count as if they went over the chips' own links.
"""

import math
import re
from importlib import metadata

import jax

from metamorph_jax.plan import cost, hlo
from metamorph_jax.plan.chips import GIB, Topology
from metamorph_jax.plan.programs import Compiled, Program


def make(program: Program, compiled: Compiled, topology: Topology, name="") -> dict:
    """The plan as one table of numbers, bytes and seconds per device and step."""
    plan = {"config": name, "topology": str(topology)} | _asked(program) | {
        "hbm_capacity_bytes": topology.chip.hbm,
        "compile_seconds": round(compiled.seconds, 1),
        "versions": {"jax": jax.__version__, **_compiler(topology)},
    }  # fmt: skip
    if compiled.error:
        return plan | {"fits": False, "out_of_memory": explain(compiled.error, plan)}
    sent = hlo.traffic(compiled.executable.as_text(), program.mesh.size)
    memory = _memory(program, compiled, topology)
    plan |= memory | _sent(sent) | _bounds(program, memory, sent, topology)
    return plan | {"expected": cost.expected(plan)}


def _asked(program: Program) -> dict:
    """What is planned: the run, its model and its arithmetic."""
    cfg, flops, devices = program.cfg, program.arithmetic, program.mesh.size
    generation = {
        "length": program.length, "weights": program.weights, "beside_bytes": program.beside,
        "loading_bytes": program.loading,
    }  # fmt: skip
    return {
        "devices": devices,
        "mesh": {axis: n for axis, n in program.mesh.shape.items() if n > 1},
        "what": "train" if program.training else "generate",
        "rows": program.rows,
        "rows_per_device": program.rows / devices,
        "accumulate": cfg.accumulate if program.training else 1,
        "remat": program.options.get("remat", "none"),
        "momentum_dtype": cfg.optim.momentum_dtype,
        "dtype": program.options.get("dtype", ""),
        **({} if program.training else generation),
        "parameters": {part: {"trained": a, "frozen": b} for part, (a, b) in program.parts.items()},
        "arguments_by_part": {
            group: bytes_per_device(tree) for group, tree in program.groups.items() if tree
        },
        "model_flops": flops.model,
        "flops_by_part": flops.by_part,
        "recomputed_flops": flops.recomputed,
    }


def _memory(program: Program, compiled: Compiled, topology: Topology) -> dict:
    """What a device holds."""
    memory = compiled.executable.memory_analysis()
    argument, output = memory.argument_size_in_bytes, memory.output_size_in_bytes
    temp = memory.temp_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0) or argument + temp + (
        output - memory.alias_size_in_bytes
    )  # fmt: skip
    total = max(peak + memory.generated_code_size_in_bytes + program.beside, program.loading)
    return {
        "fits": total <= topology.chip.hbm,
        "argument_bytes": argument,
        "temp_bytes": temp,
        "peak_bytes": peak,
        "output_bytes": output,
        "total_bytes": total,
        "free_share": 1 - total / topology.chip.hbm,
    }


def _sent(sent: hlo.Traffic) -> dict:
    """What devices send to each other."""
    return {
        "collective_bytes": {k: round(v) for k, v in sent.size.items()},
        "collective_count": dict(sent.count),
        "wire_bytes": {k: round(v) for k, v in sent.wire.items()},
        "total_wire_bytes": round(sent.total_wire),
        "loops_of_unknown_length": sent.unknown_loops,
    }


def _bounds(program: Program, memory: dict, sent: hlo.Traffic, topology: Topology) -> dict:
    """The roofline, and the speed that it allows."""
    chip, devices, flops = topology.chip, program.mesh.size, program.arithmetic
    moved = memory["argument_bytes"] + memory["output_bytes"]
    moved += 2 * (sum(sent.size.values()) + memory["temp_bytes"])
    terms = {
        "compute": (flops.model + flops.recomputed) / devices / chip.flops,
        "hbm": moved / chip.hbm_rate,
        "ici": sent.total_wire / chip.ici_rate,
    }
    step = max(terms.values())
    return {
        "hbm_traffic_bytes": moved,
        "roofline_seconds": {**terms, "step": step},
        "bound_by": max(terms, key=terms.get),
        "mfu_bound": flops.model / devices / chip.flops / step,
        "rows_per_second": program.rows / step,
        "tokens_per_second_per_chip": program.positions / step / devices * chip.per_chip,
    }


def _compiler(topology: Topology) -> dict[str, str]:
    package = "jax-cuda12-plugin" if topology.kind == "h100" else "libtpu"
    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}


def bytes_per_device(tree) -> int:
    leaves = [x for x in jax.tree.leaves(tree) if getattr(x, "sharding", None) is not None]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def explain(error: str, plan: dict) -> dict:
    """What takes the memory, and which options would help."""
    found = re.findall(r"Used ([\d.]+)([KMGT]) of|required for [^()]*\(([\d.]+)([KMGT])\)", error)
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    needed = max((float(a or c) * units[b or d] for a, b, c, d in found), default=0)
    largest = re.findall(r"Size: ([\d.]+[KMGT])\n\s*(?:Operator: op_name=\"([^\"]*)\")?[\s\S]*?"
                         r"Shape: (\S+)", error)  # fmt: skip
    advice = []
    arguments = plan["arguments_by_part"]
    state = sum(arguments.values())
    if state > 0.5 * plan["hbm_capacity_bytes"]:
        advice.append(f"weights and optimizer take {state / GIB:.1f} GiB on each device: put "
                      "more devices on mesh.fsdp")  # fmt: skip
        if arguments.get("moments") and plan["momentum_dtype"] == "float32":
            advice.append("config.optim.momentum_dtype=bfloat16 saves "
                          f"{arguments['moments'] / 4 / GIB:.1f} GiB")  # fmt: skip
    if plan["remat"] not in ("full", "offload"):
        advice.append(f"config.model.remat=full instead of {plan['remat']}: it keeps only the "
                      "inputs of layers")  # fmt: skip
    if plan["rows_per_device"] > 1:
        advice.append(f"fewer rows at a time: --config.accumulate={2 * plan['accumulate']}, or a "
                      "smaller config.batch_size")  # fmt: skip
    elif plan["what"] == "train":
        advice.append("split rows over mesh.context (or heads over mesh.tensor)")
    return {
        "needed_bytes": round(needed),
        "largest": [{"size": s, "op": op[-80:], "shape": shape} for s, op, shape in largest[:6]],
        "advice": advice,
        "message": error.splitlines()[0][:300],
    }


def table(plan: dict) -> str:
    """The plan as text."""
    gib = lambda b: f"{b / GIB:.2f} GiB"  # noqa: E731
    gb = lambda b: f"{b / 1e9:.2f} GB"  # noqa: E731
    mesh = ", ".join(f"{a}={n}" for a, n in plan["mesh"].items()) or "one device"
    rows = [
        ("program", f"{plan['what']} step of {plan['config']}"),
        ("devices", f"{plan['devices']} ({plan['topology']}), mesh {mesh}"),
        ("batch", f"{plan['rows']} rows, {plan['rows_per_device']:g} per device" + (
            f", in {plan['accumulate']} micro-batch(es); remat {plan['remat']}, first moment "
            f"{plan['momentum_dtype']}" if plan["what"] == "train" else "")),
    ]  # fmt: skip
    for part, n in plan["parameters"].items():
        kinds = [f"{n[k] / 1e6:,.2f} M {k}" for k in ("trained", "frozen") if n[k]]
        rows.append((f"  {part}", ", ".join(kinds)))
    rows.append(("arguments", ", ".join(
        f"{k} {gib(v)}" for k, v in plan["arguments_by_part"].items() if v > 2**20)))  # fmt: skip
    if "out_of_memory" in plan:
        why = plan["out_of_memory"]
        rows.append(("FITS", f"NO: needs {gib(why['needed_bytes'])} of "
                     f"{gib(plan['hbm_capacity_bytes'])} on each device"))  # fmt: skip
        rows += [("  takes", f"{x['size']} {x['shape']} {x['op']}") for x in why["largest"]]
        rows += [("  try", text) for text in why["advice"]]
        return _lines(rows)
    rows += [
        ("memory", f"arguments {gib(plan['argument_bytes'])}, temporaries "
         f"{gib(plan['temp_bytes'])}, "
         + (f"other parts {gib(plan['beside_bytes'])}, loading {gib(plan['loading_bytes'])}, "
            if plan.get("loading_bytes") else "") +
         f"peak with code {gib(plan['total_bytes'])} of "
         f"{gib(plan['hbm_capacity_bytes'])}"),
        ("FITS", f"{'yes' if plan['fits'] else 'NO'}, {plan['free_share']:.0%} free"),
        ("model FLOPs", f"{plan['model_flops'] / 1e12:,.1f} T a step ("
         + ", ".join(f"{k} {v / plan['model_flops']:.1%}" for k, v in plan["flops_by_part"].items())
         + f"); recomputed {plan['recomputed_flops'] / plan['model_flops']:.0%} on top"),
    ]  # fmt: skip
    for kind, size in plan["collective_bytes"].items():
        rows.append((f"  {kind}", f"{gb(size)} in {plan['collective_count'][kind]} calls, on the "
                     f"wire {gb(plan['wire_bytes'][kind])}"))  # fmt: skip
    seconds = plan["roofline_seconds"]
    rows += [
        ("on the wire", f"{gb(plan['total_wire_bytes'])} per device and step"),
        ("roofline", ", ".join(f"{k} {seconds[k]:.3f} s" for k in ("compute", "hbm", "ici"))
         + f": at least {seconds['step']:.3f} s a step, bound by {plan['bound_by']}"),
    ]  # fmt: skip
    rows += _speed(plan)
    if "run" in plan:
        rows += _run(plan["run"], plan["rows"])
    if "use" in plan:
        rows.append(("use", plan["use"]))
    rows.append(("compiled in", f"{plan['compile_seconds']:.0f} s"))
    return _lines(rows)


def _speed(plan: dict) -> list[tuple[str, str]]:
    """The bounds, each with what to expect where runs on this chip are published."""
    rates = [("MFU", "mfu_bound", "{:.1%}")]
    if plan["tokens_per_second_per_chip"]:
        rates.append(("tokens/s/chip", "tokens_per_second_per_chip", "{:,.0f}"))
    else:
        rates.append(("images/s", "rows_per_second", "{:,.0f}"))
    found = plan["expected"]
    rows = []
    for name, key, form in rates:
        likely = f", expected {form.format(plan[key] * found['fraction'])}" if found else ""
        rows.append((name, f"at most {form.format(plan[key])}{likely}"))
    return [*rows, ("expected is", f"{found['fraction']:g} of the bound, as measured with "
                    f"{found['run']} ({found['source']})" if found
                    else "unknown: no published run to compare with")]  # fmt: skip


def _run(run: dict, rows: int) -> list[tuple[str, str]]:
    """Steps, time and price of a whole run."""

    def spent(one: dict) -> str:
        price = f", ${one['cost']:,.0f}" if "cost" in one else ""
        return f"{one['hours']:,.1f} h, {one['chip_hours']:,.0f} chip-hours{price}"

    found = [
        ("run", f"{run['steps']:,} steps of {rows:,} rows on {run['chips']} chips"),
        ("  at least", spent(run["bound"])),
    ]
    if run["expected"]:
        found.append(("  expected", spent(run["expected"])))
    return found


def _lines(rows) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)
