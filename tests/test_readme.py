"""The README's Python examples run as they stand there, one after the other, and its commands exist."""

from __future__ import annotations

import re
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


def test_marked_commands_are_one_line_each():
    for name in ("train", "test"):
        block = re.search(rf"<!-- {name} command -->\n```\n(.*?)```\n<!-- end -->", README, re.DOTALL)
        assert block is not None, f"README.md marks no {name} command"
        assert block[1].count("\n") == 1
        assert block[1].startswith("python3 -m venv .venv && .venv/bin/pip install '.[")
