"""The options of a run, as dataclasses; nothing here needs JAX.

`config.model` and `config.data` are tables until `resolve` knows the recipe.
"""

import dataclasses
import math
import re
from typing import Any

from ml_collections import ConfigDict

from metamorph_jax import config as configs
from metamorph_jax import paths
from metamorph_jax.errors import ConfigError

PRECISIONS = ("default", "bfloat16", "tensorfloat32", "float32", "highest")


@dataclasses.dataclass(frozen=True)
class Guard:
    """What counts as a bad step and what happens then. A bad step never changes a parameter.

    Attributes:
        on_bad: "stop", or "skip": leave the batch out, write down which samples it held, and train
            on.
        most_in_a_row: the run ends after this many bad steps in a row, even with "skip".
        spike: a step is bad if its loss is this many deviations above the running mean; 0: never.
            (The deviation is the running mean of |loss - mean|, and at least 1 % of the mean.)
        spike_after: number of steps before spikes are looked for.
    """

    on_bad: str = "stop"
    most_in_a_row: int = 10
    spike: float = 0.0
    spike_after: int = 100

    def __post_init__(self):
        if self.on_bad not in ("stop", "skip"):
            raise ValueError(f"on_bad must be stop or skip, not {self.on_bad!r}")


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """Options of local checkpoints.

    Attributes:
        folder: on each host's own disk, the same path everywhere; "" for none. It takes
            (keep + 1) times the host's share of the state.
        every: steps between them.
        keep: how many of the newest are kept. With 1, a host that dies while others have just
            finished a save leaves no step that all hosts have.
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
            raise ValueError("multi_tier needs a folder: where the daemon's volume is mounted")


def _check_numbers(table, *names: str, below: float = math.inf) -> None:
    """Raises ValueError if one of these options is a number outside of [0, below)."""
    for name in names:
        value = getattr(table, name)
        if value is not None and not 0 <= value < below:
            most = "finite and at least 0" if below == math.inf else f"in [0, {below:g})"
            raise ValueError(f"{name} must be {most}, not {value}")


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters with a learning rate or weight decay of their own.

    Attributes:
        name: for messages; in a config it is the key of the table.
        match: regular expression for the whole dotted name of a parameter. A parameter belongs to
            the first group that matches it.
        rate: factor on the learning rate.
        decay: weight decay; None: that of the optimizer. Biases and norms are never decayed.
    """

    name: str
    match: str
    rate: float = 1.0
    decay: float | None = None

    def __post_init__(self):
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match {self.match!r} is not a regular expression: {error}") from None
        _check_numbers(self, "rate", "decay")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    Attributes:
        learning_rate: peak, at `base_batch` rows if that is given.
        name: of an optax transformation, see `optim.OPTIMIZERS`.
        base_batch: the peak is scaled by sqrt(batch / base_batch); None leaves it as it is.
        batch: size of a batch for that rule when rows are not the measure (packed rows hold
            several samples); default: rows of the global batch.
        schedule: "cosine" or "linear" (to 0), "constant", "wsd" (warm-up, stable, the last fifth
            decays linearly to 0), "rsqrt", or the reference's two for its decoder, "finetune"
            (logarithmic warm-up, linear decay) and "scratch" (linear warm-up).
        warmup: share of the steps if below 1, else a number of steps.
        b1, b2, eps: of Adam and its relatives (of Muon: for what it leaves to AdamW). For other
            optimizers, b1 is the momentum and b2 the decay of the second moment. None: optax's
            default, which for AdamW is 0.9, 0.999, 1e-8.
        weight_decay: for matrices and tables; biases and norms are not decayed.
        clip_norm: the gradient is scaled down to this global norm; None: no clipping.
        ema_decay: keep an exponential moving average of the trained parameters.
        momentum_dtype: dtype in which the first moment is kept; for AdamW, "bfloat16" saves a sixth
            of the memory of parameters and moments. (The second moment stays in float32: in
            bfloat16 it would no longer change.)
        options: further arguments of the transformation.
        groups: name -> what differs for some parameters, e.g. `dict(head=dict(match=r"head\\..*",
            rate=7.0))`.
    """

    learning_rate: float = 1e-4
    name: str = "adamw"
    base_batch: int | None = None
    batch: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    momentum_dtype: str = "float32"
    options: dict = dataclasses.field(default_factory=dict)
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        if self.momentum_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"momentum_dtype {self.momentum_dtype!r} is neither float32 nor "
                             "bfloat16")  # fmt: skip
        _check_numbers(self, "learning_rate", "batch", "warmup", "eps", "weight_decay", "clip_norm")
        _check_numbers(self, "b1", "b2", "ema_decay", below=1.0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One evaluation that the loop runs every so many steps.

    Attributes:
        name: the key of the table; results are called "evals.NAME.METRIC".
        kind: "loss": the losses of training on held-out data, without gradients; "task": a class
            that puts requests to the model's generator and scores the replies (`evals.Task`);
            "samples": no numbers, but what the model makes of a few fixed samples, for TensorBoard,
            `samples/` in the workdir and `report.html`.
        every: steps between two evaluations; there is one after the last step, too.
        average: evaluate the moving average of the parameters if the run keeps one.
        data: (loss, samples) options of `config.data` that differ; a table within is merged key by
            key, except for `sources`, which replaces the training sources.
        batches: (loss) evaluate on that many batches; 0: until the data end, which needs data that
            do end (for most recipes `data=dict(epochs=1)`).
        samples: (samples) how many.
        task: (task) "package.module:Class", or the name of a task of the bench (`metamorph eval
            --list`), with options: "seed:form=choose".
        options: (task) arguments of the class; for the bench `bench_root`, `limit`, `batch_size`
            and `max_new_tokens`.
    """

    name: str
    kind: str = "loss"
    every: int = 500
    average: bool = True
    data: dict = dataclasses.field(default_factory=dict)
    batches: int = 16
    samples: int = 4
    task: str = ""
    options: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in ("loss", "task", "samples"):
            raise ValueError(f"kind must be loss, task or samples, not {self.kind!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")
        if self.batches < 0:
            raise ValueError(f"batches must be at least 0, not {self.batches}")
        if "." in self.name:
            raise ValueError(f"the name {self.name!r} has a dot")
        if (self.kind == "task") != bool(self.task):
            raise ValueError("kind='task' needs `task`, and kind='loss' and 'samples' take none")


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
        seed: of new weights and of random numbers in the loss.
        initial_batches: batches that the recipe's `initialize` reads before the first step.
        mesh: axis -> size (`sharding.make_mesh`); -1 is "the rest".
        data_shards: streams that the batch is packed from (`shards`); each is read by one host if
            there are at least as many as hosts. 0: as many as hosts when the run begins.
        guard: what happens at bad steps.
        log_every, checkpoint_every, keep: steps between log lines and between checkpoints; number
            of checkpoints that are kept.
        evals: name -> an evaluation during training.
        keep_best: "evals.NAME.METRIC": whenever this is better than ever before, a checkpoint is
            saved and kept beside the `keep` newest (workdir/best.json names it); "": none.
        best_is: "min" or "max", which value of `keep_best` is the best.
        local_checkpoints: additional checkpoints on each host's own disk (`local_checkpoints`).
        damaged_checkpoint: "stop", or "previous": resume from the newest undamaged one.
        tensorboard: write TensorBoard files.
        wandb: project of Weights & Biases that gets the metrics, too (extra `wandb`); "": none.
        matmul_precision: of products of float32 matrices, a name that
            `jax.default_matmul_precision` takes. "default" is one pass in bfloat16 on a TPU, and
            float32 on a CPU; with "bfloat16", linear layers on a CPU multiply as on a TPU.
        compilation_cache: folder of compiled programs, unless $JAX_COMPILATION_CACHE_DIR names one;
            "" for none.
    """

    recipe: str
    stage: str
    steps: int
    batch_size: int
    model: dict
    data: dict
    optim: OptimConfig = OptimConfig()
    accumulate: int = 1
    seed: int = 0
    initial_batches: int = 0
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"fsdp": -1})
    data_shards: int = 0
    guard: Guard = Guard()
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    evals: tuple[EvalConfig, ...] = ()
    keep_best: str = ""
    best_is: str = "min"
    local_checkpoints: LocalConfig = LocalConfig()
    damaged_checkpoint: str = "stop"
    tensorboard: bool = True
    wandb: str = ""
    matmul_precision: str = "default"
    compilation_cache: str = "~/.cache/metamorph_jax/compiled"

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} isn't a multiple of accumulate "
                             f"{self.accumulate}")  # fmt: skip
        for name, known in (
            ("damaged_checkpoint", ("stop", "previous")),
            ("best_is", ("min", "max")),
            ("matmul_precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not "
                                 f"{getattr(self, name)!r}")  # fmt: skip
        known = [f"evals.{one.name}" for one in self.evals]
        if self.keep_best and not any(self.keep_best.startswith(f"{name}.") for name in known):
            raise ValueError(
                f"keep_best must be the metric of an evaluation, evals.NAME.METRIC, not "
                f"{self.keep_best!r}; evaluations: {', '.join(known) or 'none'}"
            )


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
        """Regular expression for what is trained, see `Recipe.STAGES`."""
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

    table = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    paths.check_config(table)
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
