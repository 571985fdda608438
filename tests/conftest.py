"""What every test shares: hypothesis profiles, and where the large data is if it is there."""

from pathlib import Path

import pytest
from hypothesis import settings

# The first call of a jitted function compiles, so a deadline would measure XLA. The suite draws the same examples on
# every run; `pytest --hypothesis-profile=explore` draws new ones, and more of them.
settings.register_profile("nuqjax", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("nuqjax")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of trained networks and images beside the checkout; the test is skipped where it is missing."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the trained networks and images (../shared/data) are not on this machine")
    return folder
