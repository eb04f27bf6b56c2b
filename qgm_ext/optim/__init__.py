"""Drop-in optimizers for torch.optim: one process is one worker.

``QGSGD(model.parameters(), lr=0.1)`` takes the place of ``torch.optim.SGD``. The optimizers are in
:mod:`qgm_ext.optim.sgd` and, for every other algorithm, :mod:`qgm_ext.optim.decentralized`, or, for those that compute
gradients at other models than the worker's own, :mod:`qgm_ext.optim.cross_gradient`; what they share is in
:mod:`qgm_ext.optim.base`. With a ``topology`` they average over a process group (:mod:`qgm_ext.distributed`). n workers
on one device are the business of :class:`qgm_ext.StackedOptimizer` and :class:`qgm_ext.Simulator`.
"""

from qgm_ext.optim.base import DecentralizedOptimizer
from qgm_ext.optim.cross_gradient import CrossGradient
from qgm_ext.optim.decentralized import Decentralized
from qgm_ext.optim.sgd import DSGD, QGSGD, DSGDm

__all__ = ["DSGD", "QGSGD", "CrossGradient", "DSGDm", "Decentralized", "DecentralizedOptimizer"]
