"""Gradients of n = 16 workers, batch 32 each, against one model on the same 512 samples.

    pytest benchmarks/bench_gradients.py --benchmark-only

One model reads its weights once and multiplies large matrices; n workers read n times the weights. The ratio says what
simulating n workers costs beside training one model on as much data. Every engine is compared with `plain loop`, which
zeroes flat gradients and lets backward accumulate into them, before it is timed. With one thread the engines are
compared with one model on one thread, with two threads with one model on two.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from conftest import paired_minimum, report
from qgm_ext import models, topology
from qgm_ext.simulator import Simulator

WORKERS, BATCH, SHAPE, CLASSES = 16, 32, (1, 28, 28), 10
MODELS = {
    "MLP 784-200-200-10": lambda: models.mlp(SHAPE, CLASSES, (200, 200)),
    "CNN 16-32": lambda: models.cnn(SHAPE, CLASSES),
}
ROUNDS = {"MLP 784-200-200-10": 40, "CNN 16-32": 6}


def cross_entropy(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Case:
    """One model, and workers with its parameters on the same samples, each engine with workers of its own."""

    def __init__(self, name: str, threads: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(WORKERS, BATCH, *SHAPE, generator=generator)
        self.y = torch.randint(0, CLASSES, (WORKERS, BATCH), generator=generator)
        self.pairs = list(zip(self.x.unbind(), self.y.unbind(), strict=True))
        torch.manual_seed(0)
        self.single = MODELS[name]()
        self.plain = Simulator(self.single, topology.ring(WORKERS), "dsgd", lr=0.1)
        names = ["loop", "vmap"] if threads == 1 else ["loop", "threads", "vmap"]
        self.sims = {
            engine: Simulator(self.single, topology.ring(WORKERS), "dsgd", lr=0.1, engine=engine) for engine in names
        }
        self.all_x, self.all_y = self.x.flatten(0, 1), self.y.flatten()

    def run(self, engine: str) -> torch.Tensor:
        return self.sims[engine]._engine.gradients(cross_entropy, self.pairs, (self.x, self.y))

    def plain_loop(self) -> None:
        self.plain.g.zero_()
        for model, batch in zip(self.plain.models, self.pairs, strict=True):
            cross_entropy(model, batch).backward()

    def one_model(self) -> None:
        self.single.zero_grad(set_to_none=True)
        cross_entropy(self.single, (self.all_x, self.all_y)).backward()

    def check(self) -> None:
        """The engines' gradients are those of the plain loop, and their mean is that of one model on all samples."""
        self.plain_loop()
        self.one_model()
        for engine, sim in self.sims.items():
            self.run(engine)
            torch.testing.assert_close(sim.g, self.plain.g, rtol=1e-4, atol=1e-6)
        for parameter, stacked in zip(self.single.parameters(), self.plain._workers.stacked_gradients, strict=True):
            torch.testing.assert_close(stacked.mean(0), parameter.grad, rtol=1e-3, atol=1e-5)


@functools.cache
def measured(name: str, threads: int) -> tuple[Case, dict[str, float]]:
    """A checked case, and the paired minima of its engines, of the plain loop and of one model."""
    case = Case(name, threads)
    case.check()
    candidates = {engine: functools.partial(case.run, engine) for engine in case.sims}
    candidates |= {"plain loop": case.plain_loop, "one model": case.one_model}
    times = paired_minimum(candidates, ROUNDS[name])
    report(
        f"Gradients of {WORKERS} workers, batch {BATCH}, over those of one model on the same {WORKERS * BATCH} samples",
        **{"model": name, "torch threads": str(threads), "one model": f"{times['one model'] * 1e3:.1f} ms"},
        **{key: f"{times[key] / times['one model']:.2f}" for key in times if key != "one model"},
    )
    return case, times


@pytest.mark.parametrize(
    ("threads", "engine"), [(1, "loop"), (1, "vmap"), (2, "loop"), (2, "threads"), (2, "vmap")], ids=lambda v: str(v)
)
@pytest.mark.parametrize("name", MODELS)
def test_gradients(benchmark, name, threads, engine):
    torch.set_num_threads(threads)
    case, times = measured(name, threads)
    benchmark.extra_info.update(
        n=WORKERS,
        D=case.plain.num_parameters,
        dtype="torch.float32",
        threads=threads,
        batch=BATCH,
        ratio_to_one_model=times[engine] / times["one model"],
        ratio_of_plain_loop_to_one_model=times["plain loop"] / times["one model"],
    )
    benchmark.pedantic(case.run, (engine,), rounds=3, warmup_rounds=1)
