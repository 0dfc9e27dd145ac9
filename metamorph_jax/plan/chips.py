"""Published figures of accelerators, and their descriptions for the compiler."""

import dataclasses
import math
import os
import re

from metamorph_jax import chips
from metamorph_jax.errors import TopologyError

GIB = chips.GiB


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them (half a chip of tpu7x).

    Attributes:
        flops: peak bfloat16 FLOP/s.
        hbm: bytes that the compiler gives to a program (less than what is sold).
        hbm_rate: bytes/s.
        ici_rate: bytes/s that a device sends over all its links to its neighbours; for GPUs NVLink.
        per_chip: devices on a chip.
    """

    name: str
    flops: float
    hbm: int
    hbm_rate: float
    ici_rate: float
    per_chip: int = 1


def _device(name: str) -> Chip:
    one, n = chips.CHIPS[name], chips.CHIPS[name].devices
    rates = (one.hbm_bandwidth / n, one.ici_bandwidth / n)
    return Chip(one.kinds[0], one.flops / n, one.usable_bytes // n, *rates, per_chip=n)


CHIPS = {name: _device(name) for name in ("v4", "v5e", "v5p", "v6e", "tpu7x", "h100")}

# Common names -> shape; v4 and v5p count cores, two of them on a chip.
SHAPES = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
            256: "16x16"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
            256: "16x16"},
    "v4": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8",
           512: "4x8x8"},
    "v5p": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8",
            512: "4x8x8"},
    "tpu7x": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"},
}  # fmt: skip

# XLA's description of an H100 SXM, for hosts that have none.
_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """`kind` is a key of `CHIPS`; `shape` as the compiler takes it; `slices` of it."""

    kind: str
    shape: str
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def devices(self) -> int:
        return math.prod(map(int, self.shape.split("x"))) * self.slices * self.chip.per_chip

    def __str__(self) -> str:
        return f"{f'{self.slices}x ' if self.slices > 1 else ''}{self.kind}:{self.shape}"


def parse(text: str, slices: int = 1) -> Topology:
    """`v5e:8x8`, `v5p:2x4x4`, `h100:8`, or a common name such as `v5p-64`.

    Raises:
        TopologyError: with what is known.
    """
    kind, mark, shape = re.match(r"([a-z0-9]*)([:-]?)(.*)", text.lower()).groups()
    if kind not in CHIPS:
        raise TopologyError(f"topology {text!r}: chips are {', '.join(CHIPS)}")
    if mark == "-" and kind in SHAPES:
        try:
            shape = SHAPES[kind][int(shape)]
        except (KeyError, ValueError):
            known = ", ".join(f"{kind}-{n}" for n in SHAPES[kind])
            raise TopologyError(f"topology {text!r}: known names are {known}") from None
    dims = 1 if kind == "h100" else 3 if kind in ("v4", "v5p", "tpu7x") else 2
    if not re.fullmatch(r"\d+" + r"x\d+" * (dims - 1), shape):
        example = {1: "h100:8", 2: "v5e:8x8", 3: "v5p:2x4x4"}[dims]
        raise TopologyError(f"topology {text!r}: the shape of {kind} is written as in {example}")
    return Topology(kind, shape, slices)


def prepare_environment() -> None:
    """Sets variables before JAX starts, so that it uses the CPU and asks no cloud service."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    jax.config.update("jax_platforms", "cpu")  # it may have been imported before


def devices(topology: Topology) -> list:
    """Descriptions of devices to compile for; none of them has to be present.

    Raises:
        TopologyError: the compiler for these chips isn't installed, or has no such shape.
    """
    from jax.experimental import topologies

    if topology.kind == "h100":
        options = dict(platform="cuda", topology=f"{topology.slices}x1x{topology.shape}",
                       target_config=_H100)  # fmt: skip
        name, need = "h100", "cuda12"
        if not _installed("jax_cuda12_plugin"):
            raise TopologyError(_missing("the compiler for GPUs (jax-cuda12-plugin)", need))
    else:
        options = dict(platform="tpu", num_slices=topology.slices)
        name, need = f"{topology.kind}:{topology.shape}", "plan"
        if topology.kind == "v4":
            options |= dict(
                chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), wrap=(False,) * 3
            )
        if math.prod(map(int, topology.shape.split("x"))) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)  # else a host has four chips
        if not _installed("libtpu"):
            raise TopologyError(_missing("the compiler for TPUs (libtpu)", need))
    try:
        return list(topologies.get_topology_desc(topology_name=name, **options).devices)
    except Exception as error:  # jax and its plugins raise all kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        known = ", ".join(SHAPES.get(topology.kind, {}).values())
        hint = f" Shapes that exist: {known}." if known else ""
        raise TopologyError(f"no topology {topology}: {first}.{hint}") from error


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _missing(what: str, extra: str) -> str:
    return f"{what} is not installed: pip install 'metamorph-jax[{extra}]'"
