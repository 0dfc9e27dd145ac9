"""`metamorph train`: runs a config in a workdir, or goes on there."""

import sys

PREEMPTED = 143  # as a shell says "ended by SIGTERM"; start the same command again
NOT_FINITE = 3


def add_arguments(parser) -> None:
    parser.description = (
        "Trains the stage that a config file describes. The same command with the same workdir "
        "goes on where it stopped. Any option of the config can be changed: --config.a.b=value."
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:SIZE]", help="e.g. configs/metamorph/vpit.py:8b"
    )
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and weights go here")
    group = parser.add_argument_group("several hosts")
    group.add_argument(
        "--distributed", action="store_true", help="join the other hosts as the platform says"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, if not found out")
    group.add_argument("--processes", type=int, help="how many there are")
    group.add_argument("--process", type=int, help="number of this one, from 0")


def run(args) -> int:
    from metamorph_jax.config import load_config

    config = load_config(args.config, args.overrides)
    if args.distributed or args.coordinator:
        _join(args)
    from metamorph_jax.cli import UserError
    from metamorph_jax.data.packing import TooManyBadSamples
    from metamorph_jax.train.checkpoint import CheckpointError
    from metamorph_jax.train.loop import NonFiniteError, Preempted, train

    try:
        train(config, args.workdir)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED
    except NonFiniteError as error:
        print(f"metamorph train: {error}", file=sys.stderr)
        return NOT_FINITE
    except (CheckpointError, TooManyBadSamples) as error:
        raise UserError(error) from error
    return 0


def _join(args) -> None:
    """Connects the processes; all of them have to be started within five minutes."""
    import os

    import jax

    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    print("waiting for the other hosts (was it started on all of them?)", flush=True)
    jax.distributed.initialize(args.coordinator, args.processes, args.process)
    print(f"host {jax.process_index()} of {jax.process_count()} joined", flush=True)
