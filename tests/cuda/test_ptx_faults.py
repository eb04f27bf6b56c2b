"""Every fault class of the PTX machine, on hand-written PTX.

A proof tool that cannot fail proves nothing, so each fault is shown to stop the machine with the kernel, the line and
the thread in the message. Faults in code that nvcc compiled are in ``test_ptx_nvcc.py``.
"""

from __future__ import annotations

import numpy as np
import pytest

from ptx import (
    BadShuffle,
    DivergentBarrier,
    GlobalMemory,
    LaunchError,
    Machine,
    MachineFault,
    Misaligned,
    OutOfBounds,
    PtxSyntaxError,
    Race,
    Uninitialised,
    UnknownInstruction,
    parse,
)
from ptx_snippets import ADDRESSES, HEADER, SHARED, WORDS, kernel, run, words


# ------------------------------------------------------------------------------------------------ shared memory
def exchange(barrier: str) -> str:
    """Each thread stores a word to shared memory and loads its neighbour's."""
    return kernel(
        SHARED + ADDRESSES + WORDS + f"st.shared.u32 [%r5], %r1; {barrier} ld.shared.u32 %r7, [%r6];"
        "st.global.u32 [%d3], %r7;", ["x", "y"],
    )  # fmt: skip


def test_barrier_orders_shared_memory() -> None:
    for barrier in ("bar.sync 0;", "barrier.sync 1;", "barrier.cta.sync.aligned 0;"):
        after, _ = run(exchange(barrier), {"x": words(128), "y": words(1)}, grid=2, block=64)
        np.testing.assert_array_equal(after["x"], words(128) ^ 1)


def test_missing_barrier_is_a_race() -> None:
    with pytest.raises(
        Race, match=r"race in shared memory at offset 4: a thread reads what thread 1 of block 0 wrote"
    ) as info:
        run(exchange(""), {"x": words(128), "y": words(1)}, grid=2, block=64)
    assert info.value.kernel == "k"
    assert info.value.thread == (0, 0, 0)
    assert "PTX line" in str(info.value)
    assert "ld.shared.u32 %r7, [%r6]" in str(info.value)


def test_missing_barrier_before_reuse_is_a_race() -> None:
    """A write to what another thread may still be reading."""
    body = SHARED + WORDS + "st.shared.u32 [%r5], %r1; bar.sync 0; ld.shared.u32 %r7, [%r6]; st.shared.u32 [%r5], %r7;"
    with pytest.raises(Race, match="writes what thread 1 of block 0 read"):
        run(kernel(body), {}, block=64)
    run(kernel(body.replace("%r7, [%r6];", "%r7, [%r6]; bar.sync 0;")), {}, block=64)


def test_many_readers_then_a_writer_is_a_race() -> None:
    body = (
        SHARED + "mov.u32 %r4, tile; setp.ne.u32 %p1, %r0, 0; @!%p1 st.shared.u32 [%r4], 1; bar.sync 0;"
        "ld.shared.u32 %r5, [%r4]; @!%p1 st.shared.u32 [%r4], 2;"
    )
    with pytest.raises(Race, match="writes what several threads of block 0 read"):
        run(kernel(body), {}, block=64)


def test_two_threads_storing_one_address_is_a_race() -> None:
    with pytest.raises(Race, match="shared memory at offset 0: two threads store to one address"):
        run(kernel(SHARED + "mov.u32 %r4, tile; st.shared.u32 [%r4], 1;"), {})
    with pytest.raises(Race, match="global memory, 'x' \\+ 0 bytes: two threads store to one address"):
        run(kernel("st.global.u32 [%d10], 1;", ["x"]), {"x": words(1)})


