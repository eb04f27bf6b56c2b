"""Steps over a process group, Gloo, one thread a process.

    pytest benchmarks/bench_distributed.py --benchmark-only

- QG-DSGDm-N on a ring of four processes against the exchange alone: one flat buffer sent to both neighbours, two
  received, nothing computed.
- Whole training steps against decent-dp (``pip install decent-dp``; left out where it is not installed) on the same
  graph of pairs and the same model.
- How much of backward and communication overlap=True hides if backward leaves the processor free, as on an accelerator
  or on spare cores: four processes on fewer cores have none to spare, and there nothing can be hidden.

Before anything is timed, the step must give the bits of StackedOptimizer's rows. Times are those of the slowest worker.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import conftest
from conftest import report, size
from qgm_ext import StackedOptimizer, topology
from qgm_ext.optim import QGSGD, DSGDm

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from process_pool import ProcessPool

WORKERS, PIECES, LR = 4, 8, 0.01
LIMIT = 200.0  # seconds of one case, after which it hangs
STEPS = 20  # at a time against decent-dp, whose messages are under way when a step is over


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(WORKERS) as made:
        yield made


def timed_together(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, those of the slowest worker; a collective.

    All workers start each run together, and candidates take turns.
    """
    for candidate in candidates.values():
        candidate()
        candidate()
    seconds = torch.zeros(rounds, len(candidates), dtype=torch.float64)
    for row in seconds:
        for k, candidate in enumerate(candidates.values()):
            dist.barrier()
            begin = time.perf_counter()
            candidate()
            row[k] = time.perf_counter() - begin
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return dict(zip(candidates, seconds.T.tolist(), strict=True))


def gradient(rank: int, step: int, dim: int) -> Tensor:
    return torch.randn(dim, generator=torch.Generator().manual_seed(100 * step + rank))


# A ring against the bare exchange -------------------------------------------------------------------------------------


def make_ring(rank: int, dim: int, bucket_mb: float) -> tuple[QGSGD, list[nn.Parameter]]:
    params = [nn.Parameter(piece.clone()) for piece in gradient(99, 0, dim).chunk(PIECES)]
    opt = QGSGD(params, lr=LR, topology=topology.ring(WORKERS), bucket_mb=bucket_mb)
    return opt, params


def check_ring(rank: int, dim: int, bucket_mb: float) -> None:
    """Two steps have the bits of the row of the StackedOptimizer."""
    opt, params = make_ring(rank, dim, bucket_mb)
    stacked = StackedOptimizer(gradient(99, 0, dim).repeat(WORKERS, 1), topology.ring(WORKERS), "qg_dsgdm_n", lr=LR)
    for step in range(2):
        every = torch.stack([gradient(worker, step, dim) for worker in range(WORKERS)])
        stacked.step(every)
        for p, g in zip(params, every[rank].chunk(PIECES), strict=True):
            p.grad = g.clone()
        opt.step()
    found = torch.cat([p.detach() for p in params])
    assert torch.equal(found, stacked.x[rank])


def bare_exchange(rank: int, dim: int) -> Callable[[], None]:
    n = dist.get_world_size()
    neighbors = {(rank - 1) % n, (rank + 1) % n}
    outgoing, incoming = torch.randn(dim), {peer: torch.empty(dim) for peer in neighbors}

    def exchange() -> None:
        requests = [dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in incoming.items()]
        requests += [dist.P2POp(dist.isend, outgoing, peer) for peer in incoming]
        for work in dist.batch_isend_irecv(requests):
            work.wait()

    return exchange


def ring_worker(rank: int, dim: int, bucket_mb: float, rounds: int) -> dict[str, list[float]]:
    check_ring(rank, dim, bucket_mb)
    opt, params = make_ring(rank, dim, bucket_mb)
    for p in params:
        p.grad = torch.randn_like(p)
    return timed_together({"step": opt.step, "exchange": bare_exchange(rank, dim)}, rounds)


@pytest.mark.parametrize("dim", [100_000, 1_000_000])
def test_ring(benchmark, pool, dim):
    found = pool.run(ring_worker, WORKERS, size(dim), 25.0, 1 if conftest.smoke() else 60, limit=LIMIT)[0]
    step, exchange = min(found["step"]), min(found["exchange"])
    pairs = statistics.median(s / e for s, e in zip(found["step"], found["exchange"], strict=True))
    report(
        f"QG-DSGDm-N, ring, {WORKERS} processes, float32",
        **{
            "D": f"{dim:,}",
            "bare exchange, ms": f"{exchange * 1e3:.2f}",
            "optimizer step, ms": f"{step * 1e3:.2f}",
            "step / exchange": f"{step / exchange:.2f}",
            "median of pairs": f"{pairs:.2f}",
        },
    )
    benchmark.extra_info.update(n=WORKERS, D=size(dim), dtype="torch.float32", threads=1, ratio=step / exchange)
    benchmark.pedantic(lambda: None, rounds=1)


# Against decent-dp ----------------------------------------------------------------------------------------------------


def pairs_of_four() -> topology.Topology:
    """The one-peer exponential graph of decent-dp: pairs at distance one, then at distance two."""
    rounds = []
    for distance in (1, 2):
        matrix = np.zeros((WORKERS, WORKERS))
        for i in range(WORKERS):
            matrix[i, i] = matrix[i, i ^ distance] = 0.5
        rounds.append(matrix)
    return topology.from_sequence(rounds)


