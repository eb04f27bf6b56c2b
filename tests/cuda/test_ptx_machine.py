"""What the PTX machine does with right programs: memory, divergence, warp operations, statistics.

Hand-written PTX; see ``test_ptx_faults.py`` for wrong programs and ``test_ptx_nvcc.py`` for compiled ones.
"""

from __future__ import annotations

import numpy as np
import pytest

from ptx import GlobalMemory, LaunchError, Machine, OutOfBounds, Uninitialised, parse
from ptx.machine import pack
from ptx.memory import SparseAllocation
from ptx_snippets import ADDRESSES, HEADER, kernel, run, words


# ------------------------------------------------------------------------------------------------ memory
def test_vector_loads_and_stores_move_rows() -> None:
    body = (
        "shl.b64 %d2, %d0, 4; add.s64 %d3, %d10, %d2; add.s64 %d4, %d11, %d2;"
        "ld.global.nc.L1::no_allocate.v4.u32 {%r4, %r5, %r6, %r7}, [%d3]; st.global.v4.b32 [%d4], {%r7, %r6, %r5, %r4};"
    )
    x = words(256)
    after, result = run(kernel(body, ["x", "y"]), {"x": x, "y": np.zeros_like(x)}, grid=2)
    np.testing.assert_array_equal(after["y"].reshape(-1, 4), x.reshape(-1, 4)[:, ::-1])
    assert [(s.kind, s.size, s.lanes) for s in result.sites] == [("load", 16, 64), ("store", 16, 64)]


@pytest.mark.parametrize("kind", ["v2.b64", "b128", "v8.b16", "v2.f64"])
def test_every_16_byte_form_copies(kind: str) -> None:
    registers = {"v2.b64": "{%d5, %d6}", "b128": "%q1", "v2.f64": "{%e1, %e2}"}
    names = registers.get(kind, "{%h1, %h2, %h3, %h4, %h5, %h6, %h7, %h8}")
    body = (
        "shl.b64 %d2, %d0, 4; add.s64 %d3, %d10, %d2; add.s64 %d4, %d11, %d2;"
        f"ld.global.{kind} {names}, [%d3]; st.global.{kind} [%d4], {names};"
    )
    x = words(128)
    after, _ = run(kernel(body, ["x", "y"]), {"x": x, "y": np.zeros_like(x)})
    np.testing.assert_array_equal(after["y"], x)


def test_narrow_loads_extend_and_narrow_stores_truncate() -> None:
    body = (
        "add.s64 %d3, %d10, %d0; shl.b64 %d2, %d0, 2; add.s64 %d4, %d11, %d2;"
        "ld.global.s8 %r4, [%d3]; st.global.u32 [%d4], %r4; ld.global.u8 %h1, [%d3]; add.u16 %h1, %h1, 300;"
        "st.global.u8 [%d3], %h1;"
    )
    x = np.arange(-16, 16, dtype=np.int8)
    after, _ = run(kernel(body, ["x", "y"]), {"x": x, "y": words(32)})
    np.testing.assert_array_equal(after["y"].view(np.int32), x)
    np.testing.assert_array_equal(after["x"].view(np.uint8), (x.astype(np.int64) + 300) % 256)


def test_local_memory_is_private_and_starts_uninitialised() -> None:
    declarations = ".local .align 16 .b8 depot[32]; mov.u64 %d5, depot; cvta.local.u64 %d6, %d5;"
    good = declarations + ADDRESSES + "st.local.u32 [%d5+8], %r1; ld.u32 %r4, [%d6+8]; st.global.u32 [%d3], %r4;"
    after, _ = run(kernel(good, ["x", "y"]), {"x": words(64) * 0, "y": words(64)}, grid=2)
    np.testing.assert_array_equal(after["x"], words(64))
    with pytest.raises(Uninitialised, match="local load at offset 4"):
        run(kernel(declarations + "ld.local.u32 %r4, [%d5+4];", []), {})


def test_module_variables_and_struct_parameters() -> None:
    text = (
        HEADER
        + ".const .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 1, 0, 0};\n"
        + ".visible .entry k(.param .u64 out, .param .align 4 .b8 s[12]) { .reg .b32 %r<5>; .reg .b64 %d<5>;\n"
        + "ld.param.u64 %d1, [out]; ld.param.u32 %r1, [s+8]; mov.u64 %d2, table; ld.const.u32 %r2, [%d2+4];\n"
        + "ld.const.u32 %r3, [table]; add.s32 %r1, %r1, %r2; add.s32 %r1, %r1, %r3; st.global.u32 [%d1], %r1; ret; }"
    )
    memory = GlobalMemory()
    machine = Machine(parse(text), memory)
    out = memory.add("out", np.zeros(1, np.uint32))
    machine.launch("k", 1, 1, [out, pack(np.float32(1), np.int32(2), np.int32(30))])
    assert out.read(np.uint32)[0] == 30 + 258 + 1
    with pytest.raises(LaunchError, match="argument 1: 8 bytes, parameter has 12"):
        machine.launch("k", 1, 1, [out, pack(np.float64(1))])


