"""Every algorithm: a step against a plain loop over as many arrays, and against the reference. One thread.

    pytest benchmarks/bench_algorithms.py --benchmark-only

The minimum of bytes counts x, g and the state vectors once for each read and each write that a step can't do without;
the plain loop (csrc/cpu/plain_loop.h) reads and writes just as many arrays, and so does the same loop in the order in
which a fused step visits the rows. Algorithms of several passes (choco_sgd's
compressor between two) have the minimum of one. Every case is compared with the reference before it is timed.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from conftest import paired_minimum, report, size
from qgm_ext import StackedOptimizer, _cpu, algorithms, reference, topology

NAMES = [name for name in algorithms.names() if not algorithms.get_class(name).needs_model]
# Arrays of the model's size that a step reads and writes besides x and g: (read, written). Default: all of the state.
STATE = {"qg_dadam": (3, 3), "slowmo": (1, 1)}


def setup(name: str, n: int, dim: int, dtype: torch.dtype) -> tuple[StackedOptimizer, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, dim, generator=generator).to(dtype).expand(n, dim).contiguous()
    g = torch.randn(n, dim, generator=generator).to(dtype)
    graph = topology.chain(n) if name.startswith("relay") else topology.ring(n)
    hyper = {"slowmo_period": 1000} if name == "slowmo" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # d2 on a ring with an even number of workers
        return StackedOptimizer(x, graph, name, lr=0.01, **hyper), g


def check(name: str) -> None:
    opt, g = setup(name, 16, 1000, torch.float64)
    x, state = opt.x.clone(), reference.initial_state(opt.algorithm, opt.x.clone(), opt.topology)
    w = torch.tensor(opt.topology.matrix())
    for t in range(3):
        opt.step(g)
        x, state = reference.step(opt.algorithm, x, g, state, w, t)
    torch.testing.assert_close(opt.x, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_algorithm(benchmark, name):
    check(name)
    n, dim = 16, size(1_000_000)
    opt, g = setup(name, n, dim, torch.float32)
    vectors = [vector for vector in opt.state.values() if vector.shape == opt.x.shape]
    reads, writes = STATE.get(name, (len(vectors), len(vectors)))
    edges = sum(vector.shape[0] for vector in opt.state.values() if vector.shape != opt.x.shape) / n
    reads, writes = round(2 + reads + edges), round(1 + writes + edges)
    arrays = [opt.x.clone() for _ in range(reads)]
    streams = [array.data_ptr() for array in arrays]
    w, state = torch.tensor(opt.topology.matrix()).float(), reference.initial_state(opt.algorithm, opt.x, opt.topology)
    x = opt.x.clone()
    opt.step(g)  # the first step may do more
    _, state = reference.step(opt.algorithm, x, g, state, w, 0)
    times = paired_minimum(
        {
            "fused": lambda: opt.step(g),
            "plain loop": lambda: _cpu.plain_streams(streams, writes, 1, x.numel(), x.numel()),
            "tile order": lambda: _cpu.plain_streams(streams, writes, n, dim, _cpu.tile_width),
            "reference": lambda: reference.step(opt.algorithm, x, g, state, w, 1),
        },
        rounds=7,
    )
    gigabytes = (reads + writes) * x.numel() * 4 / 1e9
    benchmark.extra_info.update(
        n=n, D=dim, dtype="float32", threads=1, gigabytes_per_second=gigabytes / times["fused"],
        over_plain_loop=times["fused"] / times["plain loop"],
    )  # fmt: skip
    benchmark.pedantic(lambda: opt.step(g), rounds=1)
    report(
        "A step of every algorithm, n = 16, D = 1,000,000, float32, ring (relaysgd: chain), one thread",
        algorithm=name, reads=str(reads), writes=str(writes), ms=f"{times['fused'] * 1e3:.1f}",
        **{
            "GB/s of minimum": f"{gigabytes / times['fused']:.1f}",
            "over plain loop": f"{times['fused'] / times['plain loop']:.2f}",
            "over the same in tile order": f"{times['fused'] / times['tile order']:.2f}",
            "faster than reference": f"{times['reference'] / times['fused']:.1f} x",
        },
    )  # fmt: skip