def test_uninitialised_shared_memory_is_caught_to_the_byte() -> None:
    partial = SHARED + "mov.u32 %r4, tile; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u16 [%r4+2], %h1; bar.sync 0;"
    with pytest.raises(Uninitialised, match="register %h1"):
        run(kernel(partial), {})
    partial = partial.replace("setp", "mov.u16 %h1, 1; setp", 1)
    run(kernel(partial + "@%p1 ld.shared.u16 %h2, [%r4+2];"), {})
    with pytest.raises(Uninitialised, match="shared load at offset 0"):
        run(kernel(partial + "@%p1 ld.shared.u32 %r5, [%r4];"), {})


def test_shared_memory_is_bounded_by_the_launch() -> None:
    body = "mov.u32 %r4, dyn; shl.b32 %r5, %r0, 2; add.s32 %r5, %r5, %r4; st.shared.u32 [%r5], %r0;"
    text = kernel(body, declarations=".extern .shared .align 16 .b8 dyn[];")
    run(text, {}, shared_bytes=128)
    with pytest.raises(OutOfBounds, match="shared store of 4 bytes at offset 124 of 124 bytes") as info:
        run(text, {}, shared_bytes=124, grid=2)
    assert (info.value.block, info.value.thread) == ((0, 0, 0), (31, 0, 0))


# ------------------------------------------------------------------------------------------------ global faults
def test_global_races_between_threads_and_blocks() -> None:
    neighbour = ADDRESSES + "xor.b64 %d5, %d2, 128; add.s64 %d5, %d5, %d10;"  # 32 elements on: another block
    read = neighbour + "st.global.u32 [%d3], %r1; ld.global.u32 %r4, [%d5];"
    with pytest.raises(Race, match=r"global memory, 'x' \+ 128 bytes: a thread reads what thread 0 of block 1 wrote"):
        run(kernel(read, ["x", "y"]), {"x": words(64), "y": words(1)}, grid=2)
    write = neighbour + "ld.global.u32 %r4, [%d5]; st.global.u32 [%d3], %r1;"
    for max_lanes in (32, 64):  # blocks one after the other, and together
        with pytest.raises(Race, match=r"(reads|writes) what thread 0 of block"):
            run(kernel(write, ["x", "y"]), {"x": words(64), "y": words(1)}, grid=2, max_lanes=max_lanes)
    # a barrier orders the threads of a block, never two blocks
    inside = ADDRESSES + "xor.b64 %d5, %d2, 4; add.s64 %d5, %d5, %d10; st.global.u32 [%d3], %r1; bar.sync 0; " \
        "ld.global.u32 %r4, [%d5];"  # fmt: skip
    run(kernel(inside, ["x", "y"]), {"x": words(64), "y": words(1)}, grid=2)
    with pytest.raises(Race, match="reads what thread 0 of block 1 wrote"):
        run(kernel(inside.replace("%d2, 4", "%d2, 128"), ["x", "y"]), {"x": words(64), "y": words(1)}, grid=2)


def test_a_read_by_all_blocks_then_a_write_is_a_race() -> None:
    body = "ld.global.u32 %r4, [%d10]; setp.eq.u32 %p1, %r1, 5; @%p1 st.global.u32 [%d10], 1;"
    with pytest.raises(Race, match="writes what threads of several blocks read"):
        run(kernel(body, ["x"]), {"x": words(1)}, grid=3)
    run(kernel(body, ["x"]), {"x": words(1)}, grid=3, races=False)


def test_a_non_coherent_load_must_not_see_a_write() -> None:
    body = ADDRESSES + "{} st.global.u32 [%d3], %r1; {}"
    load = "ld.global.nc.u32 %r4, [%d3];"
    run(kernel(body.format(load, ""), ["x", "y"]), {"x": words(64), "y": words(1)}, grid=2)
    run(kernel(body.format("", load.replace(".nc", "")), ["x", "y"]), {"x": words(64), "y": words(1)}, grid=2)
    with pytest.raises(Race, match=r"a non-coherent load .* reads what this launch has written"):
        run(kernel(body.format("", load), ["x", "y"]), {"x": words(64), "y": words(1)}, grid=2)


