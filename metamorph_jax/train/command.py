"""`metamorph train`: runs a config in a workdir, or resumes the run there.

Exit codes: 0, done; 2, the user has to change something; 3, a bad step ended the run. After these,
start the same command again: 75, another host was lost (134 if JAX itself noticed it first and
aborted); 143, SIGTERM came.
"""

import os
import sys
import traceback

from metamorph_jax import distributed
from metamorph_jax.data import option
from metamorph_jax.errors import BadStep, Preempted, UserError


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
    distributed.add_arguments(parser)


def run(args) -> int:
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
    if args.distributed is False:
        return None
    local = config.get("local_checkpoints", {})
    if local.get("multi_tier"):
        from metamorph_jax.train import multi_tier

        mesh = dict(config.get("mesh") or {})
        return multi_tier.join(local.folder, local.multi_tier, mesh, args.join_timeout)
    return distributed.join_asked(args)


def _leave(place, error: Exception) -> None:
    """Ends this process of several; others may be waiting for it, or it for others."""
    import jax

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
