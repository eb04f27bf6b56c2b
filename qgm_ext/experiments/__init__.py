"""Experiments: training runs with files, self-check and timing. The command line (:mod:`qgm_ext.cli`) is thin over it.

>>> from qgm_ext.experiments import TrainConfig
>>> TrainConfig().algorithm
'qg_dsgdm_n'
"""

from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.train import Result, Training, resume, run

__all__ = ["Result", "TrainConfig", "Training", "resume", "run"]
