from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import RAY, Nodes


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    # By module: it and its environment are gone before tests with a cluster of their own begin.
    # Makes the token in the home directory, as the README tells, unless there is one.
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    nodes = Nodes()
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(head: Nodes) -> Iterator[Nodes]:
    """The cluster's head; a test adds the nodes that it needs, and they are gone after it."""
    yield head
    head.remove_all()
