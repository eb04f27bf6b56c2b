"""CIFAR-10 from ``cifar-10-batches-py``, the folder of pickled arrays that torchvision reads and fetches."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .datasets import Dataset, Root, find, register

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = "test_batch"
_CLASSES = 10
# Of the training pixels, scaled to [0, 1], as in the quasi-global momentum paper's code.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_HINT = (
    "`qgm train --data cifar10 --download` fetches them where there is internet; elsewhere unpack "
    "cifar-10-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) into ./data"
)

_Split = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


def _load_cifar10(root: Root, download: bool = False) -> Dataset:
    if download:
        _fetch(Path("data" if root is None else root).expanduser())
    folder = find("cifar10", root, ("cifar-10-batches-py", ""), (*_TRAIN, _TEST), _HINT)
    parts = [_read_batch(folder / name) for name in _TRAIN]
    train = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    test = _read_batch(folder / _TEST)
    return Dataset(
        name="cifar10",
        train_x=_normalised(train[0]),
        train_y=torch.from_numpy(train[1]),
        test_x=_normalised(test[0]),
        test_y=torch.from_numpy(test[1]),
        num_classes=_CLASSES,
        black=tuple(float(np.float32(-mean / std)) for mean, std in zip(_MEAN, _STD, strict=True)),
    )


def _fetch(root: Path) -> None:
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise ImportError("fetching cifar10 needs torchvision: pip install 'qgm_ext[vision]'") from error
    try:
        CIFAR10(str(root), download=True)
    except (OSError, RuntimeError) as error:  # the latter for a wrong checksum
        raise OSError(f"cifar10 could not be fetched: {error}") from error


def _normalised(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Bytes [N, 3, 32, 32] as float32, one rounding from float64."""
    out = np.empty(images.shape, dtype=np.float32)
    for channel, (mean, std) in enumerate(zip(_MEAN, _STD, strict=True)):
        table = ((np.arange(256) / 255 - mean) / std).astype(np.float32)
        out[:, channel] = table[images[:, channel]]
    return torch.from_numpy(out)


# What arrays are made of in a pickle.
_KNOWN = {"_reconstruct": np.zeros(1).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}


class _ArraysOnly(pickle.Unpickler):
    """A pickle could run anything; these need arrays, and nothing else is built."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "numpy" or name not in _KNOWN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which does not belong there")
        return _KNOWN[name]


def _read_batch(path: Path) -> _Split:
    """One file: a dictionary with "data", bytes [N, 3072] (red, green, blue), and "labels", a list of N classes."""
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        pixels, labels = content["data"], np.asarray(content["labels"], dtype=np.int64)
    except Exception as error:  # damaged bytes make pickle raise nearly anything
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{path}: data must be uint8 [N, 3072], got {got}")
    if labels.shape != (len(pixels),) or not np.isin(labels, np.arange(_CLASSES)).all():
        raise ValueError(f"{path}: labels must be {len(pixels)} classes 0 to {_CLASSES - 1}")
    return pixels.reshape(-1, 3, 32, 32), labels


register("cifar10", _load_cifar10, ("download",))
