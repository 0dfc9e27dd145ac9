"""The tiny model of the tests of generation."""

from tests.sampling.conftest import generator, workdir  # noqa: F401
