"""The whole CUDA extension, launchers and kernels as nvcc compiles them, against the CPU backend, bit for bit.

Every launch runs on the PTX machine (README.md), which also stops at any access outside a tensor, at misalignment, at
reads of what nothing wrote, and at races. The bytes of whole buffers are compared, so padding must be untouched.

By default every pair of the factors rule, dtype, n, D, topology and layout occurs in some case. The full product is
behind the marker ``exhaustive``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import harness
import kernel_module
from kernel_module import STREAM, MockModule, Problem, same_bits
from ptx import OutOfBounds, Race, Uninitialised
from qgm_ext import ops, topology

reason = harness.mock_skip_reason()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason or "nvcc is there")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WORKERS = [1, 2, 3, 5, 16, 33, 100]
LENGTHS = [1, 5, 127, 128, 130, 777]
TOPOLOGIES = ["ring", "star", "complete", "identity"]
RULES = sorted(ops.rules())
# Rows padded as the project pads them; aligned but starting off a vector; rows that are aligned differently; g off x.
LAYOUTS = {
    "padded": lambda d: {"stride": -(-d // 64) * 64},
    "offset": lambda d: {"stride": -(-d // 4) * 4 + 4, "offset": 3},
    "odd rows": lambda d: {"stride": d + 1 + d % 2},
    "g shifted": lambda d: {"stride": -(-d // 4) * 4 + 8, "shifted_g": 1},
}


@pytest.fixture(scope="module")
def module() -> MockModule:
    return kernel_module.open_module()


@pytest.fixture(autouse=True)
def fresh(module: MockModule) -> None:
    module.runtime.reset()
    module.runtime.choose_blocks = lambda grid: None


def test_every_rule_of_the_cpu_is_in_the_cuda_module(module: MockModule) -> None:
    table = {name: entry for name, (_, entry) in module.rules.items()}
    expected = {name: rule._asdict() for name, rule in ops.rules().items()}
    for rule in expected.values():
        del rule["code"]
    assert table == expected


def mixing_of(name: str, n: int) -> topology.Mixing:
    if name == "identity":
        return topology.Mixing.from_matrix(torch.eye(n).numpy())
    return getattr(topology, name)(n).mixing()


def check_gossip(module: MockModule, rule: str, n: int, d: int, dtype: torch.dtype, mixing: str, layout: str) -> None:
    problem = Problem(rule, n, d, dtype, **LAYOUTS[layout](d))
    matrix = topology.social().mixing() if mixing == "social" else mixing_of(mixing, n)
    expected, got, sums = problem.clones(), problem.clones(), (problem.block_sums(), problem.block_sums())
    x, g, state = problem.views(expected)
    tensors = matrix.tensors(dtype=ops.compute_dtype(dtype))
    ops.gossip_step_(x, g, state, tensors, matrix.form, rule, problem.hyper, problem.row_scalars, *sums[0])
    x, g, state = problem.views(got)
    module.gossip_step(x, g, state, matrix, rule, problem.hyper, problem.row_scalars, *sums[1])
    assert same_bits([*got, *sums[1]], [*expected, *sums[0]]), f"{rule} n={n} D={d} {dtype} {mixing} {layout}"
    assert not same_bits(got, problem.buffers)


def pairwise(rule: int, dtype: int) -> list[tuple[int, int, str, str]]:
    """(n, D, topology, layout) for one rule and dtype; over all rules and dtypes every pair of two factors occurs."""
    cases = []
    for k, n in enumerate(WORKERS):
        for j, d in enumerate(LENGTHS):
            if (k + j + rule + dtype) % 3 == 0:
                mixing = TOPOLOGIES[(k + 2 * j + rule) % len(TOPOLOGIES)]
                layout = list(LAYOUTS)[(2 * k + j + rule + dtype) % len(LAYOUTS)]
                cases.append((n, d, mixing, layout))
    return cases


def test_the_chosen_cases_hold_every_pair_of_factors() -> None:
    factors = [RULES, DTYPES, WORKERS, LENGTHS, TOPOLOGIES, list(LAYOUTS)]
    rows = [
        (rule, dtype, *case)
        for r, rule in enumerate(RULES)
        for t, dtype in enumerate(DTYPES)
        for case in pairwise(r, t)
    ]
    for a in range(len(factors)):
        for b in range(a):
            assert {(row[a], row[b]) for row in rows} == {(p, q) for p in factors[a] for q in factors[b]}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_gossip_step_gives_the_bits_of_the_cpu(module: MockModule, rule: str, dtype: torch.dtype) -> None:
    for n, d, mixing, layout in pairwise(RULES.index(rule), DTYPES.index(dtype)):
        check_gossip(module, rule, n, d, dtype, mixing, layout)
    check_gossip(module, rule, 32, 130, dtype, "social", "padded")
    assert {launch.stream for launch in module.runtime.launches} == {STREAM}
    assert module.runtime.forbidden_calls() == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_gossip_step_gives_the_bits_of_the_cpu_in_the_full_product(
    module: MockModule, rule: str, dtype: torch.dtype
) -> None:
    for n in WORKERS:
        for d in LENGTHS:
            for k, mixing in enumerate(TOPOLOGIES):
                check_gossip(module, rule, n, d, dtype, mixing, list(LAYOUTS)[(n + d + k) % len(LAYOUTS)])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_local_step_and_merge_give_the_bits_of_the_cpu(module: MockModule, rule: str, dtype: torch.dtype) -> None:
    compute, messages = ops.compute_dtype(dtype), ops.rules()[rule].messages
    for k, d in enumerate([1, 5, 128, 777, 1500]):
        problem = Problem(rule, 1, d, dtype, offset=k % 3, shifted_g=k // 4)
        scalars = None if problem.row_scalars is None else problem.row_scalars[0]
        generator = torch.Generator().manual_seed(d)
        results = []
        for backend in (ops.local_step_, module.local_step):
            buffers = problem.clones()
            x, g, state = (v[0] if isinstance(v, torch.Tensor) else [s[0] for s in v] for v in problem.views(buffers))
            out = [torch.zeros(d + 4, dtype=compute)[k % 3 : k % 3 + d] for _ in range(messages)]
            backend(x, g, state, out, rule, problem.hyper, scalars)
            results.append([*buffers, *out])
        assert same_bits(*results), f"local_step_ {rule} D={d} {dtype}"

        terms, mean = [1, 2, 3, 5, 11][k], k % 2 == 1
        received = [
            torch.randn(d + 4, generator=generator).to(compute)[k % 3 : k % 3 + d] for _ in range(terms * messages)
        ]
        weights = torch.rand(terms, generator=generator, dtype=torch.float64).tolist()
        results = []
        for step in (ops.merge_, module.merge):
            buffers, sums = problem.clones(), [one[0] for one in problem.block_sums()]
            x, g, state = (v[0] if isinstance(v, torch.Tensor) else [s[0] for s in v] for v in problem.views(buffers))
            step(x, g, state, [r.clone() for r in received], weights, mean, rule, problem.hyper, scalars, *sums)
            results.append([*buffers, *sums])
        assert same_bits(*results), f"merge_ {rule} D={d} {dtype} terms={terms}"
    assert module.runtime.forbidden_calls() == []


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 257), (5, 4095), (2, 4096), (3, 4097), (2, 9001)])
def test_reductions_give_the_bits_of_the_cpu(module: MockModule, dtype: torch.dtype, n: int, d: int) -> None:
    x = torch.randn(n, d + 3, generator=torch.Generator().manual_seed(d), dtype=torch.float64).to(dtype)[:, 1 : d + 1]
    for name in ("squared_norms", "consensus_distance", "rows_are_finite"):
        assert torch.equal(module.reduce(name, x), getattr(ops, name)(x)), name
    for value in (float("inf"), float("-inf"), float("nan")):
        broken = x.clone()
        broken[n - 1, d - 1] = value
        assert module.reduce("rows_are_finite", broken).tolist() == [True] * (n - 1) + [False]


def test_squared_norms_add_many_blocks_in_order(module: MockModule) -> None:
    """More blocks of coordinates than one piece of the second kernel holds."""
    x = torch.randn(1, 300 * 4096 + 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(module.reduce("squared_norms", x), ops.squared_norms(x))
    sums = torch.rand(3, 301, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(module.sum_blocks(sums), ops.sum_blocks(sums))


# ------------------------------------------------------------------------------------------------ norms
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize(
    ("n", "d", "mixing", "layout", "left"),
    [
        (2, 16 * 4096 + 1, "complete", "padded", 1),  # the last block is one coordinate, which is no vector
        (5, 16_383, "star", "padded", 3),
        (5, 16_384, "identity", "padded", 0),
        (33, 4097, "complete", "padded", 1),
        (70, 4095, "ring", "padded", 3),
        (5, 4095, "ring", "padded", 4095),  # too few strips
        (5, 16_383, "ring", "offset", 16_383),  # a vector may belong to two blocks
        (3, 4097, "star", "odd rows", 4097),
    ],
)
def test_norm_of_a_pass_has_the_bits_of_the_cpu(
    module: MockModule, n: int, d: int, mixing: str, layout: str, left: int, dtype: torch.dtype
) -> None:
    """``left``: how many coordinates of each worker the kernel that ends the sums must still read (float32)."""
    module.runtime.reset(multiprocessors=2 if n > 30 else 1, blocks_per_multiprocessor=1)
    check_gossip(module, "qg_dadam", n, d, dtype, mixing, layout)
    compute = ops.compute_dtype(dtype)
    if dtype == torch.float64 and layout == "padded" and left < d:
        left = d % 2
    last = module.runtime.launches[-1]
    assert "block_sums_of" in last.kernel
    assert last.result is not None
    assert last.result.loaded_bytes["state[2]"] == n * left * compute.itemsize
    assert module.runtime.forbidden_calls() == []


def merge_problem(rule: str, d: int, dtype: torch.dtype, offset: int) -> tuple[Problem, list[torch.Tensor]]:
    """A worker's vectors, and three messages that came."""
    generator = torch.Generator().manual_seed(d)
    compute = ops.compute_dtype(dtype)
    received = [torch.randn(d + 4, generator=generator).to(compute)[offset : offset + d] for _ in range(3)]
    return Problem(rule, 1, d, dtype, offset=offset), received