def test_a_parameter_array_can_be_indexed_by_the_thread() -> None:
    text = (
        HEADER + ".visible .entry k(.param .u64 out, .param .align 4 .b8 s[16]) { .reg .b32 %r<5>; .reg .b64 %d<9>;\n"
        "mov.u32 %r1, %tid.x; mul.wide.u32 %d2, %r1, 4; mov.b64 %d3, s; add.s64 %d4, %d3, %d2;\n"
        "ld.param.u32 %r2, [%d4]; ld.param.u64 %d1, [out]; add.s64 %d1, %d1, %d2; st.global.u32 [%d1], %r2; ret; }"
    )
    memory = GlobalMemory()
    machine = Machine(parse(text), memory)
    out = memory.add("out", words(5))
    machine.launch("k", 1, 4, [out, pack(np.array([9, 8, 7, 6], np.uint32))])
    assert out.read(np.uint32).tolist() == [9, 8, 7, 6, 4]
    with pytest.raises(OutOfBounds, match=r"load of 4 bytes at 24 of the parameters(.|\n)*thread \(4, 0, 0\)"):
        machine.launch("k", 1, 5, [out, pack(np.array([9, 8, 7, 6], np.uint32))])


def test_addresses_beyond_32_bits_need_64_bit_arithmetic() -> None:
    """An element index times its size that is computed in 32 bits lands outside, as it would on a GPU."""
    right = "mul.wide.u32 %d2, %r4, 4; add.s64 %d3, %d10, %d2; st.global.u32 [%d3], %r4;"
    wrong = "shl.b32 %r5, %r4, 2; cvt.u64.u32 %d2, %r5; add.s64 %d3, %d10, %d2; st.global.u32 [%d3], %r4;"
    for code, where in ((right, 2**31 + 1), (wrong, 1)):
        memory = GlobalMemory()
        x = memory.add_sparse("x", 4 * (2**31 + 2))
        machine = Machine(parse(kernel("add.u32 %r4, %r1, 2147483648;" + code, ["x"])), memory)
        machine.launch("k", 1, 2, [x])
        assert x.read_at(4 * where, 1, np.uint32)[0] == 2**31 + 1
        assert len(x.pages) <= 2


def test_sparse_allocation_fills_pages_on_demand() -> None:
    def fill(offsets: np.ndarray) -> np.ndarray:
        element = offsets[:, None] // 8 + np.arange(SparseAllocation.PAGE // 8)
        return element.view(np.uint8).reshape(len(offsets), -1)

    memory = GlobalMemory()
    x = memory.add_sparse("x", 8 * 2**33, fill=fill)
    body = "add.s64 %d1, %d0, 8589934400; shl.b64 %d2, %d1, 3; add.s64 %d3, %d10, %d2; ld.global.u64 %d4, [%d3]; " \
        "add.s64 %d4, %d4, 1; st.global.u64 [%d3], %d4;"  # fmt: skip
    machine = Machine(parse(kernel(body, ["x"])), memory)
    machine.launch("k", 6, 32, [x])
    np.testing.assert_array_equal(x.read_at(8 * (2**33 - 192), 192, np.int64), np.arange(2**33 - 192, 2**33) + 1)
    with pytest.raises(OutOfBounds, match="which has 68719476736 bytes"):
        machine.launch("k", 7, 32, [x])


def test_host_arrays_are_used_in_place() -> None:
    memory = GlobalMemory()
    x = words(40)
    inner = x[3:35]  # begins at no multiple of 16
    memory.attach("x", inner)
    body = "shl.b64 %d2, %d0, 2; add.s64 %d3, %d10, %d2; st.global.u32 [%d3], 7;"
    machine = Machine(parse(kernel(body, ["x"])), memory)
    machine.launch("k", 1, 32, [inner.ctypes.data])
    np.testing.assert_array_equal(x, [0, 1, 2, *[7] * 32, 35, 36, 37, 38, 39])
    with pytest.raises(OutOfBounds, match="offset 128 of 'x', which has 128 bytes"):
        machine.launch("k", 2, 32, [inner.ctypes.data])


