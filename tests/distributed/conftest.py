"""The ranks, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes joined by gloo."""
    running = Ranks()
    yield running
    running.stop()
