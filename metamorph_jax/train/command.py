"""`metamorph train`: runs a config in a workdir, or resumes the run there.

Exit codes: 0, done; 2, the user has to change something; 3, a bad step ended the run. After these,
start the same command again: 75, another host was lost (134 if JAX itself noticed it first and
aborted); 143, SIGTERM came.
"""

import argparse
import os
import sys
import traceback

from metamorph_jax.data import option
from metamorph_jax.errors import BadStep, JoinError, Preempted, UserError


def add_arguments(parser) -> None:
    parser.description = (
        "Trains the stage that a config file describes. The same command with the same workdir "
        "resumes where it stopped. Any option of the config can be changed: --config.a.b=value; "
        "metamorph config lists them."
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:SIZE]", help="e.g. configs/metamorph/vpit.py:8b"
    )
    parser.add_argument("--workdir", required=True, help="folder of checkpoints, metrics, weights")
    option.add_arguments(parser)
    parser.add_argument(
        "--profile", metavar="START:STOP",
        help="write a trace of these steps to WORKDIR/profile, for xprof",
    )  # fmt: skip
    group = parser.add_argument_group(
        "several hosts",
        "The same command on every host. TPU VMs, GKE and SLURM (srun) are recognised.",
    )
    group.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="require other hosts, or never join any; default: what the platform says",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="K", help="number of this process, from 0")
    group.add_argument(
        "--hint-after", type=float, default=60.0, metavar="SECONDS",
        help="if hosts are still missing then, print what to check (60)",
    )  # fmt: skip
    group.add_argument(
        "--join-timeout", type=float, default=600.0, metavar="SECONDS",
        help="stop waiting for missing hosts (600)",
    )  # fmt: skip
    group.add_argument(
        "--heartbeat", type=int, default=100, metavar="SECONDS",
        help="a host that is silent for this long counts as lost, and the others exit (100)",
    )  # fmt: skip


def run(args) -> int:
    from metamorph_jax import distributed
    from metamorph_jax.train import profile

    config = option.load(args, features=os.path.join(args.workdir, "features"))
    span = profile.parse(args.profile) if args.profile else None
    place = _join(args, config)
    from metamorph_jax.train.loop import train

    try:
        train(config, args.workdir, span)
    except (Preempted, BadStep):
        raise  # these come on all hosts at the same step
    except UserError as error:
        if place is None:
            raise
        print(f"metamorph train: process {place.process}: {error}", file=sys.stderr)
        distributed.leave(error.code)
    except Exception as error:
        if place is None:
            raise
        _leave(place, error)
    return 0


def _join(args, config):
    """This process's place among the hosts, after all have met; None if it is alone."""
    from metamorph_jax import distributed

    if args.distributed is False:
        return None
    local = config.get("local_checkpoints", {})
    if local.get("multi_tier"):
        from metamorph_jax.train import multi_tier

        mesh = dict(config.get("mesh") or {})
        return multi_tier.join(local.folder, local.multi_tier, mesh, args.join_timeout)
    place = distributed.find(args.coordinator, args.processes, args.process)
    if place is not None:
        distributed.join(place, args.hint_after, args.join_timeout, args.heartbeat)
    elif args.distributed:
        raise JoinError(
            "--distributed: nothing says where the other hosts are; give --coordinator=HOST:PORT, "
            "--processes=N and --process=K"
        )
    return place


def _leave(place, error: Exception) -> None:
    """Ends this process of several; others may be waiting for it, or it for others."""
    import jax

    from metamorph_jax import distributed

    traceback.print_exc()
    ours = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
    lost = isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(ours)
    if not lost:
        print(f"metamorph train: process {place.process} failed (above)", file=sys.stderr)
        distributed.leave(1)
    print(
        f"metamorph train: process {place.process} lost contact with another host, see its log. "
        "Start the same command again on all hosts: it resumes from the last checkpoint.",
        file=sys.stderr,
    )
    distributed.leave(distributed.LOST_HOST)
