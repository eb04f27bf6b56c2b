"""Gates on the machine code of every kernel, and on the memory traffic of the fused step.

Machine code: no local memory, few enough registers, payload in 16-byte accesses (8 for 16-bit x and g: slice.h says
why), all loads of a tile's rows in flight at once. Traffic, counted by the PTX machine: each element of x, g and the
state once, whole sectors, no bank conflict.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import harness
import kernel_module
import sass
from kernel_module import CSRC, MockModule, Problem
from qgm_ext import ops, topology

sass_reason = sass.sass_skip_reason()
mock_reason = harness.mock_skip_reason()
needs_sass = pytest.mark.skipif(bool(sass_reason), reason=sass_reason or "nvdisasm is there")
needs_mock = pytest.mark.skipif(bool(mock_reason), reason=mock_reason or "nvcc is there")

RULE_SOURCES = kernel_module.rule_sources()
SOURCES = [*RULE_SOURCES, CSRC / "cuda" / "reduce.cu", CSRC / "cuda" / "relay.cu"]
# By default one architecture of each PTX and the newest; the others are behind the marker ``exhaustive``.
ARCHITECTURES = [
    pytest.param(arch, marks=[] if arch in ("sm_75", "sm_90", "sm_120") else pytest.mark.exhaustive)
    for arch in sass.supported_architectures()
]
# What runs once, or once in many steps, is not held to the loads in flight: SlowMo's outer step reads no gradient.
RARE = ("SlowmoOuter", "MomentumTrackingStart")
# Registers a thread: three blocks of 256 threads a multiprocessor for the tile, four for the others. Rules that
# move many vectors, and doubles, which take two registers, run with two blocks: 128 registers.
LIMITS = {
    "gossip_tile": 80,
    "gossip_columns": 80,
    "relay_tile": 80,
    "local_flat": 64,
    "merge_flat": 64,
    "merge_blocks": 64,
}


def name_of(code: sass.KernelCode) -> str:
    match = re.search(r"qgm::cuda::(\w+)<", code.signature)
    assert match, code.signature
    return match[1]


def is_16_bit(code: sass.KernelCode) -> bool:
    return "float16>" in code.signature


def is_double(code: sass.KernelCode) -> bool:
    return re.search(r"double(, \d)?>\(", code.signature) is not None


def main_loop(code: sass.KernelCode, kind: str) -> list[sass.SassInstruction]:
    """Global loads or stores in the loop over tiles, the one that stores; not those that fetch the mixing matrix."""
    loops = {i.loop for i in code.accesses("global", "store", loops_only=True)}
    return [i for i in code.accesses("global", kind) if i.loop in loops]


@needs_sass
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_machine_code_of_every_kernel(source: Path, arch: str) -> None:
    kernels = sass.analyse(source, arch, include=[CSRC])
    assert kernels
    for code in kernels.values():
        name = name_of(code)
        assert not code.uses_local_memory, f"{code.signature} on {arch}"
        light = any(f"rules::{family}::" in code.signature for family in ("dsgd", "qg_dsgdm")) and not is_double(code)
        limit = LIMITS.get(name, 64) if light or name not in LIMITS else 128
        assert code.registers <= limit, f"{code.signature} on {arch}: {code.registers} registers"
        assert not code.accesses("generic"), code.signature
        if name == "gossip_tile":
            widths = {8, 16} if is_16_bit(code) else {16}
            assert {i.width for i in main_loop(code, "load")} <= widths, code.signature
            assert {i.width for i in main_loop(code, "store")} <= widths, code.signature
            assert {i.width for i in code.accesses("shared", "store")} <= {4, 8, 16}
            # x and g of all rows of a thread, before the first is needed
            if any(rule in code.signature for rule in RARE):
                continue
            assert code.load_bytes_in_flight() >= (64 if is_16_bit(code) else 128), code.signature
        if name == "relay_tile" and ", 1>(" not in code.signature:
            widths = {8, 16} if is_16_bit(code) else {16}
            # The trees, 4 bytes, and the counts, 4 or 8, come through L1, one address for all lanes.
            trees = {4, 8} if is_double(code) else {4}
            assert {i.width for i in code.accesses("global", "load")} <= widths | trees, code.signature
            assert {i.width for i in code.accesses("global", "store")} <= widths, code.signature
            assert {i.width for i in code.accesses("shared", "store")} == {16}, code.signature
            # x, g and the state if there is one, and two messages of the last step; for a rule without state at least
            # two of these four
            assert code.load_bytes_in_flight() >= (32 if is_16_bit(code) or is_double(code) else 64), code.signature
        if name in ("local_flat", "merge_flat", "merge_blocks"):
            assert max(i.width for i in code.accesses("global", "store")) == (16 if "local" in name else payload(code))


def payload(code: sass.KernelCode) -> int:
    """Widest store of a merge: 16 bytes, or 8 where only a 16-bit x is written."""
    stores_state = any(i.width == 16 for i in code.accesses("global", "store"))
    return 16 if stores_state or not is_16_bit(code) else 8


@pytest.fixture(scope="module")
def counting() -> MockModule:
    if mock_reason:
        pytest.skip(mock_reason)
    return MockModule(statistics=True, races=False)


@needs_mock
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize(("n", "name"), [(1, "identity"), (4, "ring"), (16, "ring"), (16, "complete"), (64, "torus")])
def test_fused_step_moves_every_element_once(counting: MockModule, dtype: torch.dtype, n: int, name: str) -> None:
    d = 10048
    problem = Problem("qg_dsgdm_n", n, d, dtype)
    x, g, state = problem.views(problem.buffers)
    matrix = topology.Mixing.from_matrix([[1.0]]) if n == 1 else getattr(topology, name)(n).mixing()
    counting.runtime.reset()
    counting.gossip_step(x, g, state, matrix, "qg_dsgdm_n", problem.hyper)
    (launch,) = counting.runtime.launches
    result, elements = launch.result, n * d
    assert result is not None
    x_bytes, state_bytes = elements * dtype.itemsize, elements * ops.compute_dtype(dtype).itemsize
    loaded = {name: result.loaded_bytes[name] for name in ("x", "g", "state[0]")}
    stored = {name: size for name, size in result.stored_bytes.items() if size}
    assert loaded == {"x": x_bytes, "g": x_bytes, "state[0]": state_bytes}
    assert stored == {"x": x_bytes, "state[0]": state_bytes}
    assert result.total("sectors", "global") <= 1.05 * result.total("ideal_sectors", "global")
    tile = [site for site in result.sites if site.space == "shared" and site.size == 16]
    assert tile
    assert sum(site.wavefronts for site in tile) == sum(site.ideal_wavefronts for site in tile)


@needs_mock
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_norm_of_a_fused_step_costs_a_sixteenth_of_a_vector(counting: MockModule, dtype: torch.dtype) -> None:
    n, d = 16, 4 * 4096
    problem = Problem("qg_dadam", n, d, dtype)
    x, g, state = problem.views(problem.buffers)
    counting.runtime.reset(multiprocessors=1, blocks_per_multiprocessor=1)
    counting.gossip_step(
        x, g, state, topology.ring(n).mixing(), "qg_dadam", problem.hyper, problem.row_scalars, *problem.block_sums()
    )
    results = [launch.result for launch in counting.runtime.launches]
    wide = n * d * ops.compute_dtype(dtype).itemsize
    vectors = {"x": n * d * dtype.itemsize, "g": n * d * dtype.itemsize, **{f"state[{k}]": wide for k in range(3)}}
    for name, size in {**vectors, "lanes[0]": wide // 16}.items():
        assert sum(result.loaded_bytes[name] for result in results) == size, name
        assert sum(result.stored_bytes[name] for result in results) == (0 if name == "g" else size), name
    sectors = sum(result.total("sectors", "global") for result in results)
    assert sectors <= 1.05 * sum(result.total("ideal_sectors", "global") for result in results)


@needs_mock
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_norm_of_merge_costs_no_memory_traffic(counting: MockModule, dtype: torch.dtype) -> None:
    d = 4 * 4096
    problem, compute = Problem("qg_dadam", 1, d, dtype), ops.compute_dtype(dtype)
    x, g, state = problem.views(problem.buffers)
    received, (sums,) = [torch.ones(d, dtype=compute) for _ in range(3)], problem.block_sums()
    counting.runtime.reset()
    mine = [vector[0] for vector in state]
    counting.merge(
        x[0], g[0], mine, received, [0.2, 0.3, 0.5], False, "qg_dadam", problem.hyper, problem.row_scalars[0], sums[0]
    )
    (launch,) = counting.runtime.launches
    result, wide = launch.result, d * compute.itemsize
    assert result is not None
    loaded = {name: size for name, size in result.loaded_bytes.items() if size}
    assert loaded == {"x": d * dtype.itemsize, **{f"received[{q}]": wide for q in range(3)}}
    stored = {name: size for name, size in result.stored_bytes.items() if size}
    assert stored == {"x": d * dtype.itemsize, "state[2]": wide, "sums[0]": 4 * 8}
    assert result.total("sectors", "global") <= 1.05 * result.total("ideal_sectors", "global")
