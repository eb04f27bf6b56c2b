"""The native ops: same bits on every path, and every wrong argument named.

Compared with torch.equal: the fused pass, the local_step_/merge_ pair, every SIMD level, thread counts, and plain
numpy (numpy_rules).
"""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch

from numpy_rules import block_sums, gossip_step
from qgm_ext import _cpu, ops, reference, topology
from qgm_ext.mixing import Mixing
from rows import RULES

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 15, 16, 17, 127, 128, 129, 1001]
TOPOLOGIES = {
    "identity": lambda n: topology.from_matrix(np.eye(n), allow_disconnected=True),
    "ring": topology.ring,
    "star": topology.star,
    "complete": topology.complete,
    "one_peer": topology.one_peer_exponential,
}


def hyper_of(rule: str) -> list[float]:
    return list(RULES[rule].hyper)


def row_scalars_of(rule: str, n: int, dtype: torch.dtype) -> torch.Tensor | None:
    count = ops.rules()[rule].row_scalars
    if not count:
        return None
    values = torch.rand(n, count, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (0.5 + values).to(ops.compute_dtype(dtype))


def problem(rule: str, n: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    compute = ops.compute_dtype(dtype)
    state = [
        torch.randn(n, dim, generator=generator, dtype=torch.float64).to(compute)
        for _ in range(ops.rules()[rule].states)
    ]
    for k in RULES[rule].not_negative:
        state[k].abs_()
    return x, g, *state


def new_block_sums(rule: str, x: torch.Tensor) -> torch.Tensor | None:
    return None if ops.rules()[rule].norm_state < 0 else ops.new_block_sums(x).fill_(float("nan"))


def check_block_sums(rule: str, sums: torch.Tensor | None, state: list[torch.Tensor]) -> None:
    """They give the norm of the new state to the bit."""
    if sums is not None:
        assert torch.equal(ops.sum_blocks(sums), ops.squared_norms(state[ops.rules()[rule].norm_state]))


def fused(x: torch.Tensor, g: torch.Tensor, state: list[torch.Tensor], mixing: Mixing, rule: str, hyper: list[float]):
    x, state = x.clone(), [vector.clone() for vector in state]
    tensors, scalars = mixing.tensors("cpu", ops.compute_dtype(x.dtype)), row_scalars_of(rule, len(x), x.dtype)
    sums = new_block_sums(rule, x)
    ops.gossip_step_(x, g, state, tensors, mixing.form, rule, hyper, scalars, sums)
    check_block_sums(rule, sums, state)
    return x, state


def split(x: torch.Tensor, g: torch.Tensor, state: list[torch.Tensor], mixing: Mixing, rule: str, hyper: list[float]):
    """The same step by local_step_ and merge_, one call a worker."""
    x, state = x.clone(), [vector.clone() for vector in state]
    n, compute, count = len(x), ops.compute_dtype(x.dtype), ops.rules()[rule].messages
    messages = [[torch.full(x.shape[1:], float("nan"), dtype=compute) for _ in range(count)] for _ in range(n)]
    scalars = row_scalars_of(rule, n, x.dtype)
    own = [None] * n if scalars is None else list(scalars)
    sums = new_block_sums(rule, x)
    for i in range(n):
        ops.local_step_(x[i], g[i], [vector[i] for vector in state], messages[i], rule, hyper, own[i])
    for i in range(n):
        columns, weights = mixing.row(i)
        received = [messages[j][k] for k in range(count) for j in columns]
        states, mean = [vector[i] for vector in state], mixing.form == "mean"
        numbers = (own[i], None if sums is None else sums[i])
        ops.merge_(x[i], g[i], states, received, weights.tolist(), mean, rule, hyper, *numbers)
    check_block_sums(rule, sums, state)
    return x, state


def assert_same_bits(a, b) -> None:
    for left, right in zip([a[0], *a[1]], [b[0], *b[1]], strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right), f"{(left != right).sum()} of {left.numel()} differ"


@pytest.fixture
def restore_simd_and_threads():
    level, threads = _cpu.simd_level(), torch.get_num_threads()
    elements = _cpu.set_elements_per_thread(1000)
    yield
    _cpu.set_elements_per_thread(elements)
    _cpu.set_simd_level(level)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_gossip_step_equals_numpy_and_split_step(rule, dtype):
    # Every rule runs in the same loops: three of them, with one and two messages, meet every size; the rest some.
    thorough = rule in ("dsgd", "qg_dsgdm_n", "gradient_tracking")
    workers, sizes = ([1, 2, 3, 8], SIZES) if thorough else ([1, 4], [1, 17, 257])
    for n, dim, (name, build) in itertools.product(workers, sizes, TOPOLOGIES.items()):
        x, g, *state = problem(rule, n, dim, dtype, seed=dim)
        mixing, hyper = build(n).mixing(0), hyper_of(rule)
        result = fused(x, g, state, mixing, rule, hyper)
        scalars = row_scalars_of(rule, n, dtype)
        assert_same_bits(result, gossip_step(x, g, state, mixing, rule, hyper, scalars))
        assert_same_bits(result, split(x, g, state, mixing, rule, hyper))
        assert torch.isfinite(result[0]).all(), (n, dim, name)


def test_every_compiled_rule_has_a_row():
    assert set(RULES) == set(ops.rules())


@pytest.mark.parametrize("degree", [2, 3, 4, 5, 6, 7, 8, 9, 13])
def test_rows_of_every_degree_are_summed_in_ascending_order(degree):
    n = 13
    matrix = sum(np.roll(np.eye(n), shift, axis=1) for shift in range(degree)) / degree
    mixing = Mixing.from_csr(np.arange(n + 1) * degree, np.nonzero(matrix)[1], np.linspace(0.1, 1.0, n * degree))
    x, g, *state = problem("qg_dsgdm_n", n, 300, torch.float32)
    hyper = hyper_of("qg_dsgdm_n")
    assert_same_bits(
        fused(x, g, state, mixing, "qg_dsgdm_n", hyper), gossip_step(x, g, state, mixing, "qg_dsgdm_n", hyper)
    )


@pytest.mark.usefixtures("restore_simd_and_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_bits_do_not_depend_on_simd_level_or_threads(rule, dtype):
    thorough = rule in ("dsgd", "qg_dsgdm_n", "gradient_tracking")
    n, dim = 5, 20_001  # with the lowered limit, large enough for seven threads
    x, g, *state = problem(rule, n, dim, dtype)
    mixing, hyper = topology.ring(n).mixing(), hyper_of(rule)
    results, reductions = [], []
    levels = ["baseline", "avx2", "avx512"]
    for level in levels[: levels.index(_cpu.build_info()["simd_best"]) + 1]:
        for threads in (1, 2, 3, 7) if thorough else (1, 2):
            _cpu.set_simd_level(level)
            torch.set_num_threads(threads)
            results.append(fused(x, g, state, mixing, rule, hyper))
            results.append(split(x, g, state, mixing, rule, hyper))
            reductions.append((ops.squared_norms(x), [ops.consensus_distance(x)]))
    assert len(results) >= 4
    for other in results[1:]:
        assert_same_bits(results[0], other)
    for other in reductions[1:]:
        assert_same_bits(reductions[0], other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sixteen_bit_values_convert_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.reshape(2, -1).clone()
    identity = topology.from_matrix(np.eye(2), allow_disconnected=True).mixing()
    zero = torch.zeros_like(x)
    unchanged, _ = fused(x, zero, [], identity, "dsgd", [0.0, 0.0])
    finite = torch.isfinite(x)
    assert torch.equal(unchanged[finite], x[finite])
    assert torch.isnan(unchanged[torch.isnan(x)]).all()
    # Rounding: -eta g with x = 0 takes float32 values between and beyond the 16-bit ones, subnormals included.
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(2, 400_000, generator=generator).mul_(
        10.0 ** torch.randint(-9, 6, (2, 400_000), generator=generator)
    )
    g = g.to(dtype)
    for eta in (0.1, 1 / 3, 7.77):
        rounded, _ = fused(torch.zeros_like(g), g, [], identity, "dsgd", [eta, 0.0])
        expected = (0 - torch.tensor(eta, dtype=torch.float32) * g.float()).to(dtype)
        keep = torch.isfinite(g)
        assert torch.equal(rounded[keep], expected[keep])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.startswith("qg_dsgdm")])
def test_lr_zero_moves_x_by_mixing_alone_and_keeps_the_momentum(rule):
    x, g, *state = problem(rule, 4, 50, torch.float64)
    x_new, state_new = fused(x, g, state, topology.ring(4).mixing(), rule, [0.0, *hyper_of(rule)[1:]])
    torch.testing.assert_close(x_new, torch.tensor(topology.ring(4).matrix()) @ x, rtol=1e-14, atol=1e-14)
    for before, after in zip(state, state_new, strict=True):
        assert torch.equal(before, after)


def test_rows_with_any_stride_are_stepped_and_padding_is_untouched():
    rule, n, dim = "qg_dsgdm_n", 3, 100
    mixing, hyper = topology.ring(n).mixing(), hyper_of(rule)
    x, g, m = problem(rule, n, dim, torch.float32)
    wide = [torch.full((n, dim + extra), 7.0) for extra in (1, 28, 3)]
    for buffer, values in zip(wide, (x, g, m), strict=True):
        buffer[:, :dim] = values
    xv, gv, mv = (buffer[:, :dim] for buffer in wide)
    ops.gossip_step_(xv, gv, [mv], mixing.tensors(), mixing.form, rule, hyper)
    assert_same_bits((xv, [mv]), fused(x, g, [m], mixing, rule, hyper))
    assert all((buffer[:, dim:] == 7.0).all() for buffer in wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("dim", [1, 255, 256, 257, 4096, 4097, 70_000])
def test_reductions_match_the_reference(dtype, dim):
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ops.squared_norms(x), reference.squared_norms(x), rtol=tolerance, atol=0)
    torch.testing.assert_close(ops.consensus_distance(x), reference.consensus_distance(x), rtol=tolerance, atol=1e-12)
    assert ops.rows_are_finite(x).tolist() == [True] * 5
    x[1, dim - 1], x[3, 0] = float("inf"), float("nan")
    assert ops.rows_are_finite(x).tolist() == [True, False, True, False, True] == reference.rows_are_finite(x).tolist()


def test_squared_norm_follows_its_documented_order_of_summation():
    x = torch.randn(1, 10_000, generator=torch.Generator().manual_seed(3))
    first, second, third = block_sums(x[0].numpy())
    assert ops.squared_norms(x).item() == first + second + third


@pytest.mark.usefixtures("restore_simd_and_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("dim", [1, 5, 127, 4095, 4096, 4097, 10_000, 20_480])
def test_block_sums_of_a_pass_are_those_of_the_reductions(dtype, dim):
    rule, hyper = "qg_dadam", hyper_of("qg_dadam")
    for n, threads, extra in [(1, 1, 0), (3, 2, 7), (16, 3, 0), (5, 7, 64)]:
        torch.set_num_threads(threads)
        x, g, *state = problem(rule, n, dim + extra, dtype)
        x, g, state = x[:, :dim], g[:, :dim], [vector[:, :dim] for vector in state]
        mixing, scalars = topology.star(n).mixing(), row_scalars_of(rule, n, dtype)
        sums = new_block_sums(rule, x)
        tensors = mixing.tensors("cpu", ops.compute_dtype(dtype))
        ops.gossip_step_(x, g, state, tensors, mixing.form, rule, hyper, scalars, sums)
        assert sums.tolist() == [block_sums(row) for row in state[2].numpy()], (n, threads)
        check_block_sums(rule, sums, state)
        # A worker in pieces that begin where blocks begin, as buckets do.
        pieces = new_block_sums(rule, x[0])
        for begin in range(0, dim, 8192):
            place, blocks = slice(begin, begin + 8192), slice(begin // 4096, begin // 4096 + 2)
            part = [vector[0, place] for vector in state]
            received = [x[0, place].to(state[0].dtype).clone()]
            ops.merge_(x[0, place], g[0, place], part, received, [0.5], False, rule, hyper, scalars[0], pieces[blocks])
        assert pieces.tolist() == block_sums(state[2][0].numpy())


def test_block_of_the_reductions_is_the_one_of_the_native_modules():
    assert ops.REDUCE_BLOCK == _cpu.REDUCE_BLOCK == 4096
    if ops.has_native("cuda"):
        assert importlib.import_module("qgm_ext._cuda").REDUCE_BLOCK == ops.REDUCE_BLOCK


def test_consensus_distance_of_two_workers_by_hand():
    x = torch.tensor([[0.0, 4.0], [2.0, 0.0]])  # means 1 and 2: squares 1 + 4 for each worker
    assert ops.consensus_distance(x).item() == pytest.approx(5.0**0.5)
    assert ops.consensus_distance(x[:1]).item() == 0.0


def call_gossip(**changes):
    x, g, m = problem("qg_dsgdm_n", 3, 8, torch.float32)
    mixing = topology.ring(3).mixing()
    arguments = {
        "x": x, "g": g, "state": [m], "mixing": mixing.tensors(), "form": "sparse",
        "rule": "qg_dsgdm_n", "hyper": hyper_of("qg_dsgdm_n"),
    }  # fmt: skip
    arguments.update(changes)
    before = [t.clone() for t in (arguments["x"], *arguments["state"])]
    try:
        ops.gossip_step_(**arguments)
    except (TypeError, ValueError):
        after = [arguments["x"], *arguments["state"]]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        raise


SHARED = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "x must be float64, float32, bfloat16 or"),
        ({"x": torch.zeros(24)}, ValueError, r"x must have shape \[n, D\] with n >= 1 and D >= 1, got \[24\]"),
        ({"x": torch.zeros(0, 8)}, ValueError, r"n >= 1 and D >= 1, got \[0, 8\]"),
        ({"x": torch.zeros(8, 3).T}, ValueError, "x must be contiguous along its last dimension"),
        ({"x": torch.zeros(1, 8).expand(3, 8)}, ValueError, "rows of x must not overlap"),
        ({"g": torch.zeros(3, 9)}, ValueError, r"g must be \[3, 8\] float32 on cpu, got \[3, 9\] float32 on cpu"),
        ({"g": torch.zeros(3, 8, dtype=torch.float64)}, ValueError, "g must be .* float32 on cpu, got .* float64"),
        ({"g": torch.zeros(8, 3).T}, ValueError, "g must be contiguous along its last dimension"),
        ({"state": []}, ValueError, "'qg_dsgdm_n' takes 1 state vectors, got 0"),
        ({"state": [torch.zeros(3, 8, dtype=torch.float64)]}, ValueError, r"state\[0\] must be .* float32"),
        ({"hyper": [0.1]}, ValueError, "takes 4 hyper-parameters, got 1"),
        ({"rule": "qg_dsgdm_m"}, ValueError, "rule 'qg_dsgdm_m' is not known, did you mean"),
        ({"form": "spars"}, ValueError, "form must be one of"),
        ({"mixing": topology.ring(4).mixing().tensors()}, ValueError, r"row_offsets must be \[4\] int32"),
        ({"mixing": topology.ring(3).mixing().tensors(dtype=torch.float64)}, ValueError, "weights must be .* float32"),
        ({"x": SHARED[0], "g": SHARED[0]}, ValueError, "x and g overlap in memory|g and x overlap"),
        ({"x": SHARED[0], "state": [SHARED[0]]}, ValueError, "overlap in memory"),
    ],
)  # fmt: skip
def test_gossip_step_names_the_wrong_argument(changes, error, message):
    with pytest.raises(error, match=message):
        call_gossip(**changes)


def test_damaged_mixing_matrix_is_refused_not_read_out_of_bounds():
    offsets, columns, weights = topology.star(3).mixing().tensors()
    far = columns.clone()
    far[0] = 3
    with pytest.raises(ValueError, match="row 0 of the mixing matrix names worker 3, there are 3"):
        call_gossip(mixing=(offsets, far, weights))
    empty = offsets.clone()
    empty[1] = 0
    with pytest.raises(ValueError, match="row 0 of the mixing matrix is empty"):
        call_gossip(mixing=(empty, columns, weights))
    long = offsets.clone()
    long[3] = 100
    with pytest.raises(ValueError, match="row_offsets of the mixing matrix end at 100, but it has 7"):
        call_gossip(mixing=(long, columns, weights))


def test_row_scalars_are_asked_for_and_checked():
    x, g, m = problem("sgp", 3, 8, torch.float32)
    mixing, hyper = topology.ring(3).mixing(), hyper_of("sgp")

    def step(rule, scalars):
        ops.gossip_step_(x, g, [m], mixing.tensors(), mixing.form, rule, hyper, scalars)

    with pytest.raises(ValueError, match="rule 'sgp' takes 2 row_scalars a worker, got none"):
        step("sgp", None)
    with pytest.raises(ValueError, match="rule 'dsgdm' takes no row_scalars"):
        step("dsgdm", torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"row_scalars must be \[3, 2\] float32"):
        step("sgp", torch.ones(3, 1))
    with pytest.raises(ValueError, match="row_scalars must be contiguous"):
        step("sgp", torch.ones(3, 4)[:, :2])


def test_block_sums_are_asked_for_and_checked():
    x, g, *state = problem("qg_dadam", 3, 8, torch.float32)
    mixing, scalars = topology.ring(3).mixing(), torch.ones(3, 2)

    def step(rule, vectors, sums):
        numbers = None if rule == "dsgdm" else scalars
        ops.gossip_step_(x, g, vectors, mixing.tensors(), mixing.form, rule, hyper_of(rule), numbers, sums)

    with pytest.raises(ValueError, match="rule 'qg_dadam' sums squares of its state and needs block_sums, got none"):
        step("qg_dadam", state, None)
    with pytest.raises(ValueError, match="rule 'dsgdm' takes no block_sums"):
        step("dsgdm", state[:1], ops.new_block_sums(x))
    with pytest.raises(ValueError, match=r"block_sums must be \[3, 1\] float64 on cpu, got \[3, 2\] float64"):
        step("qg_dadam", state, torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="block_sums must be contiguous"):
        step("qg_dadam", state, torch.zeros(3, 2, dtype=torch.float64)[:, :1])
    with pytest.raises(ValueError, match=r"sum_blocks: block_sums must be \[n, blocks\] float64, contiguous, got"):
        ops.sum_blocks(torch.zeros(3, 1))


def test_split_ops_name_the_wrong_argument():
    x, g, m = (row[0] for row in problem("qg_dsgdm_n", 1, 8, torch.float32))
    hyper, out = hyper_of("qg_dsgdm_n"), torch.zeros(8)
    with pytest.raises(ValueError, match=r"x must have shape \[D\]"):
        ops.local_step_(x[None], g, [m], [out], "qg_dsgdm_n", hyper)
    with pytest.raises(ValueError, match="makes 1 messages, got 2"):
        ops.local_step_(x, g, [m], [out, out.clone()], "qg_dsgdm_n", hyper)
    with pytest.raises(ValueError, match=r"messages\[0\] must be \[8\] float32"):
        ops.local_step_(x, g, [m], [out[:4]], "qg_dsgdm_n", hyper)
    with pytest.raises(ValueError, match="overlap in memory"):
        ops.local_step_(x, g, [m], [x], "qg_dsgdm_n", hyper)
    with pytest.raises(ValueError, match="as many tensors as there are weights"):
        ops.merge_(x, g, [m], [out], [0.5, 0.5], False, "qg_dsgdm_n", hyper)
    with pytest.raises(ValueError, match="as many tensors as there are weights"):
        ops.merge_(x, g, [m], [], [], False, "qg_dsgdm_n", hyper)
    with pytest.raises(ValueError, match=r"received\[0\] must be \[8\] float32"):
        ops.merge_(x, g, [m], [out.double()], [1.0], False, "qg_dsgdm_n", hyper)


def test_prepared_halves_take_the_step_again_and_again_and_check_their_numbers():
    x, g, m, out, other = (torch.randn(300) for _ in range(5))
    hyper = hyper_of("qg_dsgdm_n")
    expected = [x.clone(), m.clone(), out.clone()]
    make = ops.prepare_local_step(x, g, [m], [out], "qg_dsgdm_n")
    merge = ops.prepare_merge(x, g, [m], [out, other], [0.25, 0.75], False, "qg_dsgdm_n")
    for step in range(3):
        numbers = [value / (step + 1) for value in hyper]
        make(numbers)
        merge(numbers)
        ops.local_step_(expected[0], g, [expected[1]], [expected[2]], "qg_dsgdm_n", numbers)
        received = [expected[2], other]
        ops.merge_(expected[0], g, [expected[1]], received, [0.25, 0.75], False, "qg_dsgdm_n", numbers)
        assert all(map(torch.equal, [x, m, out], expected))
    x.share_memory_()  # moves it
    merge(hyper)
    ops.merge_(expected[0], g, [expected[1]], received, [0.25, 0.75], False, "qg_dsgdm_n", hyper)
    assert torch.equal(x, expected[0])
    before = x.clone()
    for half in (make, merge):
        with pytest.raises(ValueError, match=r"takes \d+ hyper-parameters, got 1$"):
            half([0.1])
        with pytest.raises(ValueError, match="takes no row_scalars"):
            half(hyper, torch.ones(1))
    with pytest.raises(ValueError, match="takes no block_sums"):
        merge(hyper, None, torch.ones(1, dtype=torch.float64))
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="overlap in memory"):
        ops.prepare_local_step(x, g, [m], [x], "qg_dsgdm_n")


