"""Notebooks under nbval run at the smoke scale: embedded data only, whatever this machine has."""

from collections.abc import Generator

import pytest

from tvg_lib.reproduce import environment, smoke_environment


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """The kernel of a notebook starts with its first cell and inherits this environment."""
    with environment(smoke_environment()):
        return (yield)
