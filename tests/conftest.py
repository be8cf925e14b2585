"""Shared fixtures: where real data and the oracle cases are."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A deadline is a timing assertion: it fails on a busy machine, not on a wrong program.
settings.register_profile("tvg", deadline=None)
settings.load_profile("tvg")

ORACLES = Path(__file__).parent / "oracles"


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Folder with the committed oracle cases."""
    return ORACLES


@pytest.fixture
def tvg_data(request: pytest.FixtureRequest) -> Path:
    """Folder of real data; the test is reported as skipped, by name, where `TVG_DATA` is not set.

    pytest's summary folds skips of one place and reason into a count; the name keeps them apart.
    """
    root = os.environ.get("TVG_DATA")
    if not root:
        pytest.skip(f"{request.node.name}: TVG_DATA is not set, real data are not at hand")
    path = Path(root)
    if not path.is_dir():
        pytest.fail(f"TVG_DATA={root!r} is not a folder")
    return path
