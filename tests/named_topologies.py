"""Every topology that has a name, for tests that go through all of them."""

from __future__ import annotations

from qgm_ext import topology
from qgm_ext.topology import Topology

ANY_SIZE = [name for name in topology.names() if name not in ("hypercube", "social", "random_directed")]


def every_named(n: int) -> list[Topology]:
    """Every topology that has a name and takes n workers."""
    found = [topology.get(name, n) for name in ANY_SIZE]
    if n & (n - 1) == 0:
        found.append(topology.hypercube(n))
    if n == 32:
        found.append(topology.social())
    return found
