"""Whole training steps of n = 16 workers, batch 32 each: the Simulator against a plain loop over n models.

    pytest benchmarks/bench_simulator.py --benchmark-only

The plain loop is what one writes without this package: n modules, a torch.optim.SGD (Nesterov) for each, and then the
parameters of all as rows of X, X = W @ X, and back into the modules. That is DSGDm-N, so the Simulator runs the same;
after some steps both must hold the same parameters. Both are measured in turn in one process, each after a step of its
own as in training, in worker-steps per second.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from conftest import paired_minimum, report, size
from qgm_ext import models, topology
from qgm_ext.simulator import Simulator

WORKERS, BATCH, SHAPE, CLASSES = 16, 32, (1, 28, 28), 10
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
MODELS = {
    "MLP 784-128-64-10": lambda: models.mlp(SHAPE, CLASSES),
    "CNN 16-32, group norm": lambda: models.cnn(SHAPE, CLASSES),
}
ROUNDS = {"MLP 784-128-64-10": 60, "CNN 16-32, group norm": 20}
STEPS_COMPARED = 3


class PlainLoop:
    """n models, n optimizers and a matrix."""

    def __init__(self, model: torch.nn.Module, weights: torch.Tensor) -> None:
        self.models = [copy.deepcopy(model) for _ in range(WORKERS)]
        self.optimizers = [
            torch.optim.SGD(m.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
            for m in self.models
        ]
        self.weights = weights

    def step(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for model, optimizer, (x, y) in zip(self.models, self.optimizers, batches, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            mixed = self.weights @ torch.stack([parameters_to_vector(model.parameters()) for model in self.models])
            for model, row in zip(self.models, mixed, strict=True):
                vector_to_parameters(row, model.parameters())


def build(name: str, engines: list[str], dtype: torch.dtype) -> tuple[PlainLoop, dict[str, Simulator]]:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    ring = topology.ring(WORKERS)
    hyper = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    sims = {engine: Simulator(model, ring, "dsgdm_n", engine=engine, **hyper) for engine in engines}
    return PlainLoop(model, torch.from_numpy(ring.matrix()).to(dtype)), sims


def check(name: str, engines: list[str], x: torch.Tensor, y: torch.Tensor) -> None:
    """Both do the same training, shown in float64, where rounding does not decide which ReLU is open."""
    plain, sims = build(name, engines, torch.float64)
    x = x.double()
    for _ in range(STEPS_COMPARED):
        plain.step(list(zip(x.unbind(), y.unbind(), strict=True)))
        for sim in sims.values():
            sim.step(F.cross_entropy, (x, y))
    for sim in sims.values():
        for found, expected in zip(sim.models, plain.models, strict=True):
            for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-9, atol=1e-11)


@functools.cache
def measured(name: str, threads: int) -> tuple[dict[str, Simulator], object, dict[str, float]]:
    """Simulators of every engine, their batches, and seconds of a step of each and of the plain loop."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(WORKERS, BATCH, *SHAPE, generator=generator)
    y = torch.randint(0, CLASSES, (WORKERS, BATCH), generator=generator)
    engines = ["loop", "vmap"] if threads == 1 else ["threads", "vmap"]
    check(name, engines, x, y)
    plain, sims = build(name, engines, torch.float32)
    pairs = list(zip(x.unbind(), y.unbind(), strict=True))
    candidates = {engine: functools.partial(sim.step, F.cross_entropy, (x, y)) for engine, sim in sims.items()}
    candidates["plain loop"] = functools.partial(plain.step, pairs)
    times = paired_minimum(candidates, ROUNDS[name], settled=True)
    best = min(engines, key=times.__getitem__)
    report(
        f"Worker-steps per second, {WORKERS} workers, batch {BATCH}, DSGDm-N on a ring",
        **{"model": name, "torch threads": str(threads)},
        **{"plain loop": f"{WORKERS / times['plain loop']:,.0f}", "Simulator": f"{WORKERS / times[best]:,.0f}"},
        engine=best,
        **{"Simulator / plain loop": f"{times['plain loop'] / times[best]:.2f}"},
    )
    return sims, (x, y), times


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_simulator(benchmark, name, threads):
    torch.set_num_threads(threads)
    sims, batches, times = measured(name, threads)
    best = min(sims, key=times.__getitem__)
    benchmark.extra_info.update(
        n=WORKERS,
        D=sims[best].num_parameters,
        dtype="torch.float32",
        threads=threads,
        batch=BATCH,
        engine=best,
        worker_steps_per_second=WORKERS / times[best],
        ratio_to_plain_loop=times["plain loop"] / times[best],
    )
    benchmark.pedantic(sims[best].step, (F.cross_entropy, batches), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation(benchmark, name):
    """Simulator.evaluate against the same models asked one after the other, batches of 1024."""
    torch.manual_seed(0)
    sim = Simulator(MODELS[name](), topology.ring(4), "dsgd", lr=LR)
    x, y = torch.randn(size(10_000), *SHAPE), torch.randint(0, CLASSES, (size(10_000),))

    @torch.no_grad()
    def plain() -> list[float]:
        models = [*sim.models, sim.average_model()]
        return [
            sum((model(xs).argmax(1) == ys).sum().item() for xs, ys in zip(x.split(1024), y.split(1024), strict=True))
            / len(x)
            for model in models
        ]

    found = sim.evaluate(x, y)
    assert [*found.accuracy_local, found.accuracy_average] == pytest.approx(plain(), abs=2 / len(x))
    times = paired_minimum({"plain": plain, "Simulator": lambda: sim.evaluate(x, y)}, rounds=3)
    report(
        f"Microseconds per model and image of evaluation, 5 models, {len(x):,} images",
        model=name,
        **{way: f"{seconds / 5 / len(x) * 1e6:.1f}" for way, seconds in times.items()},
        **{"plain / Simulator": f"{times['plain'] / times['Simulator']:.2f}"},
    )
    benchmark.pedantic(sim.evaluate, (x, y), rounds=1)
