"""The native core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp"]
THREAD = ["-fsanitize=thread", "-DQGM_STD_THREADS"]

# Most of it is the compiler's: four minutes for all rules on slow cores, more where others share them.
pytestmark = pytest.mark.timeout(1200)
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER} not on PATH")


SMALL = ["-DQGM_ONE_SIMD_LEVEL"]  # sanitized code is large


def build_and_run(
    folder: Path, flags: list[str], rule_headers: list[str], change: tuple[str, str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Compile core_test.cpp with some rule headers; `change` = (file, old, new) injects a fault into a copy of csrc."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    if change:
        path = source / change[0]
        text = path.read_text()
        assert text.count(change[1]) == 1, f"{change[1]!r} must occur once in {change[0]}"
        path.write_text(text.replace(change[1], change[2]))
    lines = ['#include "cpu/registry.h"']
    lines += [f'#include "rules/{stem}.h"' for stem in rule_headers]
    lines += [
        f"static const bool registered_{stem} = qgm::cpu::register_rules(qgm::rules::{stem}::Rules{{}});"
        for stem in rule_headers
    ]
    lines += [f'#include "{ROOT / "tests/native/core_test.cpp"}"']
    (folder / "main.cpp").write_text("\n".join(lines) + "\n")
    command = [COMPILER, "-std=c++17", "-O0", "-g1", "-ffp-contract=off", "-Wno-unused", *SMALL, *flags, f"-I{source}"]
    subprocess.run(
        [*command, str(folder / "main.cpp"), "-o", str(folder / "core_test"), "-pthread"], check=True, cwd=folder
    )
    runner = ["setarch", "-R"] if "-fsanitize=thread" in flags and shutil.which("setarch") else []
    return subprocess.run([*runner, str(folder / "core_test")], capture_output=True, text=True, check=False)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("flags", [ADDRESS, THREAD], ids=["address-undefined", "thread"])
def test_core_is_clean(tmp_path, flags):
    headers = sorted(path.stem for path in (ROOT / "csrc/rules").glob("*.h") if path.stem != "rule")
    result = build_and_run(tmp_path, flags, headers)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("passed")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "change", "report"),
    [
        (
            ADDRESS,
            ("cpu/gossip_step.h", "a.cols - begin, scratch);\n  }\n};", "a.cols - begin + 1, scratch);\n  }\n};"),
            "heap-buffer-overflow|guard value|differs",
        ),
        (
            THREAD,
            ("cpu/shares.h", "scratch.data() + thread * scratch_size", "scratch.data() + 0 * thread"),
            "data race",
        ),
    ],
    ids=["tail-too-long", "threads-share-scratch"],
)
def test_sanitizers_catch_an_injected_fault(tmp_path, flags, change, report):
    result = build_and_run(tmp_path, flags, ["dsgd"], change)
    assert result.returncode != 0
    assert any(part in result.stdout + result.stderr for part in report.split("|")), result.stderr[-2000:]