def test_adjacent_halves_of_a_word_are_no_race() -> None:
    body = "shl.b64 %d2, %d0, 1; add.s64 %d3, %d10, %d2; cvt.u16.u32 %h1, %r1; st.global.u16 [%d3], %h1;"
    after, _ = run(kernel(body, ["x"]), {"x": np.zeros(64, np.uint16)}, grid=2)
    np.testing.assert_array_equal(after["x"], np.arange(64))


def test_one_off_tail_is_out_of_bounds() -> None:
    body = ADDRESSES + "setp.gt.u32 %p1, %r1, 1000; @%p1 bra END; st.global.u32 [%d3], %r1; END:"
    with pytest.raises(OutOfBounds, match=r"global store of 4 bytes at 0x[0-9a-f]+, offset 4000 of 'x'") as info:
        run(kernel(body, ["x", "y"]), {"x": words(1000), "y": words(1)}, grid=4, block=256)
    assert (info.value.block, info.value.thread) == ((3, 0, 0), (1000 - 768, 0, 0))
    assert "block (3, 0, 0), thread (232, 0, 0)" in str(info.value)
    run(kernel(body.replace("setp.gt", "setp.ge"), ["x", "y"]), {"x": words(1000), "y": words(1)}, grid=4, block=256)


def test_before_the_first_byte_is_out_of_bounds() -> None:
    with pytest.raises(OutOfBounds, match="offset -4 of 'x'"):
        run(kernel("ld.global.u32 %r4, [%d10+-4];", ["x"]), {"x": words(4)})
    with pytest.raises(OutOfBounds, match="nothing is allocated"):
        run(kernel("mov.u64 %d3, 0; ld.global.u32 %r4, [%d3];"), {})


def test_misaligned_access_is_caught() -> None:
    body = "shl.b64 %d2, %d0, 2; add.s64 %d3, %d10, %d2; ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d3];"
    with pytest.raises(Misaligned, match=r"global load of 16 bytes at .*no multiple of 16") as info:
        run(kernel(body, ["x"]), {"x": words(64)})
    assert info.value.thread == (1, 0, 0)
    with pytest.raises(Misaligned, match="shared store of 4 bytes at 0x2"):
        run(kernel(SHARED + "mov.u32 %r4, tile; st.shared.u32 [%r4+2], %r0;"), {}, block=1)


def test_workspace_must_be_written_before_it_is_read() -> None:
    memory = GlobalMemory()
    work = memory.add("work", words(32), written=False)
    body = "shl.b64 %d2, %d0, 2; add.s64 %d3, %d10, %d2; {} ld.global.u32 %r4, [%d3];"
    Machine(parse(kernel(body.format("st.global.u32 [%d3], 1;"), ["work"])), memory).launch("k", 1, 16, [work])
    with pytest.raises(
        Uninitialised, match="'work' \\+ 64 bytes: global load of bytes that nothing has written"
    ) as info:
        Machine(parse(kernel(body.format(""), ["work"])), memory).launch("k", 1, 32, [work])
    assert info.value.thread == (16, 0, 0)


# ------------------------------------------------------------------------------------------------ other faults
def test_uninitialised_register_names_the_thread() -> None:
    body = "setp.lt.u32 %p1, %r0, 7; @%p1 mov.u32 %r4, 1; add.u32 %r5, %r4, 1;"
    with pytest.raises(Uninitialised, match="read of register %r4") as info:
        run(kernel(body), {}, grid=3)
    assert (info.value.block, info.value.thread) == ((0, 0, 0), (7, 0, 0))


def test_divergent_barriers_are_caught() -> None:
    exits = "setp.lt.u32 %p1, %r0, 7; @%p1 ret; bar.sync 0;"
    with pytest.raises(DivergentBarrier, match=r"thread \(0, 0, 0\) has exited") as info:
        run(kernel(exits), {}, grid=2)
    assert info.value.thread == (7, 0, 0)
    two = "setp.lt.u32 %p1, %r0, 7; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:"
    with pytest.raises(DivergentBarrier, match="waits at the barrier of PTX line"):
        run(kernel(two), {})
    whole_blocks = "setp.lt.u32 %p1, %r2, 1; @%p1 ret; bar.sync 0;"
    run(kernel(whole_blocks), {}, grid=2)


