"""The cluster that the tests of a session share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import Bed


@pytest.fixture(scope="session")
def session_bed() -> Iterator[Bed]:
    bed = Bed(folder=Path(tempfile.mkdtemp(prefix="bed-", dir="/tmp")))  # short: it holds sockets
    bed.folder.rmdir()
    try:
        bed.up()
        yield bed
    finally:
        bed.down()
        bed.folder.with_name(f"{bed.folder.name}.lock").unlink(missing_ok=True)


@pytest.fixture
def bed(session_bed: Bed) -> Bed:
    """Four idle nodes, node1 to node4; what a test has done to them is undone by the next one that asks."""
    session_bed.heal()
    return session_bed
