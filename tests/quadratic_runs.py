"""Runs of a StackedOptimizer on heterogeneous quadratics, and that two algorithms take the same path there."""

from __future__ import annotations

from typing import Any

import torch

from qgm_ext import StackedOptimizer, topology
from rows.base import Quadratics

F64 = torch.float64
RING = topology.ring(8)


def run(name: str, problem: Quadratics, topo: topology.Topology, steps: int, **hyper: Any) -> StackedOptimizer:
    opt = StackedOptimizer(torch.zeros_like(problem.a), topo, name, **hyper)
    for _ in range(steps):
        opt.step(problem.gradient(opt.x))
    return opt


def same_path(
    one: tuple[str, dict[str, Any]],
    other: tuple[str, dict[str, Any]],
    topo: topology.Topology,
    steps: int = 30,
    **changes: Any,
) -> None:
    """Two algorithms take the same path on heterogeneous quadratics."""
    problem = Quadratics(n=topo.num_workers)
    second = changes.get("other_topology", topo)
    a, b = run(one[0], problem, topo, steps, **one[1]), run(other[0], problem, second, steps, **other[1])
    torch.testing.assert_close(a.x, b.x, rtol=1e-12, atol=1e-13)
    assert (a.x - a.x[0]).abs().max() > 1e-3 or topo.name == "complete" or one[0].startswith("c")
