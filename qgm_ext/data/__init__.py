"""Data: image data sets, their split over workers, and the batches of each step. Nothing is downloaded.

>>> from qgm_ext import data
>>> data.names()
['digits', 'fashion-mnist', 'mnist']
"""

from .batches import WorkerBatches
from .datasets import Dataset, load, names
from .partition import Partition, dirichlet_partition, hold_out, iid_partition, sorted_partition

__all__ = [
    "Dataset",
    "Partition",
    "WorkerBatches",
    "dirichlet_partition",
    "hold_out",
    "iid_partition",
    "load",
    "names",
    "sorted_partition",
]