def test_ops_pass_opcheck():
    x, g, m = problem("qg_dsgdm_n", 4, 33, torch.float32)
    mixing, hyper = topology.ring(4).mixing(), hyper_of("qg_dsgdm_n")
    library = torch.ops.qgm_ext
    torch.library.opcheck(
        library.gossip_step_.default, (x, g, [m], *mixing.tensors(), mixing.form, "qg_dsgdm_n", hyper)
    )
    out = torch.zeros(33)
    torch.library.opcheck(library.local_step_.default, (x[0], g[0], [m[0]], [out], "qg_dsgdm_n", hyper))
    torch.library.opcheck(
        library.merge_.default, (x[0], g[0], [m[0]], [out, x[1].clone()], [0.5, 0.5], False, "qg_dsgdm_n", hyper)
    )
    for reduction in (library.squared_norms, library.consensus_distance, library.rows_are_finite):
        torch.library.opcheck(reduction.default, (x,))
    x, g, *state = problem("qg_dadam", 4, 33, torch.float32)
    tensors, hyper, sums = mixing.tensors(), hyper_of("qg_dadam"), ops.new_block_sums(x)
    scalars = row_scalars_of("qg_dadam", 4, torch.float32)
    torch.library.opcheck(
        library.gossip_step_.default, (x, g, state, *tensors, mixing.form, "qg_dadam", hyper, scalars, sums)
    )
    torch.library.opcheck(library.sum_blocks.default, (sums,))


@pytest.mark.slow
def test_ops_run_under_torch_compile():
    x, g, m = problem("qg_dsgdm_n", 4, 33, torch.float32)
    mixing, hyper = topology.ring(4).mixing(), hyper_of("qg_dsgdm_n")
    expected = fused(x, g, [m], mixing, "qg_dsgdm_n", hyper)

    def step(x, g, m, *tensors):
        ops.gossip_step_(x, g * 1.0, [m], tensors, mixing.form, "qg_dsgdm_n", hyper)
        return x.sum()

    torch.compile(step, backend="aot_eager", fullgraph=True)(x, g, m, *mixing.tensors())
    assert_same_bits((x, [m]), expected)


def test_has_native_knows_its_devices():
    assert ops.has_native("cpu")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        ops.has_native("tpu")