def classifier(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def decent_worker(rank: int, width: int, rounds: int) -> dict[str, list[float]]:
    from decent_dp.ddp import DecentralizedDataParallel
    from loguru import logger

    logger.remove()
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(8, 64, generator=generator), torch.randint(0, 10, (8,), generator=generator)
    theirs = DecentralizedDataParallel(
        classifier(width),
        lambda params: torch.optim.SGD([p for _, p in params], lr=LR, momentum=0.9),
        topology="one-peer-exp",
        _local_world_size=1,
    )

    def their_steps() -> None:
        for _ in range(STEPS):
            F.cross_entropy(theirs(x), y).backward()

    def make(overlap: bool) -> Callable[[], None]:
        model = classifier(width)
        opt = DSGDm(model.parameters(), lr=LR, topology=pairs_of_four(), overlap=overlap)

        def steps() -> None:
            for _ in range(STEPS):
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                opt.step()

        return steps

    return timed_together({"decent-dp": their_steps, "plain": make(False), "overlap": make(True)}, rounds)


@pytest.mark.parametrize("width", [256, 960])
def test_against_decent_dp(benchmark, pool, width):
    missing = [name for name in ("decent_dp", "loguru") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    found = pool.run(decent_worker, WORKERS, width, 1 if conftest.smoke() else 8, limit=LIMIT)[0]
    best = {name: min(seconds) / STEPS for name, seconds in found.items()}
    report(
        f"Training steps of an MLP, batch 8, DSGDm, one-peer exponential, {WORKERS} processes",
        **{
            "D": f"{sum(p.numel() for p in classifier(width).parameters()):,}",
            "decent-dp, ms": f"{best['decent-dp'] * 1e3:.2f}",
            "DSGDm, ms": f"{best['plain'] * 1e3:.2f}",
            "DSGDm, overlap, ms": f"{best['overlap'] * 1e3:.2f}",
            "DSGDm / decent-dp": f"{best['plain'] / best['decent-dp']:.2f}",
            "median of pairs": f"{statistics.median(np.divide(found['plain'], found['decent-dp'])):.2f}",
        },
    )
    benchmark.extra_info.update(n=WORKERS, threads=1, ratio=best["plain"] / best["decent-dp"])
    benchmark.pedantic(lambda: None, rounds=1)


# Overlap --------------------------------------------------------------------------------------------------------------


class Layer(torch.autograd.Function):
    """A layer that computes nothing, and whose backward takes some time in which the processor is free."""

    @staticmethod
    def forward(ctx, h: Tensor, p: Tensor, g: Tensor, seconds: float) -> Tensor:
        ctx.save_for_backward(g)
        ctx.seconds = seconds
        return h

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grad, ctx.saved_tensors[0], None, None


def overlap_worker(rank: int, dim: int, buckets: int, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    exchange = bare_exchange(rank, dim)
    for _ in range(3):
        dist.barrier()
        exchange()
    alone = min(timed_together({"exchange": exchange}, 1 if rounds == 1 else 20)["exchange"])
    # The same on all workers, and a fifth longer than what is to be hidden.
    seconds = 1.2 * alone / buckets
    gradients = [torch.randn_like(piece) for piece in gradient(rank, 0, dim).chunk(buckets)]
    models = []
    waited: list[list[float]] = [[], []]

    def make(overlap: bool) -> Callable[[], None]:
        params = [nn.Parameter(piece.clone()) for piece in gradient(99, 0, dim).chunk(buckets)]
        bucket_mb = 4e-6 * dim / buckets
        ring = topology.ring(dist.get_world_size())
        opt = QGSGD(params, lr=LR, topology=ring, bucket_mb=bucket_mb, overlap=overlap)
        models.append(params)

        def step() -> None:
            opt.zero_grad()
            h = torch.zeros((), requires_grad=True)
            for p, g in zip(params, gradients, strict=True):
                h = Layer.apply(h, p, g, seconds)
            h.backward()
            opt.step()
            waited[overlap].append(opt.last_communication.seconds)

        return step

    def backward() -> None:
        for _ in range(buckets):
            time.sleep(seconds)

    candidates = {"exchange": exchange, "backward": backward, "plain": make(False), "overlap": make(True)}
    found = timed_together(candidates, rounds)
    for p, q in zip(*models, strict=True):
        assert torch.equal(p, q), "overlap changed the bits"
    return found, [statistics.median(some) for some in waited]


@pytest.mark.parametrize(
    ("workers", "dim", "buckets"), [(2, 4_000_000, 24), (4, 1_000_000, 8), (4, 4_000_000, 8), (4, 4_000_000, 24)]
)
def test_overlap(benchmark, pool, workers, dim, buckets):
    rounds = 1 if conftest.smoke() else 30
    found, waited = pool.run(overlap_worker, workers, size(dim), buckets, rounds, limit=LIMIT)[0]
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    shorter = min(middle["exchange"], middle["backward"])
    hidden = (middle["plain"] - middle["overlap"]) / shorter
    report(
        "Overlap with a backward that leaves the processor free, QG-DSGDm-N, ring, medians",
        **{
            "processes": str(workers),
            "D": f"{dim:,}",
            "buckets": str(buckets),
            "bare exchange, ms": f"{middle['exchange'] * 1e3:.1f}",
            "backward, ms": f"{middle['backward'] * 1e3:.1f}",
            "backward and step, ms": f"{middle['plain'] * 1e3:.1f}",
            "with overlap, ms": f"{middle['overlap'] * 1e3:.1f}",
            "saved / shorter": f"{100 * hidden:.0f} %",
            "waiting in step(), ms": f"{waited[0] * 1e3:.1f}",
            "with overlap": f"{waited[1] * 1e3:.1f}",
            "hidden": f"{100 * (1 - waited[1] / waited[0]):.0f} %",
        },
    )
    benchmark.extra_info.update(n=workers, D=size(dim), threads=1, hidden=hidden)
    benchmark.pedantic(lambda: None, rounds=1)
