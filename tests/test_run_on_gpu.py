"""benchmarks/run_on_gpu.sh and its baselines as far as they go without a GPU: what the report holds, when it fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "run_on_gpu.sh"

# Answers as python does on a machine with a GPU, and notes how it was called.
PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  -) cat > /dev/null; echo 90 ;;
  setup.py*) echo "building for $QGM_CUDA_ARCHS with QGM_CUDA=$QGM_CUDA" >> "$CALLS" ;;
  *tests/test_gpu.py*) echo "12 passed"; exit "${TESTS_END_WITH:-0}" ;;
  *benchmarks/bench_gpu.py*) printf 'Measured on X: a step\\n\\n| n | ms |\\n|---|---|\\n| 16 | 0.5 |\\n' ;;
esac
"""
SANITIZER = """#!/bin/sh
while [ "$1" != "$PYTHON" ]; do echo "sanitizer $1" >> "$CALLS"; shift; done
exec "$@"
"""


def run(folder: Path, *, sanitizer: bool, tests_end_with: int = 0) -> tuple[int, str, str]:
    """Return (exit status, report, calls) of the script with stand-ins for python and compute-sanitizer."""
    tools = folder / "bin"
    tools.mkdir()
    programs = {"python": PYTHON, **({"compute-sanitizer": SANITIZER} if sanitizer else {})}
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    calls, report = folder / "calls", folder / "report.md"
    environment = {
        **os.environ,
        "PATH": f"{tools}:/usr/bin:/bin",
        "PYTHON": str(tools / "python"),
        "CALLS": str(calls),
        "TESTS_END_WITH": str(tests_end_with),
    }
    done = subprocess.run(["bash", str(SCRIPT), str(report)], env=environment, capture_output=True, text=True)
    return done.returncode, report.read_text(), calls.read_text()


def test_report_holds_every_part_and_a_table(tmp_path: Path) -> None:
    status, report, calls = run(tmp_path, sanitizer=True)
    assert status == 0
    assert "building for 90 with QGM_CUDA=1" in calls
    titles = [line for line in report.splitlines() if line.startswith("## ")]
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert titles == [
        "## Same bits as the CPU: passed",
        *[f"## compute-sanitizer {tool}: passed" for tool in tools],
        "## Timing: passed",
    ]
    assert all(f"sanitizer {tool}\n" in calls for tool in tools)
    assert report.endswith("\nMeasured on X: a step\n\n| n | ms |\n|---|---|\n| 16 | 0.5 |\n")


def test_failure_is_in_the_report_and_in_the_exit_status(tmp_path: Path) -> None:
    status, report, _ = run(tmp_path, sanitizer=False, tests_end_with=1)
    assert status == 1
    assert "## Same bits as the CPU: FAILED" in report
    assert "## compute-sanitizer: not installed here, not run" in report
    assert "## Timing: passed" in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_script_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "report.md")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "torch sees no GPU on this machine" in done.stderr
    assert not (tmp_path / "report.md").exists()


TRITON = """
import torch
import triton_step
from qgm_ext import ops, topology

ring = topology.ring(16)
x, g, m = (torch.randn(16, 300, generator=torch.Generator().manual_seed(k)) for k in range(3))
expected, state = x.clone(), m.clone()
ops.gossip_step_(expected, g, [state], ring.mixing().tensors(), ring.mixing().form, "qg_dsgdm_n", [0.1, 0.9, 0.8, 1e-4])
triton_step.step(x, g, m, torch.tensor(ring.matrix(), dtype=torch.float32), 0.1, 0.9, 0.8, 1e-4)
torch.testing.assert_close(x, expected)
torch.testing.assert_close(m, state)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_triton_baseline_computes_the_same_step() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
