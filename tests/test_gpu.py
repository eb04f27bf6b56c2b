"""On a real GPU: the bits of the CPU backend, streams, CUDA graphs. `pytest -m gpu`; skips say what is missing.

Everything here compares with the CPU, or a replayed step with a launched one, by torch.equal.

What can be shown without a GPU is shown in tests/cuda.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgm_ext import Simulator, StackedOptimizer, algorithms, ops, topology


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
    scalars = row_scalars(rule, generator, compute, n)
    scalars = None if scalars is None else scalars.to(device)
    sums = [ops.new_block_sums(x)] if known.norm_state >= 0 else []
    ops.gossip_step_(x, g, state, tensors, matrix.form, rule, HYPER[: known.hyper], scalars, *sums)
    return [b.cpu() for b in (*buffers, *sums)]


def row_scalars(rule: str, generator: torch.Generator, compute: torch.dtype, *rows: int) -> torch.Tensor | None:
    """Numbers of each worker, [*rows, k], for a rule that takes them."""
    count = ops.rules()[rule].row_scalars
    return torch.rand(*rows, count, generator=generator, dtype=torch.float64).to(compute) + 0.5 if count else None


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


def test_norm_of_a_large_model_gives_the_bits_of_the_cpu() -> None:
    """Large enough for the sums in strips (csrc/cuda/gossip_step.h) on 300 multiprocessors."""
    case = ("qg_dadam", 16, 10_000_001, torch.float32, "ring")
    assert equal_bytes(step(*case, "cuda", 10_000_064, 0), step(*case, "cpu", 10_000_064, 0))


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
            hyper, scalars = HYPER[: known.hyper], row_scalars(rule, generator, compute)
            scalars = None if scalars is None else scalars.to(device)
            ops.local_step_(x, grad, state, messages, rule, hyper, scalars)
            received = [m for message in messages for m in (make(compute), message, make(compute))]
            sums = [ops.new_block_sums(x)] if known.norm_state >= 0 else []
            ops.merge_(x, grad, state, received, [0.2, 0.5, 0.3], d == 777, rule, hyper, scalars, *sums)
            results.append([t.cpu().clone() for t in (x, *state, *messages, *sums)])
        assert equal_bytes(*results), (rule, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("rule", ["dsgd", "dsgdm", "dsgdm_n", "relay_grad", "relay_grad_m", "relay_grad_m_n"])
def test_relay_step_gives_the_bits_of_the_cpu(rule: str, dtype: torch.dtype) -> None:
    known, compute = ops.rules()[rule], ops.compute_dtype(dtype)
    graphs = (topology.chain, topology.star, topology.binary_tree, topology.double_binary_trees)
    for n, d, stride, offset in ((1, 5, 64, 0), (5, 130, 192, 3), (16, 20_000, 20_032, 0), (33, 777, 778, 1)):
        for graph in graphs:
            trees, results = graph(n).trees(), []
            for device in ("cpu", "cuda"):
                generator = torch.Generator().manual_seed(n * 1009 + d)
                kinds = [(n, dtype), (n, dtype), (trees.num_edges, compute), *[(n, compute)] * known.states]
                buffers = [
                    torch.randn(rows * stride + 16, generator=generator, dtype=torch.float64).to(kind).to(device)
                    for rows, kind in kinds
                ]
                sizes = [rows for rows, _ in kinds]
                views = [b.as_strided((r, d), (stride, 1), offset) for b, r in zip(buffers, sizes, strict=True)]
                x, g, messages, *state = views
                counts = torch.rand(len(trees.trees), n, generator=generator).to(device, compute)
                hyper = HYPER[: known.hyper]
                ops.relay_step_(x, g, state, messages, trees.tensors(device), counts, rule, hyper)
                results.append([b.cpu() for b in buffers])
            assert equal_bytes(*results), (rule, n, d, dtype, graph.__name__)


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


# Compression runs in torch, whose sums have another order on a GPU.
SAME_BITS = [n for n in algorithms.names() if not algorithms.get_class(n).needs_model and n != "choco_sgd"]


@pytest.mark.parametrize("name", SAME_BITS)
def test_every_algorithm_gives_the_bits_of_the_cpu(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(8, 7, 1000, generator=generator)
    topo = topology.double_binary_trees(7) if name.startswith("relay") else topology.ring(7)
    ends = []
    for device in ("cpu", "cuda"):
        opt = StackedOptimizer(torch.zeros(7, 1000, device=device), topo, name, lr=0.1)
        for g in gradients:
            opt.step(g.to(device))
        ends.append([opt.x.cpu(), *(vector.cpu() for vector in opt.state.values())])
    assert equal_bytes(*ends)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("name", "options", "recordings"),
    [
        ("qg_dsgdm_n", {}, (0, 1)),
        ("qg_dsgdm_n", {"clip_grad_norm": 0.3}, (0, 1)),
        ("qg_dsgdm_n", {"on_nonfinite": "skip"}, (1, 0)),
        ("d_adam", {}, (1, 0)),
        ("sgp", {}, (0, 1)),
        ("relaysgd", {"fill": "current"}, (0, 1)),
    ],
)
def test_replayed_steps_have_the_bits_of_launched_ones(
    engine: str, name: str, options: dict[str, object], recordings: tuple[int, int]
) -> None:
    topo = topology.chain(8) if name == "relaysgd" else topology.ring(8)
    sims = [
        Simulator(small_model(), topo, name, lr=0.1, engine=engine, device="cuda", cuda_graph=on, **options)
        for on in (True, False)
    ]
    for t in range(10):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 16, 20, generator=generator).cuda()
        y = torch.randint(0, 4, (8, 16), generator=generator).cuda()
        assert torch.equal(*(sim.step(F.cross_entropy, (x, y)) for sim in sims)), t
        assert torch.equal(sims[0].opt.x, sims[1].opt.x), t
    for left, right in zip(*(sim.state_dict()["buffers"] for sim in sims), strict=True):
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert sims[0]._graphs is not None
    assert sims[0]._graphs.recordings == recordings
    assert sims[0].opt.bytes_sent == sims[1].opt.bytes_sent


def test_a_model_that_reads_values_on_the_host_is_named_and_training_can_go_on() -> None:
    def reading(scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(scores, classes)
        return loss * (1.0 if loss.item() > 0 else 2.0)

    sim = Simulator(small_model(), topology.ring(4), "dsgdm", lr=0.1, device="cuda", cuda_graph=True)
    pair = torch.randn(4, 16, 20, device="cuda"), torch.randint(0, 4, (4, 16), device="cuda")
    for _ in range(3):
        sim.step(reading, pair)
    with pytest.raises(RuntimeError, match="cuda_graph=True can't record this step"):
        sim.step(reading, pair)
    assert sim.num_steps == 3
    for _ in range(5):
        sim.step(F.cross_entropy, pair)
    assert sim.num_steps == 8


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
