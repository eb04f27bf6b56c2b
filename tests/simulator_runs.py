"""Small models and batches for tests of the Simulator, and all that a step of it may change."""

from __future__ import annotations

import torch
from torch import nn

from qgm_ext import models

FEATURES, CLASSES = 5, 3


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return models.mlp((FEATURES,), CLASSES, (8,)).to(dtype)


def batch_norm(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).to(dtype)


def data(step, n, batch=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(n, batch, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (n, batch), generator=generator)


def everything(sim):
    return [
        sim.opt.x.clone(),
        *(v.clone() for v in sim.opt.state.values()),
        *(b.clone() for m in sim.models for b in m.buffers()),
    ]


def assert_unchanged(sim, before):
    assert all(torch.equal(a, b) for a, b in zip(everything(sim), before, strict=True))
