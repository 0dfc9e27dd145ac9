"""Settings of the whole suite: JAX on the CPU, and the order of the files.

Most of the time goes into compiling. So tests and the processes that they start share what has been
compiled, in $JAX_COMPILATION_CACHE_DIR, by default a folder that lives as long as the session; and
XLA compiles for the CPU with few optimizations, and writes loops in its older way where jaxlib
still has it: the programs of tests are too small to run slower. Python looks for garbage less often
than by default, which took a tenth of the time: tracing makes many objects, and most of them stay.
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

gc.set_threshold(20_000, 20, 20)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_compiled = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # xdist's processes have it from the first one
    _compiled = tempfile.mkdtemp(prefix="compiled_for_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
_flags = ["--xla_backend_optimization_level=1", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones abort at this option
    _flags += ["--xla_cpu_use_fusion_emitters=false"]
for _flag in _flags:
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest  # noqa: E402

from metamorph_jax import platforms  # noqa: E402

platforms.prepare()  # as the commands that tests start do

# Files that take minutes come first: at the end, one process would wait for the other.
# With several processes this needs --no-loadscope-reorder, as in launch/test.sh.
LONGEST = (
    *("recipes/test_contract.py", "quickstart/test_run.py", "distributed/test_processes.py"),
    *("train/test_survival.py", "recipes/mm_interleaved/test_golden.py"),
    *("recipes/mm_interleaved/test_decoding.py", "recipes/mm_interleaved/test_mesh.py"),
)


def pytest_addoption(parser):
    parser.addoption(
        "--golden-root",
        default=str(pathlib.Path(__file__).parent / "golden"),
        help="folder with the golden arrays: <root>/<system>/…",
    )


def pytest_collection_modifyitems(items):
    folder = pathlib.Path(__file__).parent
    place = {folder / name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_unconfigure():
    if _compiled:
        shutil.rmtree(_compiled, ignore_errors=True)


# Their programs are large, and run once or twice: LLVM takes longer than it saves.
LARGE_PROGRAMS = (
    *(
        "recipes/test_contract.py",
        "recipes/mm_interleaved",
        "recipes/minigpt5",
        "recipes/metamorph",
        "recipes/decoder",
    ),
    *("models/llm", "models/vision", "models/connectors", "models/heads", "models/test_"),
    *("models/diffusion/test_decoder.py", "models/diffusion/test_unet_mmfs.py"),
    *("nn/test_deformable.py", "sampling/test_inserted.py"),
)


@pytest.fixture(scope="module", autouse=True)
def quick_compile(request):
    """In the folders and files of `LARGE_PROGRAMS`, programs are compiled without optimizations."""
    import jax

    path = request.path.relative_to(pathlib.Path(__file__).parent).as_posix()
    quick = path.startswith(LARGE_PROGRAMS)
    if jax.config.read("jax_disable_most_optimizations") != quick:
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()  # JAX doesn't ask how a program was compiled, and last bits differ


@pytest.fixture(scope="session")
def golden_root(request) -> pathlib.Path:
    return pathlib.Path(request.config.getoption("--golden-root"))
