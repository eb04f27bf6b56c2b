"""What ``qgm bench`` measures: one fused step against the PyTorch reference and against a copy of the same bytes.

A short look at this machine. The project's own figures, with more cases and baselines, come from benchmarks/.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from qgm_ext import StackedOptimizer, algorithms, reference, topology

__all__ = ["DEFAULT_SIZES", "Timing", "measure"]

DEFAULT_SIZES = ((16, 1_000), (16, 10_000), (16, 100_000), (16, 1_000_000), (64, 250_000))


@dataclass(frozen=True)
class Timing:
    """Times of one case in seconds, each the minimum of repeated runs.

    Args:
        workers, dim: n and D.
        fused: one step of StackedOptimizer.
        reference: the same step in plain PyTorch.
        copy: torch's copy of as many bytes as the step must read and write at the least.
        bytes: that number.
    """

    workers: int
    dim: int
    fused: float
    reference: float
    copy: float
    bytes: int


def measure(
    sizes: Sequence[tuple[int, int]] = DEFAULT_SIZES, algorithm: str = "qg_dsgdm_n", seconds: float = 1.0
) -> Iterator[Timing]:
    """Time one algorithm on a ring in float32, with the threads that torch has.

    The three are run in turn, so that a slow moment of the machine hits all of them, and the minimum of each counts:
    it is the time that the work needs, where the mean is the time that other programs leave.

    Args:
        sizes: pairs (n, D).
        algorithm: a name from :func:`qgm_ext.algorithms.names`.
        seconds: about how long to measure each size.

    Raises:
        ValueError: if a size or the time is not positive, or the algorithm not known.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds}")
    for workers, dim in sizes:
        if workers < 1 or dim < 1:
            raise ValueError(f"a size must be n >= 1 workers x D >= 1 parameters, got {workers}x{dim}")
    made = algorithms.get(algorithm, lr=0.1)
    for workers, dim in sizes:
        yield _measure_one(workers, dim, made, seconds)


def _measure_one(workers: int, dim: int, algorithm: algorithms.Algorithm, seconds: float) -> Timing:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(workers, dim, generator=generator) for _ in range(2))
    graph = topology.ring(workers)
    opt = StackedOptimizer(x.clone(), graph, algorithm)
    w = torch.from_numpy(graph.matrix()).float()
    state = reference.initial_state(algorithm, x)
    # Parameters and gradient are read and parameters written; every state vector is read and written.
    elements = (3 + 2 * len(algorithm.state_names)) * workers * dim
    source, target = torch.ones(elements // 2), torch.zeros(elements // 2)

    @torch.no_grad()
    def step_reference() -> None:
        reference.step(algorithm, x, g, state, w)

    runs: list[Callable[[], object]] = [lambda: opt.step(g), step_reference, lambda: target.copy_(source)]
    repeats = [_calibrate(run) for run in runs]
    best = [float("inf")] * len(runs)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        best = [min(b, _time(run, repeat)) for b, run, repeat in zip(best, runs, repeats, strict=True)]
        rounds += 1
    return Timing(workers, dim, fused=best[0], reference=best[1], copy=best[2], bytes=4 * elements)


def _calibrate(run: Callable[[], object]) -> int:
    """How often to run it between two looks at the clock: about a millisecond's worth, and it is warm afterwards."""
    _time(run, 1)
    return max(1, int(1e-3 / _time(run, 1)))


def _time(run: Callable[[], object], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat
