"""Parity with the library that a checkpoint was made for: `metamorph convert --check SPEC`.

Both sides read the same folder or file (`oracles.py` has the other one, from the `oracle` extra),
get the same inputs, and are compared layer by layer (`compare.py`, and recipes for their systems):

    language models    hidden states, logits, logits of two samples packed into one row
    towers             hidden states, final norm, SigLIP's and CLIP's image vector
    text towers        hidden states, last state, pooled vector
    UNet               every block of one step; autoencoder: every block, moments, decoded image
    systems            their parts, and the whole where a library has it

A difference counts relative to the larger of 1 and the largest value of the reference, since hidden
states of trained models have single channels in the thousands. Two float32 copies must fit into
memory.
"""

import jax
import numpy as np
from flax import nnx

from metamorph_jax.convert import oracles
from metamorph_jax.convert.compare import Rows, oracle
from metamorph_jax.models import build

SEED = 0


def run(spec: str, *, tolerance: float = 1e-4, dtype: str = "float32") -> bool:
    """Compares a checkpoint on both sides and prints a table of differences.

    Args:
        spec: as configs name weights: "hf:OWNER/NAME", a folder (of diffusers, too), a GGUF or
            ONNX file, "pkg:NAME".
        tolerance: largest accepted relative difference.
        dtype: that our side computes in; the reference is float32.

    Returns:
        Whether every difference is within the tolerance (and finite).

    Raises:
        ImportError: without torch, transformers, diffusers or onnxruntime; says what to install.
        ValueError: if a spec has no other side; says why.
    """
    oracle()
    good = True
    for pair in oracles.pairs(spec):
        title = f"{spec}{pair.title}: {pair.family.name}"
        print(f"{title}, ours ({dtype}) against {pair.library}", flush=True)
        good &= report(compare(pair, dtype), tolerance)
    return good


def report(rows: Rows, tolerance: float) -> bool:
    """Prints one line per entry; whether all are within the tolerance."""
    good = True
    width = max(len(name) for name in rows)
    print(f"  {'':<{width}}  largest difference     of values up to    relative")
    for name, (ours, theirs) in rows.items():
        if ours.shape != theirs.shape:
            print(f"  {name:<{width}}  shape {ours.shape}, expected {theirs.shape}")
            good = False
            continue
        difference = np.abs(np.float64(ours) - np.float64(theirs)).max()
        scale = np.abs(np.float64(theirs)).max()
        relative = difference / max(1.0, scale)
        fine = bool(relative <= tolerance)  # a NaN is not
        mark = "" if fine else f"  > {tolerance:g}"
        print(f"  {name:<{width}}  {difference:18.3e}  {scale:18.3e}  {relative:10.3e}{mark}")
        good &= fine
    print("  equal within the tolerance" if good else f"  DIFFERENT: above {tolerance:g}")
    return good


def compare(pair: oracles.Pair, dtype: str = "float32") -> Rows:
    """Loads both sides of one model and runs them on the same inputs."""
    family, changes = pair.family, dict(pair.changes)
    if dtype != "float32":
        changes["dtype"] = dtype
    cfg = family.config_from_hf(pair.fields, **changes)
    ours = nnx.eval_shape(lambda: family.create(cfg, rngs=build.rngs(0)))
    family.load(ours, pair.tensors)
    theirs = pair.theirs()
    with jax.default_matmul_precision("highest"):
        return family.reference.compare(ours, theirs, np.random.default_rng(SEED))
