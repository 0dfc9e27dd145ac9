import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--golden-root",
        default=str(pathlib.Path(__file__).parent / "golden"),
        help="folder with the golden arrays: <root>/<system>/…",
    )


@pytest.fixture(scope="session")
def golden_root(request) -> pathlib.Path:
    return pathlib.Path(request.config.getoption("--golden-root"))
