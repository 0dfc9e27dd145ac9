"""What a compiled program sends between devices, read from the text of its optimized HLO.

The cost analysis of XLA counts the body of a loop once. Here every instruction counts as often as
the loops around it run. The pieces into which the TPU compiler cuts an asynchronous collective
(start, updates inside other fusions, done) share a channel and count once.
"""

import dataclasses
import math
import re
from collections import defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
          "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}  # fmt: skip
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)")


@dataclasses.dataclass
class Instruction:
    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str
    root: bool


@dataclasses.dataclass
class Traffic:
    """Per device and step.

    Attributes:
        size: kind -> bytes of the gathered, reduced or moved tensors.
        wire: kind -> bytes that a device sends, if done in rings: (n - 1) / n of the size for
            all-gather, reduce-scatter and all-to-all, twice that for all-reduce, all of it for
            collective-permute.
        count: kind -> how often.
        unknown_loops: loops with collectives whose number of iterations isn't in the program.
    """

    size: dict[str, float]
    wire: dict[str, float]
    count: dict[str, int]
    unknown_loops: int = 0

    @property
    def total_wire(self) -> float:
        return sum(self.wire.values())


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(computation -> its instructions, name of the entry)."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            one = _instruction(found)
            if one:
                current.append(one)
    return computations, entry


def _instruction(found) -> Instruction | None:
    text = found[3]
    if text.startswith("("):
        end = _closing(text)
        shape, rest = text[: end + 1], text[end + 2 :]
    else:
        shape, _, rest = text.partition(" ")
    op, mark, rest = rest.partition("(")
    if not mark:
        return None
    arguments, _, attributes = rest.partition(")")
    operands = re.findall(r"%([\w.\-]+)", arguments)
    if op == "constant":
        operands = [arguments]
    return Instruction(found[2], shape, op, operands, attributes, bool(found[1]))


def _closing(text: str) -> int:
    """Index of the bracket that closes the one at the start of the text."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return i
    return len(text)


def sizes(shape: str) -> list[float]:
    """Bytes of every array in the text of a shape."""
    found = re.findall(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\]", shape)
    return [
        _BYTES.get(kind, 1 if kind.startswith("f8") else 0)
        * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in found
    ]


def group_size(attributes: str, devices: int) -> int:
    """Number of devices in each group of a collective."""
    groups = attributes.partition("replica_groups=")[2]
    if groups.startswith("mesh["):
        mesh = dict(re.findall(r"'([\w.]+)'=(\d+)", groups.partition("]")[0]))
        axes = groups.partition("{")[2].partition("}")[0]
        size = 1
        for name, part in re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", axes):
            size *= int(part or mesh[name])
        return size
    listed = re.match(r"\{\{([\d,]*)\}", groups)
    if listed:
        return len(listed[1].split(","))
    iota = re.match(r"\[(\d+),(\d+)\]", groups)
    return int(iota[2]) if iota else devices


def traffic(text: str, devices: int) -> Traffic:
    """Collectives of an optimized module (`Compiled.as_text()`) for this many devices."""
    computations, entry = parse(text)
    total = Traffic(defaultdict(float), defaultdict(float), defaultdict(int))
    seen, unknown = set(), set()

    def walk(name: str, times: int, loop: str, sure: bool) -> None:
        for one in computations.get(name, ()):
            kind = one.op.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=(\d+)", one.rest)
                key = (channel[1] if channel else one.name, kind, loop)
                if key not in seen:
                    seen.add(key)
                    _count(total, one, kind, times, devices)
                    if not sure:
                        unknown.add(loop)
            if one.op == "while":
                body = re.search(r"body=%?([\w.\-]+)", one.rest)[1]
                trips = turns(computations, name, one)
                walk(body, times * (1 if trips is None else trips), body, trips is not None)
            elif one.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
                names = branches[1] if branches else " ".join(
                    re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", one.rest)
                )  # fmt: skip
                for branch in re.findall(r"%?([\w.\-]+)", names):
                    walk(branch, times, loop, sure)
            elif kind not in KINDS:
                for group in _CALLED.findall(one.rest):
                    for called in re.findall(r"%?([\w.\-]+)", group):
                        walk(called, times, loop, sure)

    walk(entry, 1, entry, True)
    total.unknown_loops = len(unknown)
    return total


def _count(total: Traffic, one: Instruction, kind: str, times: int, devices: int) -> None:
    n = group_size(one.rest, devices)
    arrays = sizes(one.shape)
    if one.op.endswith("-start") and kind != "all-reduce":  # (inputs, outputs, …)
        arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
    size = sum(arrays) * times
    if kind == "reduce-scatter":
        size *= n
    if n == 1 and kind != "collective-permute":
        return
    share = {"collective-permute": 1.0, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
    total.size[kind] += size
    total.wire[kind] += size * share
    total.count[kind] += times


def turns(computations, where: str, loop: Instruction) -> int | None:
    """How often a while loop runs, from what XLA knows or from its counter; None if it varies."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = computations.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], [])
    body = computations.get(re.search(r"body=%?([\w.\-]+)", loop.rest)[1], [])
    names = {i.name: i for i in condition}
    root = next((i for i in condition if i.root), None)
    test = root
    if root is not None and root.op == "fusion":
        inner = computations.get(re.search(r"calls=%?([\w.\-]+)", root.rest)[1], [])
        test = next((i for i in inner if i.op == "compare"), None)
        order = [i for i in inner if i.op == "parameter"]
        parameters = dict(zip((i.name for i in order), root.operands, strict=False))
        names |= {i.name: i for i in inner}
        names |= {p: names[o] for p, o in parameters.items() if o in names}
    if test is None or test.op != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = (names.get(o) for o in test.operands)
    if counter is None or bound is None or bound.op != "constant":
        return None
    place = re.search(r"index=(\d+)", counter.rest)
    if counter.op != "get-tuple-element" or place is None:
        return None
    place = int(place[1])
    outer = {i.name: i for i in computations[where]}
    start = _constant(outer, _element(outer, loop.operands[0], place)) or 0
    inside = {i.name: i for i in body}
    end = next((i for i in body if i.root), None)
    step = 1
    if end is not None and end.op == "tuple" and len(end.operands) > place:
        step = _step(computations, inside, inside.get(end.operands[place])) or 1
    return max(math.ceil((int(bound.operands[0]) - start) / step), 0)


def _element(names, name: str, place: int) -> str | None:
    one = names.get(name)
    if one is not None and one.op == "tuple" and len(one.operands) > place:
        return one.operands[place]
    return None


def _constant(names, name: str | None) -> int | None:
    one = names.get(name)
    while one is not None and one.op in ("copy", "bitcast"):
        one = names.get(one.operands[0])
    if one is not None and one.op == "constant" and one.operands[0].lstrip("-").isdigit():
        return int(one.operands[0])
    return None


def _step(computations, names, one: Instruction | None) -> int | None:
    """What is added to the counter in each iteration."""
    while one is not None and one.op in ("copy", "bitcast"):
        one = names.get(one.operands[0])
    if one is None:
        return None
    if one.op == "fusion":
        inner = computations.get(re.search(r"calls=%?([\w.\-]+)", one.rest)[1], [])
        names, one = {i.name: i for i in inner}, next((i for i in inner if i.root), None)
    if one is None or one.op != "add":
        return None
    found = [_constant(names, o) for o in one.operands]
    return next((c for c in found if c), None)