def merge(step: Callable[..., None], problem: Problem, received: list[torch.Tensor]) -> list[torch.Tensor]:
    """All that a merge_ leaves: the buffers and the sums of blocks."""
    buffers, (sums,) = problem.clones(), problem.block_sums()
    x, g, state = problem.views(buffers)
    weights, scalars = [0.2, 0.5, 0.3], problem.row_scalars[0]
    mine = [vector[0] for vector in state]
    step(x[0], g[0], mine, received, weights, False, problem.rule, problem.hyper, scalars, sums[0])
    return [*buffers, sums]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize(
    ("rule", "d", "offset"),
    [
        ("qg_dadam", 3 * 4096 + 5, 0),  # the last block is a vector and a coordinate
        ("qg_dadam_v1", 4097, 0),  # the last block is no vector
        ("qg_dadam_v2", 4096, 0),
        ("qg_dadam", 4099, 1),  # a vector would belong to two blocks
    ],
)
def test_norm_of_merge_has_the_bits_of_the_cpu_and_takes_no_second_launch(
    module: MockModule, rule: str, d: int, offset: int, dtype: torch.dtype
) -> None:
    module.runtime.reset(multiprocessors=2, blocks_per_multiprocessor=1)  # fewer blocks of threads than of the sum
    problem, received = merge_problem(rule, d, dtype, offset)
    assert same_bits(merge(module.merge, problem, received), merge(ops.merge_, problem, received))
    (launch,) = module.runtime.launches
    assert "merge_blocks" in launch.kernel
    assert launch.grid == (min(2, -(-d // 4096)), 1, 1)
    assert module.runtime.forbidden_calls() == []


# ------------------------------------------------------------------------------------------------ other paths
@pytest.mark.parametrize(
    ("n", "d", "name", "kernel"),
    [(256, 8, "ring", "gossip_tile"), (300, 8, "ring", "gossip_columns"), (2100, 3, "ring", "gossip_columns")],
)
def test_many_workers_take_another_path_with_the_same_bits(
    module: MockModule, n: int, d: int, name: str, kernel: str
) -> None:
    check_gossip(module, "qg_dsgdm_n", n, d, torch.float32, name, "padded")
    assert kernel in module.runtime.launches[0].kernel


def test_small_shared_memory_narrows_the_tile_and_keeps_the_bits(module: MockModule) -> None:
    """The limits of sm_75: 64 KB a multiprocessor."""
    module.runtime.reset(shared_bytes_opt_in=64 << 10, shared_bytes_per_multiprocessor=64 << 10)
    for n in (33, 100, 300):
        check_gossip(module, "qg_dsgdm_n", n, 130, torch.float32, "complete", "padded")


def test_dense_matrix_too_large_for_shared_memory_is_read_from_device_memory(module: MockModule) -> None:
    dense = torch.rand(200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = topology.Mixing.from_matrix(dense.numpy())
    assert matrix.form == "dense"
    problem = Problem("qg_dsgdm", 200, 5, torch.float32)
    expected, got = problem.clones(), problem.clones()
    x, g, state = problem.views(expected)
    ops.gossip_step_(x, g, state, matrix.tensors(dtype=torch.float32), matrix.form, "qg_dsgdm", problem.hyper)
    x, g, state = problem.views(got)
    module.gossip_step(x, g, state, matrix, "qg_dsgdm", problem.hyper)
    assert same_bits(got, expected)


@pytest.mark.parametrize("layout", ["padded", "odd rows"])
def test_row_without_entries_mixes_to_zero_and_reads_nothing_out_of_bounds(module: MockModule, layout: str) -> None:
    """The CPU refuses such a matrix; a launch cannot look at it."""
    matrix = topology.Mixing.from_matrix([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    problem = Problem("dsgd", 3, 64, torch.float32, **LAYOUTS[layout](64))
    x, g, state = problem.views(problem.buffers)
    module.gossip_step(x, g, state, matrix, "dsgd", problem.hyper)
    assert torch.equal(x[2], torch.zeros(64))
    assert torch.equal(x[0], x[1])


def test_grid_is_persistent_and_blocks_stride_over_the_tiles(module: MockModule) -> None:
    module.runtime.reset(multiprocessors=2, blocks_per_multiprocessor=1)
    check_gossip(module, "qg_dsgdm_n", 5, 5000, torch.float32, "star", "padded")
    check_gossip(module, "qg_dsgdm_n", 5, 777, torch.float32, "star", "odd rows")
    assert {launch.grid for launch in module.runtime.launches} == {(2, 1, 1)}


def test_more_workers_than_shared_memory_holds_is_an_error(module: MockModule) -> None:
    module.runtime.reset(shared_bytes_opt_in=4096, shared_bytes_per_multiprocessor=4096)
    with pytest.raises(RuntimeError, match="gossip_step_: the messages of one coordinate of all 2000 workers must fit"):
        check_gossip(module, "qg_dsgdm_n", 2000, 3, torch.float32, "ring", "padded")


def test_too_many_received_vectors_is_an_error(module: MockModule) -> None:
    problem = Problem("dsgd", 1, 4, torch.float32)
    x, g, _ = problem.views(problem.buffers)
    with pytest.raises(RuntimeError, match="merge_: a CUDA device takes at most 160 received vectors"):
        module.merge(x[0], g[0], [], [torch.zeros(4) for _ in range(161)], [1.0] * 161, False, "dsgd", problem.hyper)


# ------------------------------------------------------------------------------------------------ sizes above 2^31
@pytest.mark.parametrize("rule", ["dsgd", "qg_dsgdm_n"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("aligned", [True, False])
def test_gossip_step_reaches_elements_beyond_2_to_the_31(
    module: MockModule, rule: str, dtype: torch.dtype, aligned: bool
) -> None:
    """D and n times the row stride beyond 2^31 and 2^32; only the last blocks run, in pages that are there."""
    n, d = 3, 2**31 + 777
    stride = 2**31 + (1024 if aligned else 1023)
    runtime, itemsize = module.runtime, dtype.itemsize
    runtime.reset(multiprocessors=2**24, blocks_per_multiprocessor=32)
    runtime.choose_blocks = lambda grid: [grid[0] - 1]
    known = ops.rules()[rule]
    memory = runtime.memory
    big = {"x": itemsize, "g": itemsize, **{f"state[{k}]": 4 for k in range(known.states)}}
    places = {name: memory.add_sparse(name, (n - 1) * stride * size + d * size) for name, size in big.items()}
    matrix = topology.complete(n).mixing()
    try:
        module.module.gossip_step(
            module.rules[rule][0],
            kernel_module.DTYPES[dtype],
            places["x"].base,
            places["g"].base,
            [places[f"state[{k}]"].base for k in range(known.states)],
            n,
            d,
            stride,
            stride,
            stride,
            kernel_module.FORMS[matrix.form],
            0,
            0,
            0,
            0,
            [0.5, 1.0, 0.5, 1.0][: known.hyper],
            0,
            0,
            0,
            0,
            STREAM,
        )
        runtime.raise_fault()
        stored = sum(launch.result.stored_bytes["x"] for launch in runtime.launches if launch.result)
        assert stored > 0
        assert all(launch.grid[0] > 2**14 for launch in runtime.launches if "tile" in launch.kernel)
    finally:
        for place in places.values():
            memory.remove(place)


# ------------------------------------------------------------------------------------------------ errors
def test_missing_driver_is_named_with_the_op(module: MockModule) -> None:
    module.runtime.set_driver(False)
    with pytest.raises(RuntimeError, match=r"gossip_step_: .*there is no NVIDIA driver here"):
        check_gossip(module, "dsgd", 2, 8, torch.float32, "ring", "padded")
    with pytest.raises(RuntimeError, match=r"squared_norms: .*there is no NVIDIA driver here"):
        module.reduce("squared_norms", torch.ones(2, 8))


def test_wrong_device_is_named_with_the_op(module: MockModule) -> None:
    problem = Problem("dsgd", 2, 8, torch.float32)
    x, g, state = problem.views(problem.buffers)
    with pytest.raises(RuntimeError, match=r"gossip_step_: invalid device ordinal \(cudaErrorInvalidDevice\)"):
        module.gossip_step(x, g, state, mixing_of("ring", 2), "dsgd", problem.hyper, device=99)


def test_wrong_counts_are_refused_before_a_launch(module: MockModule) -> None:
    problem = Problem("qg_dsgdm", 2, 8, torch.float32)
    x, g, state = problem.views(problem.buffers)
    with pytest.raises(ValueError, match="rule qg_dsgdm takes 1 state vectors, got 0"):
        module.gossip_step(x, g, [], mixing_of("ring", 2), "qg_dsgdm", problem.hyper)
    with pytest.raises(ValueError, match="rule qg_dsgdm takes 4 hyper-parameters, got 1"):
        module.gossip_step(x, g, state, mixing_of("ring", 2), "qg_dsgdm", [0.1])
    assert module.runtime.launches == []


# ------------------------------------------------------------------------------------------------ the proof can fail
@pytest.mark.parametrize(
    ("fault", "n", "d", "layout", "error"),
    [
        ("QGM_FAULT_NO_BARRIER", 16, 256, "padded", (Race, Uninitialised)),
        ("QGM_FAULT_NO_BARRIER", 5, 64, "odd rows", (Race, Uninitialised)),
        ("QGM_FAULT_TAIL", 5, 64, "odd rows", (OutOfBounds, Race)),
        ("QGM_FAULT_GRID", 5, 600, "padded", (Race,)),
    ],
)
def test_injected_fault_of_the_gossip_step_is_found(
    fault: str, n: int, d: int, layout: str, error: tuple[type[Exception], ...]
) -> None:
    faulty = MockModule([fault], only="qg_dsgdm")
    problem = Problem("qg_dsgdm", n, d, torch.float32, **LAYOUTS[layout](d))
    x, g, state = problem.views(problem.buffers)
    with pytest.raises(error):
        faulty.gossip_step(x, g, state, mixing_of("star", n), "qg_dsgdm", problem.hyper)


@pytest.mark.parametrize(
    ("fault", "error"), [("QGM_FAULT_NO_BARRIER", (Race, Uninitialised)), ("QGM_FAULT_TAIL", (OutOfBounds,))]
)
def test_injected_fault_of_the_reductions_is_found(fault: str, error: tuple[type[Exception], ...]) -> None:
    faulty = MockModule([fault], only="qg_dsgdm")
    for name in ("squared_norms", "consensus_distance"):
        with pytest.raises(error):
            faulty.reduce(name, torch.ones(2, 5000))


def test_injected_tail_fault_of_local_step_and_merge_is_found() -> None:
    faulty = MockModule(["QGM_FAULT_TAIL"], only="qg_dsgdm")
    problem = Problem("qg_dsgdm", 1, 30, torch.float32)
    x, g, state = problem.views(problem.buffers)
    with pytest.raises(OutOfBounds):
        faulty.local_step(x[0], g[0], [state[0][0]], [torch.zeros(30)], "qg_dsgdm", problem.hyper)
    with pytest.raises(OutOfBounds):
        faulty.merge(x[0], g[0], [state[0][0]], [torch.zeros(30)], [1.0], False, "qg_dsgdm", problem.hyper)


@pytest.mark.parametrize(
    ("fault", "error"), [("QGM_FAULT_NO_BARRIER", (Race, Uninitialised)), ("QGM_FAULT_TAIL", (OutOfBounds,))]
)
def test_injected_fault_of_the_norm_of_merge_is_found(fault: str, error: tuple[type[Exception], ...]) -> None:
    faulty = MockModule([fault], only="qg_dadam")
    problem, received = merge_problem("qg_dadam", 4101, torch.float32, 0)
    problem.buffers = [buffer[:4101] for buffer in problem.buffers]
    received = [message.clone() for message in received]
    with pytest.raises(error):
        merge(faulty.merge, problem, received)
