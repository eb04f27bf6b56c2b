"""Shared by the benchmarks: one thread, paired minima, and a Markdown table of the ratios at the end.

Times on a shared machine wander, so candidates of one case are timed in turn in one process, the minimum of many
rounds is kept, and ratios are what counts. Nothing here asserts a time.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping

if "PYTEST_XDIST_WORKER" in os.environ:  # a smoke run in several processes: idle threads must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

_rows: dict[str, list[dict[str, str]]] = {}
_smoke = False  # with --benchmark-disable every candidate runs once, to show that it works


def pytest_configure(config: pytest.Config) -> None:
    global _smoke
    _smoke = config.getoption("benchmark_disable")


def smoke() -> bool:
    """Whether candidates run once, to show that they work."""
    return _smoke


def size(elements: int) -> int:
    """So many elements, or a fiftieth of them in a smoke run, which shows that a case works and times nothing."""
    return elements // 50 if _smoke else elements


def paired_minimum(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 15, *, settled: bool = False
) -> dict[str, float]:
    """Seconds of each candidate: the minimum over rounds in which all of them run, one after the other.

    Args:
        candidates: what to time, by name.
        rounds: how often.
        settled: call each candidate once before it is timed, so that it finds caches and heap as it leaves them itself
            and not as the one before it, which may use much more memory.
    """
    best = dict.fromkeys(candidates, float("inf"))
    for candidate in candidates.values():
        candidate()  # warm-up: page faults, caches, compilation
    for _ in range(1 if _smoke else rounds):
        for name, candidate in candidates.items():
            if settled and not _smoke:
                candidate()
            begin = time.perf_counter()
            candidate()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def report(table: str, **row: str) -> None:
    """Add a row to a table that is printed when the session ends."""
    _rows.setdefault(table, []).append(row)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def machine() -> str:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return f"{model}, {os.cpu_count()} cores; torch {torch.__version__}; commit {commit.stdout.strip() or 'unknown'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows or _smoke:
        return
    terminalreporter.write_sep("=", "ratios, minimum of paired rounds")
    terminalreporter.write_line(machine())
    for table, rows in _rows.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        terminalreporter.write_line(f"\n{table}\n")
        terminalreporter.write_line("| " + " | ".join(columns) + " |")
        terminalreporter.write_line("|" + "---|" * len(columns))
        for row in rows:
            terminalreporter.write_line("| " + " | ".join(row.get(column, "") for column in columns) + " |")
