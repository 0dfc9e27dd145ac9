"""Settings made before JAX starts: no search for a TPU that isn't there, and a compiler option.

`metamorph plan` needs libtpu for its compiler, and where libtpu is installed JAX tries to start it
in every command; without a TPU it fails with lines about hosts, and then JAX takes the CPU.
"""

import functools
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import sys

# Device files of accelerators' drivers. TPU VMs have /dev/accel* or, from v5e on, /dev/vfio/N.
_TPU = ("/dev/accel*", "/dev/vfio/[0-9]*")
_GPU = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd")

# An option of XLA's CPU compiler, whose library of small kernels runs the kernel's gradient of a
# convolution half as fast as Eigen does.
_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
_KNOWING_JAXLIB = range(10, 13)  # 0.10 to 0.12: JAX aborts at an option that it does not know


def prepare() -> None:
    """Chooses the platform and the compiler option; call it before a JAX backend starts."""
    leave_tpu_out()
    tune_cpu()


def tune_cpu() -> None:
    """Adds the CPU compiler's faster convolutions to XLA_FLAGS on hosts without an accelerator.

    Changes nothing where XLA_FLAGS has the option already, nor with versions of jaxlib that it
    was not tested with.
    """
    if "JAX_FORCE_TPU_INIT" in os.environ or any(map(glob.glob, _TPU + _GPU)):
        return
    version = re.match(r"0\.(\d+)\.", importlib.metadata.version("jaxlib"))
    if not version or int(version[1]) not in _KNOWING_JAXLIB:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if _CONVOLUTIONS.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_CONVOLUTIONS}".strip()


@functools.cache
def has_matrix_units() -> bool:
    """Whether this host's CPU multiplies bfloat16 matrices in hardware (Intel AMX)."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\bamx_bf16\b", flags) is not None


def cpu_name() -> str:
    """The CPU's name as its maker gives it, or the architecture where Linux doesn't tell."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    named = re.search(r"^model name\s*:\s*(.+)$", flags, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def leave_tpu_out() -> None:
    """Sets JAX_PLATFORMS=cpu where libtpu is installed but there is no accelerator.

    Changes nothing if JAX_PLATFORMS is set (also to ""), if a TPU or GPU has left a device file, or
    without libtpu.
    """
    if "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ:
        return
    if importlib.util.find_spec("libtpu") is None or any(map(glob.glob, _TPU + _GPU)):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # which has read the variable already
        sys.modules["jax"].config.update("jax_platforms", "cpu")
