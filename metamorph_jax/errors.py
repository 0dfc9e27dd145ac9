"""Every error that a user of the program can meet, and the exit code that each one ends with.

Exit codes: 2, the user has to change something; 3, a bad step ended the run; 143, SIGTERM came (a
checkpoint was saved, start the same command again). 1, with a traceback, is a bug of ours.
"""


class UserError(Exception):
    """Something that the user can put right; printed as one line, without a traceback."""

    code = 2


class ConfigError(UserError, ValueError):
    """A config names a key that does not exist, or gives a value of the wrong kind."""


class FileError(UserError, ValueError):
    """A file can't be read, or does not hold what it should; the message names it."""


class MissingFile(FileError, FileNotFoundError):
    """There is no such file."""


class SlowTokenizer(FileError):
    """A tokenizer takes too long; so it will for every text, and no sample is to blame."""


class WeightError(FileError):
    """A weight file is damaged, or not what its name says."""


class GGUFError(WeightError):
    """The file is not a GGUF file that we can read; the message says why."""


class ONNXError(WeightError):
    """The file is not an ONNX graph that we can read; the message says why."""


class HubError(UserError, OSError):
    """A repository can't be had; the message says why and what to do."""


class EndpointError(UserError, OSError):
    """A chat endpoint does not answer; the message says why."""


class RequestRefused(EndpointError):
    """An endpoint won't answer one request (its length, its content); others may be answered."""


class TopologyError(UserError, ValueError):
    """No such topology, or no compiler for it."""


class JoinError(UserError, RuntimeError):
    """The hosts could not be joined."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, damaged, could not be written, or is not of this run."""


class BadSample(Exception):
    """A sample that can't be used. `reason` is a short word to count by, `detail` is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):  # keeps both parts when it crosses a process border
        return (BadSample, (self.reason, self.detail))


class BadImage(BadSample):
    """An image of a sample that can't be used; `image` is its `ImageRef`, as a whole file."""

    def __init__(self, reason: str, detail: str, image):
        super().__init__(reason, detail)
        self.image = image


class DataError(UserError, ValueError):
    """Nothing in the data can be used, or they are not those that a run began with."""


class TooManyBadSamples(UserError, RuntimeError):
    """Nothing but bad samples for a long while: the data set is broken, or its root is wrong."""


class WorkerError(UserError, RuntimeError):
    """A process that reads data dies again and again."""


class BadStep(UserError, RuntimeError):
    """A step whose numbers are bad; the state is that of the step before."""

    code = 3


class NonFiniteError(BadStep):
    """A loss or gradient was not finite."""


class LossSpike(BadStep):
    """The loss was far above its running mean."""


class Preempted(UserError, RuntimeError):
    """SIGTERM came; a checkpoint was saved, and the same command resumes from it."""

    code = 143
