"""The project's kernels and launchers as C++ under sanitizers, in several thread orders, against the CPU backend.

ThreadSanitizer sees races between CUDA threads, AddressSanitizer the first byte beyond a buffer. Injected faults must
be found.
"""

from __future__ import annotations

import subprocess
import zlib
from pathlib import Path

import pytest

import harness

SOURCE = Path(__file__).parent / "sources" / "kernels_emulation.cpp"
CSRC = Path(__file__).resolve().parents[2] / "csrc"
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
reason = harness.emulation_skip_reason()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason or "g++ is there")


def run(sanitizer: str, op: str, seed: int = 0, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    # headers are part of the harness' key for compiled programs, included sources are not
    key = zlib.crc32((CSRC / "cuda" / "reduce.cu").read_bytes())
    # sanitized code is large: one SIMD level of the CPU backend is enough
    defines = [f"REDUCE_SOURCE={key}", "QGM_ONE_SIMD_LEVEL", *([fault] if fault else [])]
    program = harness.build_emulation(
        SOURCE, [*SANITIZERS[sanitizer], "-fno-strict-aliasing"], include=[CSRC], defines=defines
    )
    return harness.run_emulation(program, op, str(seed))


@pytest.mark.parametrize("sanitizer", list(SANITIZERS))
@pytest.mark.parametrize("op", ["tile", "norm", "columns", "relay", "process", "reductions"])
def test_kernels_run_clean_in_every_thread_order(sanitizer: str, op: str) -> None:
    for seed in (0, 1, 2):
        done = run(sanitizer, op, seed)
        assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-3000:]


@pytest.mark.parametrize(
    ("sanitizer", "op", "fault", "message"),
    [
        ("thread", "tile", "QGM_FAULT_NO_BARRIER", "ThreadSanitizer"),
        ("thread", "columns", "QGM_FAULT_NO_BARRIER", "data race"),
        ("thread", "norm", "QGM_FAULT_NO_BARRIER", "data race"),
        ("thread", "relay", "QGM_FAULT_NO_BARRIER", "data race"),
        ("thread", "reductions", "QGM_FAULT_NO_BARRIER", "data race"),
        ("thread", "tile", "QGM_FAULT_GRID", "data race"),
        ("address", "columns", "QGM_FAULT_TAIL", "AddressSanitizer"),
        ("address", "relay", "QGM_FAULT_TAIL", "AddressSanitizer"),
        ("address", "process", "QGM_FAULT_TAIL", "AddressSanitizer"),
        ("address", "reductions", "QGM_FAULT_TAIL", "AddressSanitizer"),
    ],
)
def test_injected_fault_is_found(sanitizer: str, op: str, fault: str, message: str) -> None:
    done = run(sanitizer, op, fault=fault)
    assert done.returncode not in (0, 3), done.stdout
    assert message in done.stderr or done.returncode == 2, done.stderr[-3000:]
