"""Decentralized deep learning with quasi-global momentum: fused gossip optimizers for PyTorch.

Workers that each hold their own data train together by averaging with neighbours on a graph. Start with
:class:`Simulator` (many workers on one device), :class:`optim.QGSGD` (a drop-in for torch.optim.SGD) or
:class:`StackedOptimizer` (your own training loop over n stacked parameter vectors).
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgm_ext import algorithms, data, distributed, models, ops, optim, topology
    from qgm_ext.ops import has_native
    from qgm_ext.simulator import Simulator
    from qgm_ext.stacked import StackedOptimizer

try:
    __version__ = version("qgm_ext")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Simulator",
    "StackedOptimizer",
    "__version__",
    "algorithms",
    "data",
    "distributed",
    "has_native",
    "models",
    "ops",
    "optim",
    "topology",
]

# Imported when they are first asked for (PEP 562): torch takes seconds, and topologies and the command line's help need
# none of it.
_MODULES = ("algorithms", "data", "distributed", "models", "ops", "optim", "topology")
_HOMES = {"Simulator": "simulator", "StackedOptimizer": "stacked", "has_native": "ops"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"qgm_ext.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"qgm_ext.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
