"""On a GPU: the fused and the relayed step against a device-to-device copy, the former also against stock PyTorch,
torch.compile and Triton; a Simulator's steps launched one by one and replayed as CUDA graphs.

    pytest benchmarks/bench_gpu.py --benchmark-only -m gpu -s

The copy moves as many bytes as the step must (reads and writes together), so its time is the goal. Times are medians of
CUDA events over buffers larger than the L2 cache. Each step is compared with the CPU before it is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import report
from qgm_ext import Simulator, ops, topology
from stock_torch import StockQgDsgdmN

if not torch.cuda.is_available():
    reason = "no NVIDIA GPU, or no driver: torch.cuda.is_available() is False"
else:
    reason = "" if ops.has_native("cuda") else "qgm_ext._cuda is not built: QGM_CUDA=1 pip install ."
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason or "a GPU is there")]

HYPER = {"lr": 0.1, "momentum": 0.9, "qg_momentum": 0.9, "weight_decay": 1e-4}
ELEMENTS = 1 << 26


def milliseconds(candidate: Callable[[], object], rounds: int = 30) -> float:
    """Median time on the GPU of one call."""
    for _ in range(3):
        candidate()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        candidate()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[rounds // 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize(("name", "n"), [("ring", 4), ("ring", 16), ("complete", 16), ("social", 32), ("torus", 64)])
def test_fused_step_on_a_gpu(benchmark, name: str, n: int, dtype: torch.dtype) -> None:
    d = ELEMENTS // n
    generator = torch.Generator("cuda").manual_seed(0)
    x, g = (torch.randn(n, d, device="cuda", generator=generator).to(dtype) for _ in range(2))
    m = torch.zeros(n, d, device="cuda")
    graph = topology.social() if name == "social" else getattr(topology, name)(n)
    matrix, hyper = graph.mixing(), list(HYPER.values())
    tensors = matrix.tensors(dtype=torch.float32, device="cuda")
    w = torch.tensor(graph.matrix(), dtype=torch.float32, device="cuda")

    part = slice(0, 4096)
    small = [t[:, part].cpu().contiguous() for t in (x, g, m)]
    ops.gossip_step_(
        small[0], small[1], [small[2]], matrix.tensors(dtype=torch.float32), matrix.form, "qg_dsgdm_n", hyper
    )
    ops.gossip_step_(x, g, [m], tensors, matrix.form, "qg_dsgdm_n", hyper)
    assert torch.equal(x[:, part].cpu(), small[0])
    assert torch.equal(m[:, part].cpu(), small[2])

    def fused() -> None:
        ops.gossip_step_(x, g, [m], tensors, matrix.form, "qg_dsgdm_n", hyper)

    traffic = n * d * (3 * dtype.itemsize + 2 * 4)
    source = torch.empty(traffic // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = {"fused": milliseconds(fused), "copy": milliseconds(lambda: target.copy_(source))}
    left_out = []
    if dtype == torch.float32:
        stock = StockQgDsgdmN(x.clone(), w, **HYPER)
        times["stock PyTorch"] = milliseconds(lambda: stock.step(g))
        times["torch.compile"] = milliseconds(compiled_step(x, g, m, w))
    else:
        left_out.append("stock PyTorch and torch.compile: written for float32")
    if importlib.util.find_spec("triton") is None:
        left_out.append("Triton: not installed")
    elif n < 16:
        left_out.append("Triton: its dot takes 16 rows or more")
    else:
        import triton_step

        times["Triton"] = milliseconds(lambda: triton_step.step(x, g, m, w, *hyper))
    benchmark.extra_info.update(n=n, D=d, dtype=str(dtype), topology=name, gpu=torch.cuda.get_device_name(), **times)
    benchmark.pedantic(lambda: (fused(), torch.cuda.synchronize()), rounds=3)
    report(
        f"Measured on {torch.cuda.get_device_name()}: fused QG-DSGDm-N step",
        **{
            "topology": name,
            "n": str(n),
            "D": f"{d:,}",
            "dtype": str(dtype)[6:],
            "ms": f"{times['fused']:.3f}",
            "GB/s": f"{traffic / times['fused'] / 1e6:.0f}",
            "copy GB/s": f"{traffic / times['copy'] / 1e6:.0f}",
            "of copy": f"{times['copy'] / times['fused']:.0%}",
            **{
                f"faster than {k}": f"{v / times['fused']:.1f} x"
                for k, v in times.items()
                if k not in ("fused", "copy")
            },
            "not timed": "; ".join(left_out),
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("name", ["chain", "double_binary_trees"])
def test_relayed_step_on_a_gpu(benchmark, name: str, dtype: torch.dtype) -> None:
    n, d = 16, ELEMENTS // 32
    generator = torch.Generator("cuda").manual_seed(0)
    trees = getattr(topology, name)(n).trees()
    x, g = (torch.randn(n, d, device="cuda", generator=generator).to(dtype) for _ in range(2))
    m, messages = torch.zeros(n, d, device="cuda"), torch.zeros(trees.num_edges, d, device="cuda")
    counts = torch.ones(len(trees.trees), n, device="cuda")

    def relayed() -> None:
        ops.relay_step_(x, g, [m], messages, trees.tensors("cuda"), counts, "dsgdm_n", [0.1, 0.9, 1e-4])

    part = slice(0, 4096)
    small = [t[:, part].cpu().contiguous() for t in (x, g, m, messages)]
    ops.relay_step_(*small[:2], [small[2]], small[3], trees.tensors("cpu"), counts.cpu(), "dsgdm_n", [0.1, 0.9, 1e-4])
    relayed()
    for big, expected in ((x, small[0]), (m, small[2]), (messages, small[3])):
        assert torch.equal(big[:, part].cpu(), expected)
    traffic = n * d * (3 * dtype.itemsize + 2 * 4) + 2 * trees.num_edges * d * 4
    source = torch.empty(traffic // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = {"relayed": milliseconds(relayed), "copy": milliseconds(lambda: target.copy_(source))}
    benchmark.extra_info.update(n=n, D=d, dtype=str(dtype), topology=name, gpu=torch.cuda.get_device_name(), **times)
    benchmark.pedantic(lambda: (relayed(), torch.cuda.synchronize()), rounds=3)
    report(
        f"Measured on {torch.cuda.get_device_name()}: RelaySGD step",
        topology=name,
        n=str(n),
        D=f"{d:,}",
        dtype=str(dtype)[6:],
        ms=f"{times['relayed']:.3f}",
        **{
            "GB/s": f"{traffic / times['relayed'] / 1e6:.0f}",
            "copy GB/s": f"{traffic / times['copy'] / 1e6:.0f}",
            "of copy": f"{times['copy'] / times['relayed']:.0%}",
        },
    )


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("n", [16, 64])
def test_replayed_simulator_step_on_a_gpu(benchmark, n: int, engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    pair = torch.randn(n, 32, 784, device="cuda"), torch.randint(0, 10, (n, 32), device="cuda")
    sims = {
        kind: Simulator(
            model, topology.ring(n), "qg_dsgdm_n", lr=0.01, engine=engine, device="cuda", cuda_graph=kind == "replayed"
        )
        for kind in ("launched", "replayed")
    }
    for sim in sims.values():
        for _ in range(5):
            sim.step(F.cross_entropy, pair)
    assert torch.equal(sims["launched"].opt.x, sims["replayed"].opt.x)

    def one_step(kind: str) -> None:
        sims[kind].step(F.cross_entropy, pair)
        torch.cuda.synchronize()

    times = {kind: milliseconds(lambda kind=kind: one_step(kind)) for kind in sims}
    benchmark.extra_info.update(n=n, engine=engine, gpu=torch.cuda.get_device_name(), **times)
    benchmark.pedantic(lambda: one_step("replayed"), rounds=3)
    report(
        f"Measured on {torch.cuda.get_device_name()}: Simulator step, MLP 784-200-200-10, batch 32",
        n=str(n),
        engine=engine,
        **{"launched ms": f"{times['launched']:.2f}", "replayed ms": f"{times['replayed']:.2f}"},
        faster=f"{times['launched'] / times['replayed']:.1f} x",
    )


def compiled_step(x: torch.Tensor, g: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
    """The step as torch.compile sees it: pointwise, a product with W, pointwise, results into x and m."""
    lr, momentum, mu, wd = HYPER.values()

    @torch.compile
    def step(x: torch.Tensor, g: torch.Tensor, m: torch.Tensor) -> None:
        decayed = g + wd * x
        new = w @ (x - lr * (decayed + momentum * (momentum * m + decayed)))
        m.copy_(mu * m + (1 - mu) / lr * (x - new))
        x.copy_(new)

    x, m = x.clone(), m.clone()
    return lambda: step(x, g, m)
