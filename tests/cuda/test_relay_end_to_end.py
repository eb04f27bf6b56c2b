"""The relayed pass on CUDA, launchers and kernels as nvcc compiles them, against the CPU backend, bit for bit.

As test_kernels_end_to_end.py, for ``relay_step_``: every rule and dtype that can be relayed, n and D as there, chains,
stars, binary trees, and two, three and five trees at once, so that one, some or all of a thread's neighbouring
coordinates go over trees of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import harness
import kernel_module
from kernel_module import STREAM, MockModule, Problem, same_bits
from ptx import OutOfBounds, Race, Uninitialised
from qgm_ext import ops, topology
from qgm_ext.trees import Trees

reason = harness.mock_skip_reason()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason or "nvcc is there")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RULES = ["dsgd", "dsgdm", "dsgdm_n", "relay_grad", "relay_grad_m", "relay_grad_m_n"]
WORKERS = [1, 2, 3, 5, 16, 33, 100]
LENGTHS = [1, 5, 127, 128, 130, 777]


def several(n: int, kinds: list[Callable[[int], topology.Topology]]) -> Trees:
    return Trees(tuple(kind(n).trees().trees[0] for kind in kinds))


TREES: dict[str, Callable[[int], Trees]] = {
    "chain": lambda n: topology.chain(n).trees(),
    "star": lambda n: topology.star(n).trees(),
    "binary": lambda n: topology.binary_tree(n).trees(),
    "double": lambda n: topology.double_binary_trees(n).trees(),
    "three": lambda n: several(n, [topology.chain, topology.binary_tree, topology.chain]),
    "five": lambda n: several(n, [topology.binary_tree, topology.chain] * 2 + [topology.star]),
}
LAYOUTS = {
    "padded": lambda d: {"stride": -(-d // 64) * 64},
    "offset": lambda d: {"stride": -(-d // 4) * 4 + 4, "offset": 3},
    "odd rows": lambda d: {"stride": d + 1 + d % 2},
    "g shifted": lambda d: {"stride": -(-d // 4) * 4 + 8, "shifted_g": 1},
}


class RelayProblem(Problem):
    """Inputs of one relayed step; the messages lie as the state does."""

    def __init__(self, rule: str, n: int, d: int, dtype: torch.dtype, trees: Trees, **layout: int) -> None:
        super().__init__(rule, n, d, dtype, **layout)
        compute = ops.compute_dtype(dtype)
        generator = torch.Generator().manual_seed(n * 31 + d)
        self.trees, self.edges = trees.tensors("cpu"), trees.num_edges
        size = self.edges * self.stride + 16
        self.buffers.append(torch.randn(size, generator=generator, dtype=torch.float64).to(compute))
        self.counts = torch.rand(len(trees.trees), n, generator=generator, dtype=torch.float64).to(compute) * n

    def run(self, step: Callable[..., None], buffers: list[Tensor]) -> list[Tensor]:
        *others, messages = buffers
        x, g, state = self.views(others)
        kept = messages.as_strided((self.edges, self.d), (self.stride, 1), self.offset)
        step(x, g, state, kept, self.trees, self.counts, self.rule, self.hyper)
        return buffers


def check(
    module: MockModule, rule: str, n: int, d: int, dtype: torch.dtype, tree: str, layout: str = "padded"
) -> RelayProblem:
    problem = RelayProblem(rule, n, d, dtype, TREES[tree](n), **LAYOUTS[layout](d))
    expected = problem.run(ops.relay_step_, problem.clones())
    got = problem.run(module.relay_step, problem.clones())
    assert same_bits(got, expected), f"{rule} n={n} D={d} {dtype} {tree} {layout}"
    assert not same_bits(got, problem.buffers)
    return problem


@pytest.fixture(scope="module")
def module() -> MockModule:
    return MockModule(only="relay.cu")


@pytest.fixture(autouse=True)
def fresh(module: MockModule) -> None:
    module.runtime.reset()
    module.runtime.choose_blocks = lambda grid: None


def cases(rule: int, dtype: int) -> list[tuple[int, int, str, str]]:
    """(n, D, tree, layout) for one rule and dtype; over all rules and dtypes every pair of two factors occurs."""
    out = []
    for k, n in enumerate(WORKERS):
        for j, d in enumerate(LENGTHS):
            tree = list(TREES)[(k + 2 * j + rule) % len(TREES)]
            if (k + j + rule + dtype) % 3 == 0:
                out.append((n, d, tree, list(LAYOUTS)[(2 * k + j + rule + dtype) % len(LAYOUTS)]))
    return out


def test_the_chosen_cases_hold_every_pair_of_factors() -> None:
    rows = [
        (rule, dtype, *case) for r, rule in enumerate(RULES) for t, dtype in enumerate(DTYPES) for case in cases(r, t)
    ]
    factors = [RULES, DTYPES, WORKERS, LENGTHS, list(TREES), list(LAYOUTS)]
    for a in range(len(factors)):
        for b in range(a):
            missing = {(p, q) for p in factors[a] for q in factors[b]} - {(row[a], row[b]) for row in rows}
            assert not missing, missing


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_relay_step_gives_the_bits_of_the_cpu(module: MockModule, rule: str, dtype: torch.dtype) -> None:
    for n, d, tree, layout in cases(RULES.index(rule), DTYPES.index(dtype)):
        check(module, rule, n, d, dtype, tree, layout)
    assert {launch.stream for launch in module.runtime.launches} == {STREAM}
    assert module.runtime.forbidden_calls() == []


@pytest.mark.parametrize(("n", "d", "threads"), [(150, 9, 256), (700, 6, 256), (2100, 3, 256)])
def test_many_workers_narrow_the_tile_and_keep_the_bits(module: MockModule, n: int, d: int, threads: int) -> None:
    check(module, "relay_grad_m_n", n, d, torch.float32, "double")
    block = module.runtime.launches[0].block
    assert block[0] * block[1] <= threads
    assert block[0] < 8 or n < 200


def test_small_shared_memory_narrows_the_tile_and_keeps_the_bits(module: MockModule) -> None:
    """The limits of sm_75: 64 KB a multiprocessor."""
    module.runtime.reset(shared_bytes_opt_in=64 << 10, shared_bytes_per_multiprocessor=64 << 10)
    for n in (16, 100):
        check(module, "dsgdm", n, 130, torch.float32, "double")
        assert all(launch.shared_bytes <= 64 << 10 for launch in module.runtime.launches)


def test_grid_is_persistent_and_blocks_stride_over_the_tiles(module: MockModule) -> None:
    module.runtime.reset(multiprocessors=2, blocks_per_multiprocessor=1)
    for layout in ("padded", "odd rows"):
        check(module, "relay_grad_m", 5, 3000, torch.float32, "double", layout)
    assert {launch.grid for launch in module.runtime.launches} == {(2, 1, 1)}


def test_more_workers_than_shared_memory_holds_is_an_error(module: MockModule) -> None:
    module.runtime.reset(shared_bytes_opt_in=4096, shared_bytes_per_multiprocessor=4096)
    with pytest.raises(RuntimeError, match="relay_step_: one coordinate of all 2000 workers and their messages must"):
        check(module, "dsgd", 2000, 3, torch.float32, "chain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("aligned", [True, False])
def test_relay_step_reaches_elements_beyond_2_to_the_31(module: MockModule, dtype: torch.dtype, aligned: bool) -> None:
    """D and the row strides beyond 2^31 and 2^32; only the last blocks run, in pages that are there."""
    n, d = 3, 2**31 + 777
    stride = 2**31 + (1024 if aligned else 1023)
    runtime = module.runtime
    runtime.reset(multiprocessors=2**24, blocks_per_multiprocessor=32)
    runtime.choose_blocks = lambda grid: [grid[0] - 1]
    rows = {"x": (n, dtype.itemsize), "g": (n, dtype.itemsize), "state": (n, 4), "messages": (2 * (n - 1), 4)}
    places = {
        name: runtime.memory.add_sparse(name, ((count - 1) * stride + d) * size) for name, (count, size) in rows.items()
    }
    trees, counts = topology.double_binary_trees(n).trees().tensors("cpu"), torch.ones(2, n)
    try:
        with runtime.mapped(offsets=trees[0], senders=trees[1], reverse=trees[2], counts=counts):
            module.module.relay_step(
                "dsgdm",
                kernel_module.DTYPES[dtype],
                places["x"].base,
                places["g"].base,
                [places["state"].base],
                n,
                d,
                stride,
                stride,
                stride,
                len(counts),
                *(tensor.data_ptr() for tensor in trees),
                places["messages"].base,
                stride,
                counts.data_ptr(),
                [0.5, 0.5, 0.5],
                0,
                STREAM,
            )
        results = [launch.result for launch in runtime.launches if launch.result]
        for name in ("x", "state", "messages"):
            assert sum(result.stored_bytes[name] for result in results) > 0
        assert max(launch.grid[0] for launch in runtime.launches) > 2**14
    finally:
        for place in places.values():
            runtime.memory.remove(place)


def test_errors_name_the_op_and_come_before_a_launch(module: MockModule) -> None:
    problem = RelayProblem("dsgdm", 3, 8, torch.float32, TREES["chain"](3))
    x, g, state = problem.views(problem.buffers[:-1])
    messages = problem.buffers[-1].as_strided((4, 8), (8, 1))
    with pytest.raises(ValueError, match="relay_step_: rule 'qg_dsgdm' can't be relayed"):
        module.relay_step(x, g, state, messages, problem.trees, problem.counts, "qg_dsgdm", problem.hyper)
    with pytest.raises(ValueError, match="rule dsgdm takes 1 state vectors, got 0"):
        module.relay_step(x, g, [], messages, problem.trees, problem.counts, "dsgdm", problem.hyper)
    assert module.runtime.launches == []
    module.runtime.set_driver(False)
    with pytest.raises(RuntimeError, match=r"relay_step_: .*there is no NVIDIA driver here"):
        check(module, "dsgd", 2, 8, torch.float32, "chain")


# ------------------------------------------------------------------------------------------------ memory traffic
@pytest.fixture(scope="module")
def counting() -> MockModule:
    return MockModule(only="relay.cu", statistics=True, races=False)


@pytest.mark.parametrize(
    ("n", "tree", "dtype"),
    [
        (16, "chain", torch.float32),
        (16, "double", torch.bfloat16),
        (16, "double", torch.float64),
        (32, "binary", torch.float32),
        (64, "chain", torch.bfloat16),
    ],
    ids=str,
)
def test_relayed_step_moves_every_element_once(counting: MockModule, n: int, tree: str, dtype: torch.dtype) -> None:
    d = 3200
    problem = RelayProblem("dsgdm_n", n, d, dtype, TREES[tree](n), **LAYOUTS["padded"](d))
    counting.runtime.reset(multiprocessors=1, blocks_per_multiprocessor=2)
    problem.run(counting.relay_step, problem.buffers)
    (launch,) = counting.runtime.launches
    result = launch.result
    assert result is not None
    x_bytes, state_bytes = n * d * dtype.itemsize, n * d * ops.compute_dtype(dtype).itemsize
    message_bytes = 2 * (n - 1) * d * ops.compute_dtype(dtype).itemsize
    once = {"x": x_bytes, "g": x_bytes, "state[0]": state_bytes, "messages": message_bytes}
    assert {name: result.loaded_bytes[name] for name in once} == once
    assert {name: size for name, size in result.stored_bytes.items() if size} == {
        name: size for name, size in once.items() if name != "g"
    }
    assert result.total("sectors", "global") <= 1.05 * result.total("ideal_sectors", "global")
    vectors = [site for site in result.sites if site.space == "shared" and site.size == 16]
    assert vectors
    assert sum(site.wavefronts for site in vectors) == sum(site.ideal_wavefronts for site in vectors)


def test_x_is_read_again_for_merge_only_where_a_thread_has_several_rows(counting: MockModule) -> None:
    d = 320
    for n, reads in ((32, 1), (33, 2)):
        problem = RelayProblem("relay_grad", n, d, torch.float32, TREES["chain"](n), **LAYOUTS["padded"](d))
        counting.runtime.reset()
        problem.run(counting.relay_step, problem.buffers)
        (launch,) = counting.runtime.launches
        assert launch.result is not None
        assert launch.result.loaded_bytes["x"] == reads * n * d * 4


# ------------------------------------------------------------------------------------------------ the proof can fail
@pytest.mark.parametrize(
    ("fault", "n", "layout", "error"),
    [
        ("QGM_FAULT_NO_BARRIER", 16, "padded", (Race, Uninitialised)),
        ("QGM_FAULT_NO_BARRIER", 5, "odd rows", (Race, Uninitialised)),
        ("QGM_FAULT_TAIL", 5, "odd rows", (OutOfBounds, Race)),
    ],
)
def test_injected_fault_is_found(fault: str, n: int, layout: str, error: tuple[type[Exception], ...]) -> None:
    faulty = MockModule([fault], only="relay.cu")
    problem = RelayProblem("dsgdm", n, 130, torch.float32, TREES["binary"](n), **LAYOUTS[layout](130))
    with pytest.raises(error):
        problem.run(faulty.relay_step, problem.buffers)
