"""A SAELens process in the environment of `make peers`, shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from saebench.bench.peer import Peer, running_peer

ENVIRONMENT = Path(__file__).parents[2] / ".venv-peers"


@pytest.fixture(scope="session")
def saelens() -> Iterator[Peer]:
    with running_peer(ENVIRONMENT, threads=2) as peer:
        yield peer
