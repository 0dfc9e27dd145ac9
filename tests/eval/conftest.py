"""The tiny model of the tests of generation."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.sampling.conftest import workdir  # noqa: E402, F401
