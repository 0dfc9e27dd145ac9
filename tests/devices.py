"""Virtual devices: they have to be asked for before JAX starts, so for a process of their own."""

import os


def virtual(count: int) -> dict[str, str]:
    """What to put into the environment of a process that is to see so many CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags.strip()}
