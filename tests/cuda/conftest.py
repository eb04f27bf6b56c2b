"""Makes the proof tools (ptx, harness, sass) importable by plain name in every pytest import mode."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
