"""Drop-in optimizers for torch.optim: one process is one worker.

``QGSGD(model.parameters(), lr=0.1)`` takes the place of ``torch.optim.SGD``. The optimizers are in
:mod:`qgm_ext.optim.sgd`, what they share in :mod:`qgm_ext.optim.base`; n workers on one device are the business of
:class:`qgm_ext.StackedOptimizer` and :class:`qgm_ext.Simulator`.
"""

from qgm_ext.optim.base import DecentralizedOptimizer
from qgm_ext.optim.sgd import DSGD, QGSGD, DSGDm

__all__ = ["DSGD", "QGSGD", "DSGDm", "DecentralizedOptimizer"]
