"""The options of a run, as dataclasses; nothing here needs JAX.

`config.model` and `config.data` are tables until `resolve` knows the recipe.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from metamorph_jax import config as configs
from metamorph_jax.errors import ConfigError

PRECISIONS = ("default", "bfloat16", "tensorfloat32", "float32", "highest")
SCHEDULES = ("cosine", "constant", "wsd", "rsqrt", "finetune", "scratch")


@dataclasses.dataclass(frozen=True)
class Guard:
    """What makes a step bad, and what then happens. A bad step changes no parameter.

    Attributes:
        on_bad: "stop", or "skip": leave the batch out, write down which samples it held, go on.
        most_in_a_row: bad steps one after another that end the run even so.
        spike: a loss is bad if it is this many deviations above its running mean; 0: never. (The
            deviation is the running mean of |loss - mean|, and at least 1 % of the mean.)
        spike_after: steps before that is asked for the first time.
    """

    on_bad: str = "stop"
    most_in_a_row: int = 10
    spike: float = 0.0
    spike_after: int = 100

    def __post_init__(self):
        if self.on_bad not in ("stop", "skip"):
            raise ValueError(f"on_bad {self.on_bad!r} is none of stop, skip")


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """Options of local checkpoints.

    Attributes:
        folder: on each host's own disk, the same path everywhere; "" for none. It takes
            (keep + 1) times the host's share of the state.
        every: steps between them.
        keep: how many of the newest stay. With 1 a host that dies while others have just finished a
            save leaves no step that all have.
        multi_tier: minutes between copies to the bucket by GKE's multi-tier daemon, whose volume
            `folder` then is; 0: no daemon.
    """

    folder: str = ""
    every: int = 50
    keep: int = 2
    multi_tier: int = 0

    def __post_init__(self):
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.multi_tier < 0:
            raise ValueError(f"multi_tier must be a number of minutes, not {self.multi_tier}")
        if self.multi_tier and not self.folder:
            raise ValueError("multi_tier needs a folder: where the volume of the daemon is mounted")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        learning_rate: peak, at `base_batch` rows if that is given.
        base_batch: the peak is scaled by sqrt(batch / base_batch); None leaves it as it is.
        batch: size of a batch for that rule when rows are not the measure (packed rows hold
            several samples); default: rows of the global batch.
        schedule: "cosine" (to 0), "constant", "wsd" (warm-up, stable, the last fifth decays
            linearly to 0), "rsqrt", or the reference's two for its decoder, "finetune" (logarithmic
            warm-up, linear decay) and "scratch" (linear warm-up).
        warmup: share of the steps if below 1, else a number of steps.
        weight_decay: for matrices and tables; biases and norms are not decayed.
        clip_norm: the gradient is scaled down to this global norm; None: no clipping.
        multipliers: part -> factor on the learning rate (parts: `param_group` of the recipe).
        ema_decay: keep an exponential moving average of the trained parameters.
        momentum_dtype: of the first moment as it is kept; "bfloat16" saves a sixth of the memory of
            parameters and moments. (The second stays float32: in bfloat16 it would no longer move.)
    """

    learning_rate: float
    base_batch: int | None = None
    batch: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    multipliers: dict[str, float] = dataclasses.field(default_factory=dict)
    ema_decay: float | None = None
    momentum_dtype: str = "float32"

    def __post_init__(self):
        if self.momentum_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"momentum_dtype {self.momentum_dtype!r} is neither float32 nor "
                             "bfloat16")  # fmt: skip
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is none of {', '.join(SCHEDULES)}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
        recipe: name of a recipe, or of a module that is one (`recipe.find`).
        stage: what the recipe trains.
        steps: optimizer steps of the whole run.
        batch_size: rows per step, over all processes and micro-batches.
        model, data: tables that the recipe turns into its dataclasses.
        optim: optimizer and schedule.
        accumulate: micro-batches per step.
        seed: of new weights and of what is random in the loss.
        initial_batches: batches that the recipe's `initialize` reads before the first step.
        mesh: axis -> size (`sharding.make_mesh`); -1 is "the rest".
        data_shards: streams that the batch is packed from (`shards`); each is read by one host if
            there are at least as many as hosts. 0: as many as hosts when the run begins.
        guard: what happens at bad steps.
        log_every, checkpoint_every, keep: steps between lines and checkpoints; checkpoints kept.
        local_checkpoints: more of them, on each host's own disk (`local_checkpoints`).
        damaged_checkpoint: "stop", or "previous": go on from the newest that is whole.
        tensorboard: write TensorBoard files.
        matmul_precision: of products of float32, a name that `jax.default_matmul_precision` takes.
            "default" is one pass in bfloat16 on a TPU, and float32 on a CPU; with "bfloat16" linear
            layers do as a TPU on a CPU that has matrix units, too.
        compilation_cache: folder of compiled programs, unless $JAX_COMPILATION_CACHE_DIR names one;
            "" for none.
    """

    recipe: str
    stage: str
    steps: int
    batch_size: int
    model: dict
    data: dict
    optim: OptimConfig
    accumulate: int = 1
    seed: int = 0
    initial_batches: int = 0
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"fsdp": -1})
    data_shards: int = 0
    guard: Guard = Guard()
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    local_checkpoints: LocalConfig = LocalConfig()
    damaged_checkpoint: str = "stop"
    tensorboard: bool = True
    matmul_precision: str = "default"
    compilation_cache: str = "~/.cache/metamorph_jax/compiled"

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} isn't a multiple of accumulate "
                             f"{self.accumulate}")  # fmt: skip
        if self.damaged_checkpoint not in ("stop", "previous"):
            raise ValueError(f"damaged_checkpoint {self.damaged_checkpoint!r} is none of stop, "
                             "previous")  # fmt: skip
        if self.matmul_precision not in PRECISIONS:
            raise ValueError(f"matmul_precision {self.matmul_precision!r} is none of "
                             f"{', '.join(PRECISIONS)}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, resolved.

    Attributes:
        cfg: the run.
        recipe: what it trains.
        model, data: the recipe's `Config` and `Data`.
        table: all options, JSON-able.
    """

    cfg: TrainConfig
    recipe: Any  # `recipe.Recipe`
    model: Any
    data: Any
    table: dict

    @property
    def pattern(self) -> str:
        """Of the parameters that are trained, see `Recipe.STAGES`."""
        return self.recipe.STAGES[self.cfg.stage](self.model)


