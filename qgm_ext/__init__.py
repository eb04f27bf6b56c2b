"""Decentralized deep learning with quasi-global momentum: fused gossip optimizers for PyTorch.

Workers that each hold their own data train together by averaging with neighbours on a graph. Start with
:class:`Simulator` (many workers on one device), :class:`optim.QGSGD` (a drop-in for torch.optim.SGD) or
:class:`StackedOptimizer` (your own training loop over n stacked parameter vectors).
"""

from importlib.metadata import PackageNotFoundError, version

from qgm_ext import algorithms, ops, optim, topology
from qgm_ext.ops import has_native
from qgm_ext.simulator import Simulator
from qgm_ext.stacked import StackedOptimizer

try:
    __version__ = version("qgm_ext")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Simulator", "StackedOptimizer", "__version__", "algorithms", "has_native", "ops", "optim", "topology"]
