"""The README's Python examples run as they stand there, one after the other, and its commands exist."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_examples_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["sim"].num_steps == 20


def test_the_example_of_several_processes_runs(tmp_path):
    block = re.search(r"<!-- example: torchrun -->\n```py\n(.*?)```\n<!-- end -->", README, re.DOTALL)
    assert block is not None
    script = tmp_path / "train.py"
    script.write_text(block[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ran = subprocess.run(
        [*torchrun, "--nproc-per-node", "3", str(script)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    # Not by lines: the processes share a pipe, and one may write between another's words and its line break.
    said = re.findall(r"worker (\d) of 3: loss \d+\.\d\d", ran.stdout)
    assert sorted(said) == ["0", "1", "2"], ran.stdout + ran.stderr


def test_marked_commands_are_one_line_each():
    for name in ("train", "test"):
        block = re.search(rf"<!-- {name} command -->\n```\n(.*?)```\n<!-- end -->", README, re.DOTALL)
        assert block is not None, f"README.md marks no {name} command"
        assert block[1].count("\n") == 1
        assert block[1].startswith("python3 -m venv .venv && .venv/bin/pip install '.[")


def test_the_tables_of_results_are_those_of_the_results_files():
    path = Path(__file__).parent.parent / "benchmarks" / "fill_readme.py"
    spec = importlib.util.spec_from_file_location("fill_readme", path)
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    assert "<!-- results: paper-small -->" in README
    assert fill.filled(README) == README
