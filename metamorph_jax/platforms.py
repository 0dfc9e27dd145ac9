"""Keeps JAX from looking for a TPU where there is none.

`metamorph plan` needs libtpu for its compiler, and where libtpu is installed JAX tries to start it
in every command; without a TPU it fails with lines about hosts, and then JAX takes the CPU.
"""

import glob
import importlib.util
import os
import sys

# What the drivers of accelerators leave. TPU VMs have /dev/accel* or, from v5e on, /dev/vfio/N.
_TPU = ("/dev/accel*", "/dev/vfio/[0-9]*")
_GPU = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd")


def leave_tpu_out() -> None:
    """Sets JAX_PLATFORMS=cpu where libtpu is installed and no accelerator is there.

    Changes nothing if JAX_PLATFORMS is set (also to ""), if a TPU or GPU has left a device file, or
    without libtpu. To be called before a JAX backend starts.
    """
    if "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ:
        return
    if importlib.util.find_spec("libtpu") is None or any(map(glob.glob, _TPU + _GPU)):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # which has read the variable already
        sys.modules["jax"].config.update("jax_platforms", "cpu")
