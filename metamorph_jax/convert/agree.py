"""Whether a model is the one that a checkpoint's config describes, where shapes don't tell.

Two models of the same shapes may differ in the base of their rotary positions, in an epsilon, in
how heads are split, in an activation, or in what a diffusion model predicts. A checkpoint that is
loaded into a model which was configured by name is therefore compared with it, field by field.
"""

import math
from collections.abc import Callable, Mapping

from metamorph_jax.errors import ConfigError

# Fields of a part's config that the shapes of its tensors don't show.
LLM = ("heads", "kv_heads", "head_dim", "norm_eps", "rope_theta", "rope_scaling")
TOWER = ("heads", "norm_eps", "activation", "layout", "pre_norm", "registers")
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type",
            "zero_snr")  # fmt: skip


def differences(ours, theirs, names, where: str = "") -> list[str]:
    """A line for each of these fields in which two dataclasses (or dicts) differ.

    Args:
        ours: of the model.
        theirs: of the checkpoint.
        names: of the fields.
        where: prefix of the names.
    """
    get = lambda x, name: x[name] if isinstance(x, Mapping) else getattr(x, name)  # noqa: E731
    pairs = [(where + name, get(ours, name), get(theirs, name)) for name in names]
    return [f"{name} is {a!r}, in the checkpoint {b!r}" for name, a, b in pairs if not _same(a, b)]


def _same(a, b) -> bool:
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) or isinstance(b, float):  # a GGUF has float32 numbers
        numbers = all(isinstance(x, int | float) for x in (a, b))
        return numbers and math.isclose(a, b, rel_tol=1e-6)
    return a == b


def require(spec: str, *checks: Callable[[], list[str]], advice: str = "") -> None:
    """Raises one error with the differences of all parts of a checkpoint.

    Args:
        spec: of the checkpoint.
        checks: each gives lines as `differences` does; what one of them can't read is a line, too.
        advice: how the model can be made as the checkpoint says.

    Raises:
        ConfigError: there is a difference.
    """
    found = []
    for check in checks:
        try:
            found += check()
        except ValueError as error:
            found.append(str(error))
    if found:
        raise ConfigError(
            f"{spec} is not the model of this config: {'; '.join(found)}"
            + (f". {advice}" if advice else "")
        )
