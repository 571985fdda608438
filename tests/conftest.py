"""What every test shares: hypothesis profiles."""

import pytest
from hypothesis import settings

# The first call of a jitted function compiles, so a deadline would measure XLA. The suite draws the same examples on
# every run; `pytest --hypothesis-profile=explore` draws new ones, and more of them.
settings.register_profile("nuqjax", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("nuqjax")


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
