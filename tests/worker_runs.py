"""Runs of single workers on fixed gradients, and the rows of the StackedOptimizer that they must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qgm_ext import StackedOptimizer, topology
from qgm_ext.flat import FlatLayout
from qgm_ext.optim import DecentralizedOptimizer

SHAPES = [(3, 5), (), (70,), (2, 3, 2, 2), (1,)]
STEPS = 4


def start_values(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def gradient(step: int, worker: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + worker + 1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def make_topology(name: str, n: int) -> topology.Topology:
    if name == "two_directed":
        return topology.from_sequence([topology.exponential(n), topology.ring(n)])
    return topology.get(name, n)


def learning_rate(step: int) -> float:
    return 0.1 if step % 2 == 0 else 0.05


def stacked(name: str, graph: str | topology.Topology, n: int, dtype: torch.dtype, hyper: dict[str, Any]) -> Tensor:
    """The parameters of all workers after STEPS steps, gaps left out."""
    made = make_topology(graph, n) if isinstance(graph, str) else graph
    layout = FlatLayout(SHAPES)
    x = layout.allocate(n, dtype=dtype, device="cpu")
    for view, value in zip(layout.views(x), start_values(dtype), strict=True):
        view.copy_(value)
    opt = StackedOptimizer(x, made, name, layout=layout, lr=0.1, **hyper)
    g = torch.zeros_like(x)
    for step in range(STEPS):
        for worker in range(n):
            for view, value in zip(layout.views(g[worker]), gradient(step, worker, dtype), strict=True):
                view.copy_(value)
        opt.step(g, lr=learning_rate(step))
    return torch.stack([torch.cat([view.flatten() for view in layout.views(row)]) for row in x])


def take_steps(opt: DecentralizedOptimizer, params: list[nn.Parameter], rank: int, steps: range) -> None:
    for step in steps:
        for p, grad in zip(params, gradient(step, rank, params[0].dtype), strict=True):
            p.grad = grad
        for group in opt.param_groups:
            group["lr"] = learning_rate(step)
        opt.step()


def flattened(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])
