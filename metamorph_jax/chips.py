"""Published figures of accelerator chips: peaks, memory, links.

TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, the tables "key specifications". There the
interconnect is given as Gbit/s out of a chip (v5e: 1600) or, in later editions, as bytes per second
in both directions together (v5e: 400 GB/s); here it is the first, in bytes. GPUs: NVIDIA's data
sheets, SXM boards; NVLink likewise in one direction, FLOP/s without sparsity.
"""

import dataclasses

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: as in `--topology`: v5e, h100, …
        flops: peak bfloat16 FLOP/s.
        hbm_bytes: memory as sold.
        usable_bytes: of it for programs, as the compiler reports when they need more.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s that leave the chip over all its links together, one direction.
        ici_axes: dimensions of the torus that the links make (each has two links of the chip);
            0 where a switch connects all chips of a host.
        devices: number of JAX devices that one chip appears as.
        kinds: prefixes of JAX's `device_kind`.
    """

    name: str
    flops: float
    hbm_bytes: int
    usable_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_axes: int
    kinds: tuple[str, ...]
    devices: int = 1

    @property
    def flops_per_device(self) -> float:
        return self.flops / self.devices


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GiB, int(30.75 * GiB), 1200e9, 300e9, 3, ("TPU v4",)),
        Chip(
            "v5e", 197e12, 16 * GiB, int(15.75 * GiB), 819e9, 200e9, 2, ("TPU v5e", "TPU v5 lite")
        ),
        Chip("v5p", 459e12, 95 * GiB, int(95.74 * GiB), 2765e9, 600e9, 3, ("TPU v5p", "TPU v5")),
        Chip(
            "v6e",
            918e12,
            32 * GiB,
            int(31.25 * GiB),
            1638e9,
            400e9,
            2,
            ("TPU v6e", "TPU v6 lite", "TPU v6"),
        ),
        Chip(
            "tpu7x",
            2307e12,
            192 * GiB,
            2 * int(94.75 * GiB),
            7380e9,
            600e9,
            3,
            ("TPU7x", "TPU v7"),
            devices=2,
        ),
        Chip("a100", 312e12, 80 * GiB, 80 * GiB, 2039e9, 300e9, 0, ("NVIDIA A100",)),
        Chip("h100", 989e12, 80 * GiB, 84978434048, 3350e9, 450e9, 0, ("NVIDIA H100",)),
        Chip("h200", 989e12, 141 * 10**9, 141 * 10**9, 4800e9, 450e9, 0, ("NVIDIA H200",)),
    )
}


def find(kind: str) -> Chip | None:
    """The chip with this `device_kind` or name in the table; None if it is unknown."""
    if kind in CHIPS:
        return CHIPS[kind]
    # The longest prefix wins: "TPU v5 lite" is not "TPU v5".
    starts = {start: chip for chip in CHIPS.values() for start in chip.kinds}
    longest = max((s for s in starts if kind.startswith(s)), key=len, default=None)
    return None if longest is None else starts[longest]
