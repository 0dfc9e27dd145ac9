"""The recipe for runs in processes of their own: compiled without optimizations, as large programs
of tests are, and with a stage of a short backward pass."""

import jax

from metamorph_jax.recipes import mm_interleaved
from metamorph_jax.recipes.mm_interleaved import *  # noqa: F403

STAGES = mm_interleaved.STAGES | {"context": lambda cfg: r"context\..*"}
jax.config.update("jax_disable_most_optimizations", True)
