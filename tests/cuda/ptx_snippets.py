"""Builds and runs small PTX kernels for the tests of the PTX machine. Holds no test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx import GlobalMemory, LaunchResult, Machine, parse
from ptx.types import TYPES, Array

HEADER = ".version 9.0\n.target sm_80\n.address_size 64\n"

#: Registers that every snippet may use; ``tid`` and ``i`` are set by ``THREAD_INDEX``.
REGISTERS = """
    .reg .pred %p<10>;
    .reg .b16 %h<10>;
    .reg .b32 %r<20>;
    .reg .f32 %f<20>;
    .reg .b64 %d<20>;
    .reg .f64 %e<10>;
    .reg .b128 %q<4>;
"""
#: %r0 = threadIdx.x, %r1 = blockIdx.x * blockDim.x + threadIdx.x, %d0 = the latter in 64 bits
THREAD_INDEX = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r1, %r2, %r3, %r0;
    cvt.u64.u32 %d0, %r1;
"""
#: %d3 = address of x[i], %d4 = address of y[i], 4-byte elements
ADDRESSES = "shl.b64 %d2, %d0, 2; add.s64 %d3, %d10, %d2; add.s64 %d4, %d11, %d2;"
SHARED = ".shared .align 16 .b8 tile[256];\n"
#: %r5 = address of the thread's word in shared memory, %r6 = its neighbour's
WORDS = "mov.u32 %r4, tile; shl.b32 %r5, %r0, 2; add.s32 %r5, %r5, %r4; xor.b32 %r6, %r5, 4;"


def words(count: int) -> Array:
    """0, 1, 2, ... as uint32."""
    return np.arange(count, dtype=np.uint32)


def kernel(body: str, params: Sequence[str] = (), declarations: str = "") -> str:
    """PTX of a kernel ``k`` with .u64 parameters ``params``, loaded as global addresses into %d10, %d11, ..."""
    signature = ", ".join(f".param .u64 {name}" for name in params)
    loads = "\n".join(f"    ld.param.u64 %d{10 + k}, [{name}];" for k, name in enumerate(params))
    code = f"{REGISTERS}{loads}\n{THREAD_INDEX}{body}"
    return f"{HEADER}{declarations}\n.visible .entry k({signature})\n{{\n{code}\n    ret;\n}}\n"


def run(
    text: str,
    arrays: dict[str, Array],
    grid: int | Sequence[int] = 1,
    block: int | Sequence[int] = 32,
    shared_bytes: int = 0,
    **options: Any,
) -> tuple[dict[str, Array], LaunchResult]:
    """Run kernel ``k`` with the arrays as its parameters; returns their contents afterwards and the statistics."""
    memory = GlobalMemory()
    machine = Machine(parse(text), memory, **options)
    placed = {name: memory.add(name, array) for name, array in arrays.items()}
    result = machine.launch("k", grid, block, list(placed.values()), shared_bytes)
    return {name: a.read(arrays[name].dtype).reshape(arrays[name].shape) for name, a in placed.items()}, result


def evaluate(code: str, result: str, *inputs: tuple[str, Any]) -> Array:
    """Run ``code`` once for each element of the inputs.

    Args:
        code: instructions over ``{d}`` (the result) and ``{a}``, ``{b}``, ``{c}``, ``{e}`` (the inputs).
        result: type of ``{d}``; a predicate comes back as uint32 0 or 1.
        inputs: type and array of each input; 16-bit floats as their own dtype, bfloat16 as uint16 bits.
    """
    types = [name for name, _ in inputs]
    arrays = [np.ascontiguousarray(a) for a in np.broadcast_arrays(*[np.atleast_1d(v) for _, v in inputs])]
    count = len(arrays[0])
    stored = "u32" if result == "pred" else result
    lines, names = [], {}
    for k, kind in enumerate(types):
        size = TYPES[kind].size
        register = "b16" if size <= 2 else f"b{8 * size}"
        name = f"%in{k}"
        names["abce"[k]] = name
        lines += [
            f".reg .{register} {name};",
            f"mul.lo.u64 %d1, %d0, {size};",
            f"add.s64 %d1, %d1, %d{11 + k};",
            f"ld.global.b{8 * size} {name}, [%d1];",
        ]
    register = {"pred": "pred", "b128": "b128"}.get(result) or (
        "b16" if TYPES[result].size <= 2 else f"b{8 * TYPES[result].size}"
    )
    lines += [f".reg .{register} %out;", code.format(d="%out", **names)]
    if result == "pred":
        lines += [".reg .b32 %word;", "selp.b32 %word, 1, 0, %out;"]
    size = TYPES[stored].size
    value = "%word" if result == "pred" else "%out"
    lines += [f"mul.lo.u64 %d1, %d0, {size};", "add.s64 %d1, %d1, %d10;", f"st.global.b{8 * size} [%d1], {value};"]
    block = 32
    padded = [np.concatenate([a, np.repeat(a[:1], -len(a) % block)]) for a in arrays]
    blocks = len(padded[0]) // block
    outputs = np.zeros(blocks * block, TYPES[stored].dtype)
    params = ["out", *[f"in{k}" for k in range(len(inputs))]]
    text = kernel("\n".join(lines), params)
    after, _ = run(text, dict(zip(params, [outputs, *padded], strict=True)), blocks, block, statistics=False)
    return after["out"][:count]


def bits(array: Array) -> Array:
    """The bits of an array, for exact comparison."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
