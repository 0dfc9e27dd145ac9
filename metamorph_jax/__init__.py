"""Models that read and draw, in JAX: MetaMorph (visual-predictive instruction tuning).

import metamorph_jax

model = metamorph_jax.load("runs/vpit", decoder="runs/decoder")
reply = model.generate("What is in the image?", images=["cat.jpg"])
print(reply.text)
model.generate("Draw a red circle.").show()
"""

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    """`load`, imported when it is asked for: importing the package starts neither JAX nor torch."""
    if name == "load":
        from metamorph_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
