"""The fused step against a plain loop of the same traffic, stock PyTorch, torch.compile and a copy. One thread.

    pytest benchmarks/bench_step.py --benchmark-only

`plain loop` is one C loop over the flat arrays that reads three and writes two of them (csrc/cpu/plain_loop.h): what
a step without neighbours costs. `the same in tile order` visits the rows in the order of the fused step, a short
run of each row in turn, without messages or mixing: what that order costs on this machine. Every fused case
is compared with the reference before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from conftest import paired_minimum, report
from qgm_ext import StackedOptimizer, _cpu, algorithms, reference, topology
from stock_torch import StockQgDsgdmN

HYPER = {"lr": 0.1, "momentum": 0.9, "qg_momentum": 0.9, "weight_decay": 1e-4}
SIZES = [(16, 1_000_000), (64, 250_000), (256, 62_500), (1024, 15_625)]


def setup(n: int, dim: int, dtype: torch.dtype = torch.float32, name: str = "qg_dsgdm_n"):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(n, dim, generator=generator).to(dtype) for _ in range(2))
    hyper = {key: value for key, value in HYPER.items() if hasattr(algorithms.get_class(name), key) or key == "lr"}
    return StackedOptimizer(x, topology.ring(n), name, **hyper), g


def check(opt: StackedOptimizer, g: torch.Tensor) -> None:
    x, state = opt.x.double(), reference.initial_state(opt.algorithm, opt.x.double())
    w = torch.tensor(opt.topology.matrix())
    for t in range(2):
        opt.step(g)
        x, state = reference.step(opt.algorithm, x, g.double(), state, w, t)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[opt.x.dtype]
    torch.testing.assert_close(opt.x.double(), x, rtol=tolerance, atol=tolerance)


def measure(benchmark, opt, g, others, rounds=15):
    times = paired_minimum({"fused": lambda: opt.step(g), **others}, rounds)
    bytes_moved = opt.x.numel() * (3 * opt.x.element_size() + 2 * 4)
    benchmark.extra_info.update(
        n=opt.x.shape[0], D=opt.x.shape[1], dtype=str(opt.x.dtype), threads=torch.get_num_threads(),
        gigabytes_per_second=bytes_moved / times["fused"] / 1e9,
        **{f"fused_over_{name}": times["fused"] / seconds for name, seconds in times.items() if name != "fused"},
    )  # fmt: skip
    benchmark.pedantic(lambda: opt.step(g), rounds=3, warmup_rounds=1)
    return times


@pytest.mark.parametrize(("n", "dim"), SIZES, ids=lambda v: str(v))
def test_fused_step(benchmark, n, dim):
    opt, g = setup(n, dim)
    check(opt, g)
    x, m, y = opt.x.clone(), torch.zeros_like(opt.x), torch.empty_like(opt.x)
    stock = StockQgDsgdmN(opt.x.clone(), torch.tensor(opt.topology.matrix(), dtype=torch.float32), **HYPER)
    algorithm, w, state = opt.algorithm, stock.w, reference.initial_state(opt.algorithm, opt.x)
    compiled = torch.compile(lambda x, g, m: algorithm.reference_step(x, g, {"qg_momentum_buffer": m}, w, 0, 0.1))
    streams = [array.data_ptr() for array in (x, m, g)]
    times = measure(
        benchmark, opt, g,
        {
            "plain_loop": lambda: _cpu.plain_loop(x.data_ptr(), g.data_ptr(), m.data_ptr(), x.numel()),
            "plain_tiles": lambda: _cpu.plain_streams(streams, 2, n, dim, _cpu.tile_width),
            "copy": lambda: y.copy_(x),
            "stock_torch": lambda: stock.step(g),
            "torch_compile": lambda: compiled(x, g, *state.values()),
        },
        rounds=15 if n <= 64 else 7,
    )  # fmt: skip
    report(
        "Fused QG-DSGDm-N step, float32, ring, one thread",
        **{
            "n": str(n),
            "D": f"{dim:,}",
            "ms": f"{times['fused'] * 1e3:.2f}",
            "GB/s": f"{benchmark.extra_info['gigabytes_per_second']:.0f}",
            "over plain loop": f"{times['fused'] / times['plain_loop']:.2f}",
            "over the same in tile order": f"{times['fused'] / times['plain_tiles']:.2f}",
            "over copy of x": f"{times['fused'] / times['copy']:.1f}",
            "faster than stock PyTorch": f"{times['stock_torch'] / times['fused']:.1f} x",
            "faster than torch.compile": f"{times['torch_compile'] / times['fused']:.1f} x",
        },
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("n", "dim"), SIZES[:2], ids=lambda v: str(v))
def test_sixteen_bit_parameters(benchmark, n, dim, dtype):
    opt, g = setup(n, dim, dtype)
    check(opt, g)
    wide, g_wide = setup(n, dim)
    times = measure(benchmark, opt, g, {"float32": lambda: wide.step(g_wide)})
    report(
        "16-bit x and g against float32, ring, one thread",
        n=str(n), D=f"{dim:,}", dtype=str(dtype).removeprefix("torch."),
        **{"faster than float32": f"{times['float32'] / times['fused']:.2f} x"},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["ring", "social", "exponential", "complete"])
@pytest.mark.parametrize("algorithm", ["dsgd", "dsgdm_n", "qg_dsgdm", "qg_dsgdm_n"])
def test_topologies(benchmark, algorithm, name):
    opt, g = setup(32, 250_000, name=algorithm)
    opt.topology = topology.get(name, 32)
    check(opt, g)
    y = torch.empty_like(opt.x)
    times = measure(benchmark, opt, g, {"copy": lambda: y.copy_(opt.x)})
    report(
        "Algorithms and topologies, n = 32, D = 250,000, float32, one thread",
        algorithm=algorithm, topology=name, ms=f"{times['fused'] * 1e3:.2f}",
        **{"over copy of x": f"{times['fused'] / times['copy']:.1f}"},
    )  # fmt: skip


def test_two_threads(benchmark):
    opt, g = setup(16, 1_000_000)

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        opt.step(g)

    times = paired_minimum({"one": lambda: with_threads(1), "two": lambda: with_threads(2)})
    benchmark.extra_info["speedup"] = times["one"] / times["two"]
    benchmark.pedantic(lambda: with_threads(2), rounds=3)
    report("Two threads against one, n = 16, D = 1,000,000", speedup=f"{times['one'] / times['two']:.2f} x")


def test_call_overhead(benchmark):
    opt, g = setup(16, 1_000)

    def hundred() -> None:
        for _ in range(100):
            opt.step(g)

    times = paired_minimum({"hundred": hundred}, rounds=50)
    benchmark.extra_info["microseconds"] = times["hundred"] * 1e4
    benchmark.pedantic(lambda: opt.step(g), rounds=20, iterations=20)
    report("One StackedOptimizer.step, n = 16, D = 1,000, whole call", microseconds=f"{times['hundred'] * 1e4:.1f}")
