"""Makes the proof tools (ptx, harness, sass) importable by plain name in every pytest import mode, and leaves tests the
time to compile.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
#: Seconds. The first test of a file waits for nvcc, four minutes of one core, which other test processes may share.
LIMIT = 1200

sys.path.insert(0, str(FOLDER))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.timeout(LIMIT))