# ------------------------------------------------------------------------------------------------ divergence, warps
def test_lanes_diverge_in_a_loop_and_meet_again() -> None:
    """Thread i adds 1, 2, ..., i: every lane leaves the loop at another time."""
    body = ADDRESSES + (
        "mov.u32 %r4, 0; mov.u32 %r5, 0; LOOP: setp.ge.u32 %p1, %r5, %r1; @%p1 bra DONE;"
        "add.s32 %r5, %r5, 1; add.s32 %r4, %r4, %r5; bra.uni LOOP; DONE: activemask.b32 %r6;"
        "st.global.u32 [%d3], %r4; st.global.u32 [%d4], %r6;"
    )
    after, result = run(kernel(body, ["x", "y"]), {"x": words(128), "y": words(128)}, grid=4)
    i = words(128)
    np.testing.assert_array_equal(after["x"], i * (i + 1) // 2)
    assert (after["y"] == 0xFFFFFFFF).all()
    # 0 + 1 + ... + 127 rounds of 5 instructions for single threads
    assert result.thread_instructions["bra.uni"] == 127 * 128 // 2


def test_if_else_runs_both_sides_and_partial_results_stay() -> None:
    body = ADDRESSES + (
        "and.b32 %r4, %r1, 1; setp.eq.u32 %p1, %r4, 0; @%p1 bra EVEN; mov.u32 %r5, 100; bra END;"
        "EVEN: mov.u32 %r5, 200; END: @!%p1 add.u32 %r5, %r5, 1; st.global.u32 [%d3], %r5;"
    )
    after, _ = run(kernel(body, ["x", "y"]), {"x": words(96), "y": words(96)}, grid=3)
    np.testing.assert_array_equal(after["x"], np.where(words(96) % 2 == 0, 200, 101))


def test_batches_of_blocks_give_the_same_result_as_all_at_once() -> None:
    body = ADDRESSES + "setp.ge.u32 %p1, %r1, 1000; @%p1 ret; mul.lo.u32 %r4, %r1, 3; st.global.u32 [%d3], %r4;"
    arrays = {"x": words(1000), "y": words(1)}
    for max_lanes in (1, 100, 100000):
        after, _ = run(kernel(body, ["x", "y"]), arrays, grid=32, max_lanes=max_lanes)
        np.testing.assert_array_equal(after["x"], 3 * words(1000))


def test_grid_and_block_have_three_dimensions() -> None:
    body = (
        "mov.u32 %r4, %tid.z; mov.u32 %r5, %tid.y; mov.u32 %r6, %ctaid.z; mov.u32 %r7, %ctaid.y;"
        "mov.u32 %r8, %nctaid.y; mov.u32 %r9, %ntid.z; mov.u32 %r11, %nctaid.x;"
        "mad.lo.u32 %r10, %r6, %r8, %r7; mad.lo.u32 %r10, %r10, %r11, %r2;"
        "mad.lo.u32 %r10, %r10, %r9, %r4; mov.u32 %r12, %ntid.y; mad.lo.u32 %r10, %r10, %r12, %r5;"
        "mad.lo.u32 %r10, %r10, %r3, %r0; mul.wide.u32 %d2, %r10, 4; add.s64 %d3, %d10, %d2; st.global.u32 [%d3], %r10;"
    )
    after, _ = run(
        kernel(body, ["x"]), {"x": np.zeros(3 * 2 * 2 * 5 * 2 * 3, np.uint32)}, grid=(3, 2, 2), block=(5, 2, 3)
    )
    np.testing.assert_array_equal(after["x"], words(360))


@pytest.mark.parametrize("mode", ["down", "up", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles_follow_the_segment_and_clamp(mode: str, width: int) -> None:
    """Operand c holds, as __shfl_*_sync builds it, the segment mask in bits 8 to 12 and the clamp in bits 0 to 4."""
    offset = 3
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = ADDRESSES + (
        f"mul.lo.u32 %r4, %r1, 10; shfl.sync.{mode}.b32 %r5|%p1, %r4, {offset}, {clamp}, -1;"
        "selp.u32 %r6, 1, 0, %p1; st.global.u32 [%d3], %r5; st.global.u32 [%d4], %r6;"
    )
    after, _ = run(kernel(body, ["x", "y"]), {"x": words(64), "y": words(64)}, block=64)
    lane, base = np.arange(64) % width, np.arange(64) // width * width
    source = {"down": lane + offset, "up": lane - offset, "bfly": lane ^ offset, "idx": lane * 0 + offset}[mode]
    valid = (source >= 0) & (source < width)
    np.testing.assert_array_equal(after["y"], valid)
    np.testing.assert_array_equal(after["x"], 10 * np.where(valid, base + source, np.arange(64)))


def test_votes_and_reductions_over_the_warp() -> None:
    body = ADDRESSES + (
        "setp.lt.u32 %p1, %r0, 40; vote.sync.ballot.b32 %r4, %p1, -1; vote.sync.any.pred %p2, %p1, -1;"
        "vote.sync.all.pred %p3, %p1, -1; redux.sync.add.u32 %r5, %r1, -1; selp.u32 %r6, 1, 0, %p2;"
        "selp.u32 %r7, 2, 0, %p3; or.b32 %r6, %r6, %r7; bar.warp.sync -1; st.global.u32 [%d3], %r4;"
        "shl.b32 %r5, %r5, 2; or.b32 %r5, %r5, %r6; st.global.u32 [%d4], %r5;"
    )
    after, _ = run(kernel(body, ["x", "y"]), {"x": words(64), "y": words(64)}, block=64)
    assert after["x"].tolist() == [0xFFFFFFFF] * 32 + [0xFF] * 32
    assert after["y"].tolist() == [4 * 496 + 3] * 32 + [4 * 1520 + 1] * 32


def test_integer_atomics_see_every_thread_once() -> None:
    body = (
        "atom.global.add.u32 %r4, [%d10], 1; shl.b64 %d2, %d0, 2; add.s64 %d4, %d11, %d2; st.global.u32 [%d4], %r4;"
        "red.global.max.u32 [%d10+4], %r1; atom.global.cas.b32 %r5, [%d10+8], 5, 9;"
    )
    after, _ = run(kernel(body, ["x", "y"]), {"x": np.array([0, 0, 5], np.uint32), "y": words(96)}, grid=3)
    assert after["x"].tolist() == [96, 95, 9]
    assert sorted(after["y"].tolist()) == list(range(96))


# ------------------------------------------------------------------------------------------------ statistics
def access_pattern(index: str) -> str:
    """Thread i loads the 4-byte element whose number ``index`` leaves in %r4."""
    return kernel(index + "mul.wide.u32 %d2, %r4, 4; add.s64 %d3, %d10, %d2; ld.global.u32 %r5, [%d3];", ["x"])


@pytest.mark.parametrize(
    ("index", "sectors", "ideal"),
    [
        ("mov.u32 %r4, %r0;", 4, 4),  # consecutive
        ("shl.b32 %r4, %r0, 1;", 8, 4),  # every second element
        ("shl.b32 %r4, %r0, 3;", 32, 4),  # one sector each
        ("mov.u32 %r4, 5;", 1, 1),  # all the same
        ("sub.u32 %r4, 31, %r0;", 4, 4),  # descending
        ("add.u32 %r4, %r0, 4;", 5, 4),  # straddles one sector more
        ("xor.b32 %r4, %r0, 21;", 4, 4),  # any order
    ],
)
def test_sectors_are_counted_for_each_warp(index: str, sectors: int, ideal: int) -> None:
    _, result = run(access_pattern(index), {"x": words(256)}, grid=3)
    (site,) = result.sites
    assert (site.requests, site.lanes, site.bytes) == (3, 96, 384)
    assert (site.sectors, site.ideal_sectors) == (3 * sectors, 3 * ideal)
    assert result.loaded_bytes == {"x": 384}


@pytest.mark.parametrize(
    ("shift", "width", "wavefronts", "ideal"),
    [
        (2, "u32", 1, 1),
        (3, "u32", 2, 1),
        (7, "u32", 32, 1),
        (4, "v4.u32", 4, 4),
        (5, "v4.u32", 8, 4),
        (3, "v2.u32", 2, 2),
    ],
)
def test_bank_conflicts_are_counted(shift: int, width: str, wavefronts: int, ideal: int) -> None:
    registers = {"u32": "%r5", "v2.u32": "{%r5, %r6}", "v4.u32": "{%r5, %r6, %r7, %r8}"}[width]
    values = "mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r7, 0; mov.u32 %r8, 0;"
    body = f".shared .align 16 .b8 big[4096]; {values} mov.u32 %r4, big; shl.b32 %r9, %r0, {shift}; " \
        f"add.s32 %r9, %r9, %r4; st.shared.{width} [%r9], {registers};"  # fmt: skip
    _, result = run(kernel(body), {}, grid=2)
    assert result.total("wavefronts", "shared") == 2 * wavefronts
    assert result.total("ideal_wavefronts", "shared", "store") == 2 * ideal


def test_instructions_are_counted_by_thread_and_warp() -> None:
    body = "setp.lt.u32 %p1, %r0, 8; @!%p1 bra END; popc.b32 %r4, %r0; END:"
    _, result = run(kernel(body), {}, grid=3, block=64)
    assert result.thread_instructions["popc.b32"] == 3 * 8
    assert result.warp_instructions["popc.b32"] == 3
    assert result.warp_instructions["setp.u32"] == 6


def test_contractable_arithmetic_is_listed() -> None:
    machine = Machine(parse(kernel("mul.rn.f32 %f1, %f2, %f3; add.f32 %f1, %f1, %f2; add.s32 %r4, %r5, %r6;")))
    assert machine.contractable("k") == ["add.f32 %f1, %f1, %f2"]
