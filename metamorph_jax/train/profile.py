"""`--profile=START:STOP`: a trace of some steps for xprof, in workdir/profile.

To view it: `pip install xprof`, then `xprof --logdir WORKDIR/profile`.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable

import jax

from metamorph_jax.errors import ConfigError


def parse(text: str) -> tuple[int, int]:
    """(first, last) step of "START:STOP", both of them traced."""
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit() and 1 <= int(start) <= int(stop)):
        raise ConfigError(f"--profile wants START:STOP, steps from 1, not {text!r}")
    return int(start), int(stop)


class Trace:
    """Starts and ends the trace; on all processes, each writes its own part.

    Args:
        workdir: of the run.
        span: (first, last) step, or None for no trace.
        done: steps that are already done.
        say: function that logs a line.
    """

    def __init__(self, workdir, span: tuple[int, int] | None, done: int, say: Callable):
        self.folder, self.span, self.say = pathlib.Path(workdir) / "profile", span, say
        self.running = False
        if span and span[0] <= done:
            say(f"no trace: step {span[0]} is over, the run resumes after step {done}")
            self.span = None

    def step(self, number: int):
        """A context for step `number`; starts the trace at the first one."""
        if self.span and number == self.span[0]:
            jax.profiler.start_trace(self.folder)
            self.running = True
        if not self.running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, report) -> float:
        """After step `number` was started; ends the trace when the last one is computed.

        Returns:
            Seconds that went into writing the trace.
        """
        if not (self.running and number >= self.span[1]):
            return 0.0
        jax.block_until_ready(report)
        clock = time.perf_counter()
        self.close()
        self.say(f"trace of steps {self.span[0]} to {number}: {self.folder} (xprof --logdir)")
        return time.perf_counter() - clock

    def close(self) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
