"""The host emulation of CUDA: right kernels run clean under every sanitizer, and each fault fails the run.

The kernels are those of ``test_ptx_nvcc.py``, compiled as C++: what nvcc compiles and what the sanitizers see is one
source.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import harness

SOURCES = Path(__file__).parent / "sources"
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
reason = harness.emulation_skip_reason()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason or "g++ is there")


def run(sanitizer: str, name: str, *, fault: bool = False, seed: int = 0) -> subprocess.CompletedProcess[str]:
    program = harness.build_emulation(SOURCES / "emulation_test.cpp", SANITIZERS[sanitizer], include=[SOURCES])
    return harness.run_emulation(program, name, str(int(fault)), str(seed))


@pytest.mark.parametrize("sanitizer", list(SANITIZERS))
@pytest.mark.parametrize("name", ["exchange", "scale", "warp_sum", "tile_max", "two_phases", "count", "shift", "pairs"])
def test_right_kernels_run_clean_in_every_thread_order(sanitizer: str, name: str) -> None:
    for seed in (0, 1, 2):
        done = run(sanitizer, name, seed=seed)
        assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize(
    ("sanitizer", "name", "message", "line"),
    [
        ("address", "scale", "AddressSanitizer", "fault_kernels.cuh"),
        ("address", "tile_max", "AddressSanitizer", "fault_kernels.cuh"),
        ("address", "pairs", "misaligned address", "fault_kernels.cuh"),
        ("address", "two_phases", "barrier that not all threads of the block reach: block (0, 0, 0)", ""),
        ("address", "warp_sum", "names lanes that have exited", ""),
        ("thread", "exchange", "data race", "fault_kernels.cuh"),
        ("thread", "count", "data race", "fault_kernels.cuh"),
        ("thread", "shift", "data race", "fault_kernels.cuh"),
    ],
)
def test_fault_fails_the_run_and_is_named(sanitizer: str, name: str, message: str, line: str) -> None:
    done = run(sanitizer, name, fault=True)
    assert done.returncode not in (0, 2), done.stdout
    assert message in done.stderr
    assert line in done.stderr


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_missing_barrier_gives_a_wrong_result_too(seed: int) -> None:
    """Without the thread sanitizer, because a fiber runs ahead of the others up to its next barrier."""
    assert run("address", "exchange", fault=True, seed=seed).returncode == 2


@pytest.mark.parametrize("name", ["conversions", "warps"])
def test_device_functions_do_what_cuda_says(name: str) -> None:
    done = run("address", name)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stdout + done.stderr