def test_bad_shuffle_masks_are_caught() -> None:
    half = "setp.lt.u32 %p1, %r0, 16; @%p1 bra END; shfl.sync.down.b32 %r4|%p2, %r0, 1, 31, {}; END:"
    with pytest.raises(BadShuffle, match="mask 0xffffffff: lanes 0x0000ffff of it do not execute it"):
        run(kernel(half.format("-1")), {})
    run(kernel(half.format("0xffff0000")), {})
    with pytest.raises(BadShuffle, match="executed by a lane outside the mask"):
        run(kernel(half.format("0x7fff0000")), {})
    with pytest.raises(BadShuffle, match="lanes 0xffff0000 of it"):  # a warp of 16 threads has no upper lanes
        run(kernel("shfl.sync.down.b32 %r4|%p2, %r0, 1, 31, -1;"), {}, block=16)
    outside = half.replace("down", "up").replace("1, 31", "1, 0").format("0xffff0000")
    with pytest.raises(BadShuffle, match="shuffle reads lane 15, which is not in mask"):
        run(kernel(outside), {})


def test_unknown_instructions_stop_even_where_they_are_not_executed() -> None:
    with pytest.raises(UnknownInstruction, match=r"unknown instruction: wgmma(.|\n)*kernel k, PTX line \d+"):
        run(kernel("bra END; wgmma.fence.sync.aligned; END:"), {})
    with pytest.raises(UnknownInstruction, match="call"):
        run(kernel("call.uni (%r4), f, (%r5);"), {})


def test_text_that_is_no_ptx_is_refused_with_its_line() -> None:
    with pytest.raises(PtxSyntaxError, match="line 2"):
        parse(HEADER.replace(".target sm_80", "nonsense"))
    with pytest.raises(PtxSyntaxError, match="unknown label NOWHERE"):
        parse(kernel("bra NOWHERE;"))


def test_endless_loops_end() -> None:
    with pytest.raises(MachineFault, match="is a loop endless"):
        run(kernel("LOOP: add.u32 %r1, %r1, 1; bra LOOP;"), {}, max_steps=1000)


def test_launch_bounds_are_enforced() -> None:
    text = kernel("").replace("k()", "k()\n.maxntid 64, 1, 1\n")
    run(text, {}, block=64)
    with pytest.raises(LaunchError, match="65 threads a block, at most 64"):
        run(text, {}, block=65)


# ------------------------------------------------------------------------------------------------ cp.async
def async_copy(after_copy: str) -> str:
    return kernel(
        SHARED + ADDRESSES + WORDS + "cp.async.ca.shared.global [%r5], [%d3], 4; cp.async.commit_group;"
        f"{after_copy} ld.shared.u32 %r7, [%r6]; st.global.u32 [%d4], %r7;", ["x", "y"],
    )  # fmt: skip


def test_async_copy_needs_wait_and_barrier() -> None:
    arrays = {"x": words(64) * 3, "y": words(64)}
    for wait in ("cp.async.wait_group 0;", "cp.async.wait_all;"):
        after, _ = run(async_copy(f"{wait} bar.sync 0;"), arrays, block=64)
        np.testing.assert_array_equal(after["y"], 3 * (words(64) ^ 1))
    with pytest.raises(Race, match=r"reads what a cp\.async still in flight will write"):
        run(async_copy("bar.sync 0;"), arrays, block=64)
    with pytest.raises(Race, match=r"reads what a cp\.async still in flight will write"):
        run(async_copy("cp.async.wait_group 1; bar.sync 0;"), arrays, block=64)
    with pytest.raises(Race, match="reads what thread 1 of block 0 wrote"):
        run(async_copy("cp.async.wait_group 0;"), arrays, block=64)
