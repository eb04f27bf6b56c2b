"""The SASS reader on kernels whose machine code is known in advance, for every architecture of the product."""

from __future__ import annotations

from pathlib import Path

import pytest

import sass
from sass import KernelCode

PROBE = Path(__file__).parent / "sources" / "sass_probe.cu"
reason = sass.sass_skip_reason()
needs_tools = pytest.mark.skipif(bool(reason), reason=reason or "the tools are there")


def kernels(arch: str) -> dict[str, KernelCode]:
    if arch not in sass.supported_architectures():
        pytest.skip(f"this nvcc does not compile for {arch}")
    return sass.analyse(PROBE, arch)


@needs_tools
@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_known_kernels_are_read_right(arch: str) -> None:
    code = kernels(arch)
    assert sorted(code) == ["indexed", "narrow", "spilling", "tiled", "wide"]

    wide = code["wide"]
    assert 8 <= wide.registers <= 64
    assert wide.widths("global", "load", loops_only=True) == {16: 2}
    assert wide.widths("global", "store", loops_only=True) == {16: 1}
    assert wide.widths("global") == {16: 3, 4: 2}
    assert [loop.depth for loop in wide.loops] == [1]
    assert wide.load_bytes_in_flight() == 32
    assert not wide.uses_local_memory
    (store,) = wide.accesses("global", "store", loops_only=True)
    line = int(store.source.removeprefix("sass_probe.cu:"))
    assert PROBE.read_text().splitlines()[line - 1].strip() == "reinterpret_cast<float4*>(x)[v] = a;"

    assert code["narrow"].widths("global") == {2: 2}
    assert code["narrow"].loops == []

    spilling = code["spilling"]
    assert spilling.registers <= 32
    assert spilling.spill_store_bytes > 0
    assert spilling.uses_local_memory
    assert spilling.widths("local", "store")
    assert code["indexed"].uses_local_memory
    assert code["indexed"].stack_bytes == 64
    assert code["indexed"].spill_store_bytes == 0

    tiled = code["tiled"]
    assert tiled.shared_bytes == 1024
    assert tiled.widths("shared", "store") == {16: 1}
    assert tiled.widths("shared", "load", loops_only=True) == {4: 1}
    (inner,) = tiled.accesses("shared", "load")
    assert inner.loop is not None
    assert tiled.loops[inner.loop].depth == 2
    assert tiled.opcodes()["BAR"] == 1


LISTING = """
.text.k:
	//## File "/a/b/code.cuh", line 12
        /*0000*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.64 R12, [R4.64] ;
        /*0020*/              @!P0 LDG.E R14, [R4.64+0x10] ;
        /*0030*/                   FADD R1, R12, R1 ;
        /*0040*/                   LDG.E.U16 R15, [R4.64+0x20] ;
.L_x_1:
        /*0050*/                   LDGSTS.E.BYPASS.128 [R6], [R4.64] ;
.L_x_2:
        /*0060*/                   STS.64 [R6], R8 ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/              @UP1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_a_listing_is_parsed_without_any_tool() -> None:
    (instructions, loops, targets) = sass.parse_listing(LISTING)["k"]
    assert [(loop.first, loop.last, loop.depth) for loop in loops] == [(0x50, 0x80, 1), (0x60, 0x70, 2)]
    assert [(i.name, i.space, i.kind, i.width) for i in instructions if i.space] == [
        ("LDG", "global", "load", 16),
        ("LDG", "global", "load", 8),
        ("LDG", "global", "load", 4),
        ("LDG", "global", "load", 2),
        ("LDGSTS", "global", "copy", 16),
        ("STS", "shared", "store", 8),
    ]
    assert instructions[0].source == "code.cuh:12"
    assert (instructions[2].predicate, instructions[2].loop) == ("@!P0", None)
    assert [i.loop for i in instructions if i.name in ("LDGSTS", "STS")] == [0, 1]
    code = KernelCode("k", "k()", "sm_90", instructions=instructions, loops=loops, _targets=targets)
    # the use of R12 waits for the first two loads; the 4-byte one stays under way
    assert code.load_bytes_in_flight() == 28


def test_ptxas_report_is_parsed_without_any_tool() -> None:
    text = """
ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
ptxas info    : Function properties for _Z1kv
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 412 bytes cmem[0]
ptxas info    : Function properties for helper
    96 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    (kernel,) = sass.parse_report(text, "sm_90").values()
    assert (kernel.registers, kernel.shared_bytes) == (40, 1024)
    assert (kernel.stack_bytes, kernel.spill_store_bytes, kernel.spill_load_bytes) == (8, 12, 16)
