"""Data: data sets, their split over workers, and the batches of each step. Nothing is downloaded unless asked for.

>>> from qgm_ext import data
>>> data.names()
['agnews', 'cifar10', 'digits', 'fashion-mnist', 'fortunes', 'imagenet', 'mnist', 'mnist-5k']
"""

from . import cifar, grey_images, imagenet, texts  # noqa: F401 (they register their data sets)
from .batches import WorkerBatches
from .datasets import Dataset, load, names, register
from .image_files import ImageFiles
from .partition import Partition, classes_partition, dirichlet_partition, hold_out, iid_partition, sorted_partition
from .texts import HashTokenizer, PretrainedTokenizer

__all__ = [
    "Dataset",
    "HashTokenizer",
    "ImageFiles",
    "Partition",
    "PretrainedTokenizer",
    "WorkerBatches",
    "classes_partition",
    "dirichlet_partition",
    "hold_out",
    "iid_partition",
    "load",
    "names",
    "register",
    "sorted_partition",
]
