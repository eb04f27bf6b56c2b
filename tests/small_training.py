"""A small model, its training, and the optimizers that the tests of qgm_ext.optim put it through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qgm_ext.optim import DSGD, QGSGD, DSGDm

OPTIMIZERS = [
    pytest.param(lambda params, **kw: DSGD(params, **{"lr": 0.05, **kw}), id="dsgd"),
    pytest.param(lambda params, **kw: DSGDm(params, **{"lr": 0.05, **kw}), id="dsgdm"),
    pytest.param(lambda params, **kw: QGSGD(params, **{"lr": 0.05, **kw}), id="qgsgd"),
    pytest.param(lambda params, **kw: QGSGD(params, **{"lr": 0.05, "local_step": 3, **kw}), id="qgsgd-local-step"),
]
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS)


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(batch(step, dtype)).square().sum().backward()
        optimizer.step()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert left.dtype == right.dtype
        assert torch.equal(left, right), f"parameter {i}"
