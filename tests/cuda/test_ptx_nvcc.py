"""The whole chain on sources that nvcc compiles: its launchers, the stand-in runtime, the PTX machine, faults found.

The same kernels are run once right, with the expected result, and once with a fault, which must be named.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import harness
from harness import MockRuntime, aligned, build
from ptx import (
    BadShuffle,
    DivergentBarrier,
    MachineFault,
    Misaligned,
    OutOfBounds,
    Race,
    Uninitialised,
    UnknownInstruction,
)
from ptx.types import Array

SOURCE = Path(__file__).parent / "sources" / "faults.cu"
KERNELS = [
    "exchange", "scale", "warp_sum", "tile_max", "two_phases", "count", "shift", "far_element", "pairs", "undefined",
    "exponential",
]  # fmt: skip
reason = harness.mock_skip_reason()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason or "nvcc is there")


@pytest.fixture(scope="module")
def runtime() -> MockRuntime:
    loaded = MockRuntime(build([SOURCE], include=[SOURCE.parent]))
    library = loaded.library
    library.run_kernel.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_size_t,
        ctypes.c_void_p,
    ]  # fmt: skip
    library.resident_blocks.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t]
    library.error_text.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(autouse=True)
def fresh(runtime: MockRuntime) -> None:
    runtime.reset(multiprocessors=4, shared_bytes_opt_in=227 * 1024)


def launch(
    runtime: MockRuntime,
    name: str,
    x: Array,
    *,
    fault: bool = False,
    n: int | None = None,
    blocks: int = 1,
    threads: int = 64,
    shared: int = 0,
) -> int:
    """Launch a kernel of faults.cu on x, in place; returns the CUDA error."""
    with runtime.mapped(x=x):
        count = len(x) if n is None else n
        number = KERNELS.index(name)
        error: int = runtime.library.run_kernel(number, fault, x.ctypes.data, count, blocks, threads, shared, 1234)
    return error


def values(count: int) -> Array:
    return aligned(np.random.default_rng(0).standard_normal(count).astype(np.float32))


# ------------------------------------------------------------------------------------------------ right kernels
def test_right_kernels_compute_what_they_say(runtime: MockRuntime) -> None:
    x = values(1003)
    expected = 2 * x
    assert launch(runtime, "scale", x, blocks=3, threads=32) == 0
    np.testing.assert_array_equal(x, expected)
    x = values(300)
    expected = x[np.arange(300) ^ 1]
    assert launch(runtime, "exchange", x, blocks=2, threads=256) == 0
    np.testing.assert_array_equal(x, expected)
    x = values(64)
    largest = x.max()
    assert launch(runtime, "tile_max", x, shared=256) == 0
    assert (x == largest).all()
    x = values(64)
    assert launch(runtime, "warp_sum", x) == 0
    for name in ("two_phases", "count", "pairs", "undefined", "exponential"):
        assert launch(runtime, name, values(128)) == 0
    assert launch(runtime, "shift", values(256), blocks=2) == 0


def test_torch_tensors_end_at_their_last_element(runtime: MockRuntime) -> None:
    torch = pytest.importorskip("torch")
    number = KERNELS.index("scale")
    storage = torch.ones(64)
    rows = storage.view(4, 16)[:, :10]  # the last row ends 6 elements before the storage
    with runtime.mapped(x=rows):
        assert runtime.library.run_kernel(number, 0, rows.data_ptr(), 58, 1, 32, 0, None) == 0
    assert storage.tolist() == [2.0] * 58 + [1.0] * 6
    with pytest.raises(OutOfBounds, match="offset 232 of 'x', which has 232 bytes"), runtime.mapped(x=rows):
        runtime.library.run_kernel(number, 0, rows.data_ptr(), 59, 1, 32, 0, None)


def test_an_output_must_be_written_before_it_is_read(runtime: MockRuntime) -> None:
    x = values(64)
    arguments = (0, x.ctypes.data, 64, 1, 64, 0, None)
    with runtime.mapped(["x"], x=x):
        assert runtime.library.run_kernel(KERNELS.index("count"), *arguments) == 0
        assert runtime.library.run_kernel(KERNELS.index("scale"), *arguments) == 0
    with pytest.raises(Uninitialised, match="'x' "), runtime.mapped(["x"], x=x):
        runtime.library.run_kernel(KERNELS.index("scale"), *arguments)


def test_launches_are_recorded_as_they_were_made(runtime: MockRuntime) -> None:
    launch(runtime, "scale", values(100), blocks=3, threads=96, shared=400)
    (record,) = runtime.launches
    assert record.kernel == "_Z5scaleILb0EEvPfl"
    assert (record.grid, record.block, record.shared_bytes, record.stream) == ((3, 1, 1), (96, 1, 1), 400, 1234)
    assert record.result is not None
    assert record.result.loaded_bytes == {"x": 400}
    assert runtime.count("launch") == 1


# ------------------------------------------------------------------------------------------------ faults
@pytest.mark.parametrize(
    ("name", "kind", "message", "count", "blocks", "shared"),
    [
        ("exchange", Race, "race in shared memory", 64, 1, 0),
        ("scale", OutOfBounds, "offset 4012 of 'x'", 1003, 2, 0),
        ("warp_sum", BadShuffle, "lanes 0xffff0000 of it do not execute it", 64, 1, 0),
        ("tile_max", Uninitialised, "shared load at offset 128", 64, 1, 256),
        ("two_phases", DivergentBarrier, "has exited", 64, 1, 0),
        ("count", Race, "two threads store to one address", 64, 1, 0),
        ("shift", Race, "race in global memory", 128, 2, 0),
        ("pairs", Misaligned, "load of 8 bytes", 200, 1, 0),
        ("undefined", Uninitialised, "register never", 64, 1, 0),
        ("exponential", UnknownInstruction, "ex2.approx", 64, 1, 0),
    ],
)
def test_fault_is_found_and_named(
    runtime: MockRuntime, name: str, kind: type[MachineFault], message: str, count: int, blocks: int, shared: int
) -> None:
    with pytest.raises(kind, match=message) as info:
        launch(runtime, name, values(count), fault=True, blocks=blocks, shared=shared)
    text = str(info.value)
    assert f"kernel _Z{len(name)}{name}ILb1EE" in text
    assert re.search(r"fault_kernels\.cuh:\d+|faults\.cu:\d+", text)  # the line of the CUDA source
    assert "PTX line" in text
    if kind is not UnknownInstruction:
        assert info.value.thread is not None


def test_index_computed_in_32_bits_is_found_without_large_memory(runtime: MockRuntime) -> None:
    """Row 3 of 2^30 elements each: beyond 2^31 elements, by address arithmetic alone."""
    stride = 2**30
    for fault in (False, True):
        x = runtime.memory.add_sparse("x", 4 * (3 * stride + 1))
        runtime.choose_blocks = lambda grid: [3]
        number = KERNELS.index("far_element")
        assert runtime.library.run_kernel(number, fault, x.base, stride, 4, 1, 0, None) == (719 if fault else 0)
        if fault:
            with pytest.raises(OutOfBounds, match="offset -4294967296 of 'x'"):
                runtime.raise_fault()
        else:
            assert x.read_at(12 * stride, 1, np.float32)[0] == 1
        runtime.memory.remove(x)
        runtime.choose_blocks = lambda grid: None


def test_a_faulty_kernel_loses_the_context_until_the_fault_is_raised(runtime: MockRuntime) -> None:
    number = KERNELS.index("count")
    x = values(64)
    assert runtime.library.run_kernel(number, 1, x.ctypes.data, 64, 1, 64, 0, None) == 719
    assert runtime.library.peek_error() == 719
    assert runtime.library.run_kernel(number, 0, x.ctypes.data, 64, 1, 64, 0, None) == 719
    with pytest.raises(OutOfBounds, match="nothing is allocated"):
        runtime.raise_fault()
    assert launch(runtime, "count", x) == 0


# ------------------------------------------------------------------------------------------------ stand-in runtime
@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "error", "text"),
    [
        (0, 64, 0, 9, b"invalid configuration argument"),
        (1, 0, 0, 9, b"invalid configuration argument"),
        (1, 1056, 0, 9, b"invalid configuration argument"),
        (1, 64, 48 * 1024 + 1, 1, b"invalid argument"),
    ],
)
def test_launches_a_driver_would_refuse_are_refused(
    runtime: MockRuntime, blocks: int, threads: int, shared: int, error: int, text: bytes
) -> None:
    x = values(64)
    assert launch(runtime, "tile_max", x, blocks=blocks, threads=threads, shared=shared) == error
    assert runtime.library.error_text(error) == text
    assert runtime.launches == []
    assert runtime.library.take_error() == 0  # the launcher's cudaGetLastError took it


def test_shared_memory_above_48_kb_needs_the_opt_in(runtime: MockRuntime) -> None:
    number, x = KERNELS.index("tile_max"), values(64)
    assert launch(runtime, "tile_max", x, shared=100 * 1024) == 1
    assert runtime.library.allow_shared(number, 100 * 1024) == 0
    assert launch(runtime, "tile_max", x, shared=100 * 1024) == 0
    assert launch(runtime, "tile_max", x, shared=100 * 1024 + 16) == 1
    assert runtime.library.allow_shared(number, 227 * 1024 + 1) == 1
    assert runtime.library.take_error() == 1
    runtime.set_attributes(shared_bytes_opt_in=99 * 1024)
    assert runtime.library.allow_shared(number, 100 * 1024) == 1


def test_static_shared_memory_counts_towards_the_limit(runtime: MockRuntime) -> None:
    number = KERNELS.index("exchange")
    assert runtime.library.static_shared(number) == 1024
    assert launch(runtime, "exchange", values(64), shared=47 * 1024) == 0
    assert launch(runtime, "exchange", values(64), shared=47 * 1024 + 4) == 1
    assert runtime.library.allow_shared(number, 227 * 1024) == 1
    assert runtime.library.allow_shared(number, 226 * 1024) == 0


def test_occupancy_follows_threads_shared_memory_and_registers(runtime: MockRuntime) -> None:
    occupancy = runtime.library.resident_blocks
    number = KERNELS.index("tile_max")
    assert occupancy(number, 256, 0) == 8
    assert occupancy(number, 32, 0) == 32
    assert occupancy(number, 256, 56 * 1024 - 1024) == 4
    runtime.library.mock_set_function(b"_Z8tile_maxILb0EEvPfl", ctypes.c_size_t(0), 128, 0)
    assert occupancy(number, 256, 0) == 2
    runtime.library.mock_set_function(b"_Z8tile_maxILb0EEvPfl", ctypes.c_size_t(0), 0, 0)


def test_device_properties_can_be_set(runtime: MockRuntime) -> None:
    assert runtime.library.multiprocessors() == 4
    runtime.set_attributes(multiprocessors=132)
    assert runtime.library.multiprocessors() == 132
    with pytest.raises(ValueError, match="device attribute must be one of"):
        runtime.set_attributes(cores=1)


def test_without_a_driver_every_call_says_so(runtime: MockRuntime) -> None:
    runtime.set_driver(False)
    assert launch(runtime, "count", values(64)) == 35
    assert runtime.library.multiprocessors() == -35
    assert b"driver version is insufficient" in runtime.library.error_text(35)


def test_calls_that_no_graph_can_capture_are_listed(runtime: MockRuntime) -> None:
    launch(runtime, "count", values(64))
    assert runtime.forbidden_calls() == []
    runtime.library.forbidden()
    assert runtime.forbidden_calls() == ["cudaMalloc", "cudaFree", "cudaDeviceSynchronize"]
    assert (runtime.count("allocate"), runtime.count("synchronise")) == (2, 1)


# ------------------------------------------------------------------------------------------------ harness
def test_builds_are_cached_by_content(tmp_path: Path) -> None:
    header, source = tmp_path / "value.h", tmp_path / "unit.cu"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "value.h"\n__global__ void k(int* x) { *x = VALUE; }\n')
    first = harness.compile_ptx(source, include=[tmp_path], flags=[])
    assert harness.compile_ptx(source, include=[tmp_path], flags=[]) == first
    header.write_text("#define VALUE 77\n")
    second = harness.compile_ptx(source, include=[tmp_path], flags=[])
    assert second != first
    assert ", 77;" in second.read_text()
    shutil.rmtree(first.parent)
    shutil.rmtree(second.parent)


def test_compiler_messages_become_the_error(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("this is no CUDA\n")
    with pytest.raises(RuntimeError, match=r"broken.cu\(1\): error"):
        harness.compile_ptx(source)


def test_a_runtime_function_that_the_stand_in_lacks_is_named(tmp_path: Path) -> None:
    source = tmp_path / "unit.cu"
    source.write_text('extern "C" int f() { cudaStream_t s; return cudaStreamCreate(&s); }\n')
    with pytest.raises(RuntimeError, match="stand-in runtime has no cudaStreamCreate"):
        build([source])


def test_unsupported_nvcc_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "nvcc_release", lambda: "11.8")
    assert harness.mock_skip_reason() == (
        "the stand-in runtime knows the private launch symbols of nvcc 13.0, found nvcc 11.8"
    )
    monkeypatch.setattr(harness, "find_nvcc", lambda: None)
    assert harness.mock_skip_reason().startswith("nvcc was not found")
