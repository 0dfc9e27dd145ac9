"""Models that read and draw, in JAX: MetaMorph (visual-predictive instruction tuning)."""

__version__ = "0.1.0"
