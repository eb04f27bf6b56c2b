"""On a real GPU: the bits of the CPU backend, streams, CUDA graphs. `pytest -m gpu`; skips say what is missing.

What can be shown without a GPU is shown in tests/cuda.
"""

from __future__ import annotations

import pytest
import torch

from qgm_ext import StackedOptimizer, ops, topology


def missing() -> str:
    """Why nothing here can run; empty on a machine with a GPU and the CUDA backend."""
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU, or no driver: torch.cuda.is_available() is False"
    if not ops.has_native("cuda"):
        return "qgm_ext._cuda is not built: QGM_CUDA=1 pip install ."
    return ""


reason = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason or "a GPU is there")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HYPER = [0.1, 0.9, 0.8, 1e-4, 2.0, 1.0, 0.7, 0.3, 0.2, 0.6]
RULES = sorted(ops.rules())


def step(
    rule: str, n: int, d: int, dtype: torch.dtype, name: str, device: str, stride: int, offset: int
) -> list[torch.Tensor]:
    """One fused step on a device; whole buffers, padding included, back on the CPU."""
    known, compute = ops.rules()[rule], ops.compute_dtype(dtype)
    generator = torch.Generator().manual_seed(n * 1009 + d)
    kinds = [dtype, dtype] + [compute] * known.states
    buffers = [torch.randn(n * stride + 16, generator=generator, dtype=torch.float64).to(k).to(device) for k in kinds]
    x, g, *state = (b.as_strided((n, d), (stride, 1), offset) for b in buffers)
    matrix = getattr(topology, name)(n).mixing() if name != "social" else topology.social().mixing()
    tensors = matrix.tensors(dtype=compute, device=device)
    ops.gossip_step_(x, g, state, tensors, matrix.form, rule, HYPER[: known.hyper])
    return [b.cpu() for b in buffers]


def equal_bytes(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("rule", RULES)
def test_gossip_step_gives_the_bits_of_the_cpu(rule: str, dtype: torch.dtype) -> None:
    for n in (1, 2, 3, 5, 16, 33, 100, 300):
        for d in (1, 5, 127, 128, 130, 777, 20_000):
            for name in ("ring", "star", "complete"):
                padded = -(-d // 64) * 64
                for stride, offset in ((padded, 0), (padded, 3), (d + 1, 1)):
                    case = (rule, n, d, dtype, name)
                    got, expected = (step(*case, device, stride, offset) for device in ("cuda", "cpu"))
                    assert equal_bytes(got, expected), (*case, stride, offset)
    assert equal_bytes(
        step(rule, 32, 777, dtype, "social", "cuda", 832, 0), step(rule, 32, 777, dtype, "social", "cpu", 832, 0)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("rule", RULES)
def test_local_step_and_merge_give_the_bits_of_the_cpu(rule: str, dtype: torch.dtype) -> None:
    known, compute = ops.rules()[rule], ops.compute_dtype(dtype)
    for d, offset in ((1, 0), (777, 1), (100_003, 0), (4096, 3)):
        results = []
        for device in ("cpu", "cuda"):
            generator = torch.Generator().manual_seed(d)

            def make(kind: torch.dtype, d: int = d, g: torch.Generator = generator, o: int = offset) -> torch.Tensor:
                return torch.randn(d + 8, generator=g, dtype=torch.float64).to(kind).to(device)[o : o + d]  # noqa: B023

            x, grad = make(dtype), make(dtype)
            state, messages = (
                [make(compute) for _ in range(known.states)],
                [make(compute) for _ in range(known.messages)],
            )
            hyper = HYPER[: known.hyper]
            ops.local_step_(x, grad, state, messages, rule, hyper)
            received = [m for message in messages for m in (make(compute), message, make(compute))]
            ops.merge_(x, grad, state, received, [0.2, 0.5, 0.3], d == 777, rule, hyper)
            results.append([t.cpu().clone() for t in (x, *state, *messages)])
        assert equal_bytes(*results), (rule, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
def test_reductions_give_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    for n, d in ((1, 1), (3, 4097), (16, 270_001)):
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64).to(dtype)
        for reduce in (ops.squared_norms, ops.consensus_distance, ops.rows_are_finite):
            assert torch.equal(reduce(x.cuda()).cpu(), reduce(x)), (reduce.__name__, n, d)
        x[n - 1, d - 1] = float("inf")
        assert ops.rows_are_finite(x.cuda()).tolist() == [True] * (n - 1) + [False]


def test_stacked_optimizer_gives_the_bits_of_the_cpu_over_many_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, 1000, generator=generator)
    gradients = torch.randn(20, 16, 1000, generator=generator)
    ends = []
    for device in ("cpu", "cuda"):
        opt = StackedOptimizer(start.clone().to(device), topology.one_peer_exponential(16), "qg_dsgdm_n", lr=0.1)
        for g in gradients:
            opt.step(g.to(device))
        ends.append((opt.x.cpu(), opt.consensus_distance()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert float(ends[0][1]) == float(ends[1][1])


def test_step_is_captured_in_a_cuda_graph() -> None:
    """No allocation of the kernels' own, no synchronisation: replaying gives what running gives."""
    matrix = topology.ring(16).mixing()
    tensors = matrix.tensors(dtype=torch.float32, device="cuda")
    x, g, m = (torch.randn(16, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(k)) for k in range(3))
    hyper = [0.1, 0.9, 0.9, 1e-4]
    expected_x, expected_m = x.clone(), m.clone()
    for _ in range(3):
        ops.gossip_step_(expected_x, g, [expected_m], tensors, matrix.form, "qg_dsgdm_n", hyper)
    graph = torch.cuda.CUDAGraph()
    keep_x, keep_m = x.clone(), m.clone()
    with torch.cuda.graph(graph):
        ops.gossip_step_(x, g, [m], tensors, matrix.form, "qg_dsgdm_n", hyper)
        norms = ops.squared_norms(x)
    x.copy_(keep_x)
    m.copy_(keep_m)
    for _ in range(3):
        graph.replay()
    assert torch.equal(x, expected_x)
    assert torch.equal(m, expected_m)
    assert torch.equal(norms, ops.squared_norms(expected_x))


def test_step_runs_on_the_current_stream() -> None:
    matrix = topology.ring(4).mixing()
    tensors = matrix.tensors(dtype=torch.float32, device="cuda")
    x, g = torch.ones(4, 1 << 20, device="cuda"), torch.ones(4, 1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the step must wait for this, on the same stream
        g.zero_()
        ops.gossip_step_(x, g, [], tensors, matrix.form, "dsgd", [0.5, 0.0])
    stream.synchronize()
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.skipif(not reason and torch.cuda.device_count() < 2, reason="one GPU; this needs two")
def test_step_runs_on_the_device_of_its_tensors() -> None:
    with torch.cuda.device(0):
        matrix = topology.ring(4).mixing()
        x, g = torch.ones(4, 64, device="cuda:1"), torch.ones(4, 64, device="cuda:1")
        ops.gossip_step_(
            x, g, [], matrix.tensors(dtype=torch.float32, device="cuda:1"), matrix.form, "dsgd", [0.5, 0.0]
        )
        assert torch.cuda.current_device() == 0
    assert torch.equal(x.cpu(), torch.full((4, 64), 0.5))