def typed(recipe: str) -> type[TrainConfig]:
    """`TrainConfig` with the recipe's own dataclasses as the types of `model` and `data`."""
    from metamorph_jax import recipe as recipes

    found = recipes.find(recipe)
    return configs.narrowed(TrainConfig, model=found.Config, data=found.Data)


def run(recipe: str, **differences) -> ConfigDict:
    """What `get_config` of a config file returns: every option of a run.

    Args:
        recipe: see `TrainConfig`.
        differences: options of `TrainConfig` that differ from the defaults, nested as there.

    Raises:
        ConfigError: an option does not exist, or a value is of the wrong type.
    """
    return configs.table(typed(recipe), {"recipe": recipe, **differences})


def resolve(config) -> Run:
    """A ConfigDict or nested dict as the dataclasses of the trunk and of the recipe.

    Raises:
        ConfigError: an option does not exist or has a wrong value.
    """
    from metamorph_jax import recipe as recipes

    table = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    cfg = configs.build(TrainConfig, table)
    recipe = recipes.find(cfg.recipe)
    if cfg.stage not in recipe.STAGES:
        raise ConfigError(
            f"config.stage {cfg.stage!r} is none of {', '.join(recipe.STAGES)}, which recipe "
            f"{cfg.recipe} has"
        )
    model = configs.build(recipe.Config, cfg.model, "config.model")
    data = configs.build(recipe.Data, cfg.data, "config.data")
    whole = {"model": dataclasses.asdict(model), "data": dataclasses.asdict(data)}
    return Run(cfg, recipe, model, data, dataclasses.asdict(cfg) | whole)


