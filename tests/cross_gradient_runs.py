"""Runs of the algorithms that take gradients elsewhere, and their comparison with slow texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import qgm_ext as qgm
from qgm_ext import algorithms, models
from rows import ALGORITHMS
from rows.slow import CLASSES, F64, FEATURES, LR, batches, lr_at, smooth_mlp

STEPS = 8
ROWS = {name: row for name, row in ALGORITHMS.items() if algorithms.get_class(name).needs_model}


def simulator(name, topo, engine="loop", model=None, **hyper):
    return qgm.Simulator(model or smooth_mlp(), topo, name, lr=LR, engine=engine, **hyper)


def advance(sim, steps, begin=0):
    for t in range(begin, begin + steps):
        losses = sim.step(F.cross_entropy, batches(t, sim.num_workers), lr=lr_at(t))
    return losses


def rows_of(sim, vectors):
    """Rows of a flat state vector without the gaps between tensors."""
    return torch.cat([view.flatten(1) for view in sim.opt.layout.views(vectors)], dim=1)


def assert_equals_slow_text(sim, row, a, start, steps, tolerance=1e-12):
    found, workers = row.slow(a, smooth_mlp(), start, sim.opt.topology, steps)
    assert found.keys() - {"x"} == sim.opt.state.keys()
    for key, expected in found.items():
        got = rows_of(sim, sim.opt.x if key == "x" else sim.opt.state[key])
        expected = torch.stack(expected)
        assert (got - expected).abs().max() <= tolerance * expected.abs().max(), key
    for module, worker in zip(sim.models, workers, strict=True):
        for mine, theirs in zip(module.buffers(), worker.model.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def plain_mlp():
    """Without buffers or batch statistics, so that every engine takes it."""
    torch.manual_seed(2)
    return models.mlp((FEATURES,), CLASSES, (6, 5)).to(F64)
