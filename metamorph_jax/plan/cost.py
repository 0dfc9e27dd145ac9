"""From a plan to a run: what to expect beside the bound, steps, chip-hours and their price.

A plan is a bound that no program reaches. `PUBLISHED` says which share of it others have measured:
their MFU over the bound that the roofline of `report` gives for that run, in which a chip computes
all the time, what is computed again in the backward pass included:

    fraction = MFU * (1 + recomputed FLOPs / model FLOPs)

All are dense language models of 7 to 70 billion parameters in bfloat16. Older MaxText counts
attention as if it were not causal; where that is so, the MFU is corrected (by 2 to 11 %). Other
models on the same chip differ by a tenth of the bound and more, so there is one digit only.
"""

import dataclasses
import math

from metamorph_jax.plan import chips


@dataclasses.dataclass(frozen=True)
class Published:
    """How close runs on a chip have come to their bound.

    Attributes:
        fraction: measured over bound, 0 to 1.
        run: what was run, and how the fraction follows.
        source: where it was published.
    """

    fraction: float
    run: str
    source: str


_MAXTEXT = "github.com/AI-Hypercomputer/maxtext, MaxText/configs"
_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training"

# Chip -> what is known of it; a chip without a published run has no entry.
PUBLISHED = {
    "v4": Published(
        0.7,
        "22B on 64 chips, rows of 2048: MFU 56.7 %, 55 % with causal attention, everything "
        "recomputed (a third on top)",
        f"{_MAXTEXT}/v4/README.md and 22b.sh",
    ),
    "v5e": Published(
        0.8,
        "16B on 256 chips, rows of 2048: MFU 61.1 %, 59 % with causal attention, everything "
        "recomputed (a third on top)",
        f"{_MAXTEXT}/v5e/README.md and 16b.sh",
    ),
    "v5p": Published(
        0.7,
        "32B on 64 chips, rows of 2048: MFU 71.5 %, 70 % with causal attention, nothing recomputed",
        f"{_MAXTEXT}/v5p/README.md and 32b.sh",
    ),
    "v6e": Published(
        0.5,
        "Llama 3.1 8B on 256 chips, rows of 8192: 7,207 tokens/s/chip, MFU 40 % with causal "
        "attention, two thirds of the MLP recomputed (a fifth on top)",
        "maxtext.readthedocs.io/en/maxtext-v0.2.2/reference/models/tiering.html",
    ),
    "tpu7x": Published(
        0.6,
        "Llama 3.1 70B on 64 chips, rows of 8192: 1,207 TFLOP/s/chip, MFU 52 %, two thirds of "
        "the MLP and one projection recomputed (a fifth on top)",
        f"{_RECIPES}/ironwood/README.md and llama3.1-70b/8k-bf16-tpu7x-4x4x4",
    ),
    "h100": Published(
        0.4,
        "Llama 2 7B, rows of 4096, nothing recomputed: 492 TFLOP/s on 8 GPUs, 375 on 128, MFU 46 % "
        "and 35 % with causal attention",
        f"{_MAXTEXT}/a3/llama_2_7b/README.md and 1vm.sh",
    ),
}


def published(plan: dict) -> Published | None:
    """The runs that a plan may be compared with: of training on text, bound by arithmetic.

    None where there are none: of decoding, of training on images alone, of steps that memory or
    links bound; and for a step that doesn't fit.
    """
    alike = plan["what"] == "train" and plan.get("bound_by") == "compute"
    return PUBLISHED.get(_kind(plan)) if alike and plan["tokens_per_second_per_chip"] else None


def expected(plan: dict) -> dict | None:
    """The plan's bounds times the fraction that published runs reach, with its source.

    Args:
        plan: of a step that fits, as `report.make` gives it.

    Returns:
        MFU, seconds of a step, rows and tokens per second; None without a published run.
    """
    found = published(plan)
    if found is None:
        return None
    rates = ("mfu_bound", "rows_per_second", "tokens_per_second_per_chip")
    return {
        **dataclasses.asdict(found),
        "step_seconds": plan["roofline_seconds"]["step"] / found.fraction,
        **{key.removesuffix("_bound"): plan[key] * found.fraction for key in rates},
    }


def rows_to_train(cfg, samples: int | None = None) -> float:
    """Rows of a run: those of the config, or as many as hold this number of samples.

    Args:
        cfg: `TrainConfig`.
        samples: to be seen once; None: `steps` batches of the config, whatever they hold.
    """
    return cfg.steps * cfg.batch_size if samples is None else samples / samples_per_row(cfg)


def samples_per_row(cfg) -> float:
    """Samples packed into a row, as `optim.batch` (samples of a batch) says; 1 if it doesn't."""
    return (cfg.optim.batch or cfg.batch_size) / cfg.batch_size


def run(plan: dict, rows: float, price: float | None = None) -> dict:
    """Steps and chip-hours of a run; start-up, evaluations and checkpoints come on top.

    Args:
        plan: of a training step that fits.
        rows: to be trained on, with the plan's number of rows a step.
        price: of an hour of one chip, in dollars.

    Returns:
        steps, chips, and for "bound" and "expected" hours, chip_hours and (with a price) cost.
        "expected" is None without a published run.
    """
    steps, n = math.ceil(rows / plan["rows"]), _chips(plan)

    def spent(seconds: float) -> dict:
        hours = steps * seconds / 3600
        cost = {} if price is None else {"cost": hours * n * price}
        return {"hours": hours, "chip_hours": hours * n, **cost}

    probable = expected(plan)
    return {
        "steps": steps,
        "chips": n,
        "bound": spent(plan["roofline_seconds"]["step"]),
        "expected": spent(probable["step_seconds"]) if probable else None,
    }


def _kind(plan: dict) -> str:
    """v5e of `2x v5e:8x8`."""
    return plan["topology"].split()[-1].partition(":")[0]


def _chips(plan: dict) -> int:
    return plan["devices"] // chips.CHIPS[_kind(plan)].per_chip
