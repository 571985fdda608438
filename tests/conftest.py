"""What the tests share: hypothesis profiles, options, and programs whose memory is measured."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import settings

# The first call of a jitted function compiles, so a deadline would measure XLA. The suite draws the same examples on
# every run; `pytest --hypothesis-profile=explore` draws new ones, and more of them.
settings.register_profile("nuqjax", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("nuqjax")


def pytest_configure(config):
    """Dtypes and ranks are not promoted, unless the environment says so, whatever the library computes.

    What is compiled stays in a new folder until the end of the run, so that the same program is compiled once.

    Many tests compile what another has compiled, by a function of their own or in a process of their own. Each worker
    has a folder to itself: JAX does not write these files at a stroke.
    """
    folder = tempfile.TemporaryDirectory(prefix="nuqjax-compiled-")
    config.add_cleanup(folder.cleanup)
    for name, value in {
        "jax_compilation_cache_dir": folder.name,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_numpy_dtype_promotion": os.environ.get("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
        "jax_numpy_rank_promotion": os.environ.get("JAX_NUMPY_RANK_PROMOTION", "raise"),
    }.items():
        os.environ[name.upper()] = str(value)  # for what tests start
        jax.config.update(name, value)


_LONG = (
    "experiments/studies/test_emulation", "tests/test_notebooks", "experiments/networks/test_networks", "knq/test_mesh",
    "knq/test_long", "knq/test_gaps", "knq/test_dense", "knq/test_knq", "knq/test_priced", "laws/test_fit_laws",
    "apply/test_apply", "store/test_hostile", "laws/test_meshes",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """What takes long begins first, or it would be left to one worker in the end. Examples are a user's programs."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("promotes")
    items.sort(
        key=lambda item: (item.get_closest_marker("slow") is None, not str(item.path.with_suffix("")).endswith(_LONG))
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test of functions that promote, as a user's may, runs as JAX does by default, and so does what it starts."""
    if item.get_closest_marker("promotes") is None:
        return (yield)
    defaults = {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for name, value in defaults.items():
            patch.setenv(name, value)
        return (yield)


def pytest_addoption(parser):
    """`--oracle-images N`: on how many images a trained network's words are compared with the oracle's.

    `--fuzz N`: how many damaged and forged files are loaded.
    """
    parser.addoption("--oracle-images", dest="oracle_images", type=int, default=1)
    parser.addoption("--fuzz", type=int, default=100_000)


@pytest.fixture(scope="session")
def fuzz(request):
    """How many damaged and forged files are loaded."""
    return request.config.getoption("--fuzz")


@pytest.fixture(scope="session")
def numbers_printed():
    """`numbers_printed(program, *arguments)`: the integers that a program prints, in a new process, about its memory.

    What it frees goes back to the system at once. glibc by itself keeps larger and larger blocks, and the peak then
    depends on which thread freed what first.
    """

    def run(program: str, *arguments: object) -> list[int]:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        root = Path(__file__).parents[1]  # for `tests.peak`
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
        assert done.returncode == 0, done.stderr
        return [int(word) for word in done.stdout.split()]

    return run
