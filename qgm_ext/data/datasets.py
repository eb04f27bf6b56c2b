"""Image data sets as tensors in memory: digits (scikit-learn), Fashion-MNIST and MNIST (idx files).

Nothing is downloaded. Holds the loaders and :class:`Dataset`; not the split over workers (``partition.py``) nor the
batches (``batches.py``).
"""

from __future__ import annotations

import difflib
import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .partition import _integer


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images with their classes, on the CPU.

    Args:
        name: as in :func:`names`.
        train_x: float32 [N, C, H, W], normalised with mean and standard deviation of the training images.
        train_y: int64 [N], classes in [0, num_classes).
        test_x: float32 [M, C, H, W], normalised with the same two numbers.
        test_y: int64 [M].
        num_classes: number of classes.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        _, channels, height, width = self.train_x.shape
        return channels, height, width


@dataclass(frozen=True)
class _IdxSource:
    """A data set in four idx files: what to subtract and divide by, where they may lie, where to get them."""

    mean: float
    std: float
    roots: tuple[str, ...]
    folders: tuple[str, ...]
    hint: str


_Images = npt.NDArray[np.uint8]
_Split = tuple[_Images, npt.NDArray[np.int64]]

# Mean and standard deviation of all training pixels, scaled to [0, 1]. Written down rather than computed, so that they
# are the same numbers with any subset and on any machine.
_DIGITS_MEAN, _DIGITS_STD = 0.3052, 0.3758
_IDX_SOURCES = {
    "fashion-mnist": _IdxSource(
        mean=0.2860,
        std=0.3530,
        roots=("data", "/usr/share/datasets/fashion-mnist"),
        # Named folders first: MNIST's files have the same names, and must not be taken for these.
        folders=("FashionMNIST/raw", "FashionMNIST", "fashion-mnist", "raw", ""),
        hint="on Debian and Ubuntu `apt-get install dataset-fashion-mnist` puts them in "
        "/usr/share/datasets/fashion-mnist; elsewhere take them from "
        "https://github.com/zalandoresearch/fashion-mnist (data/fashion)",
    ),
    "mnist": _IdxSource(
        mean=0.1307,
        std=0.3081,
        roots=("data", "/usr/share/datasets/mnist"),
        folders=("MNIST/raw", "MNIST", "mnist", "raw", ""),
        hint="a folder that torchvision.datasets.MNIST has filled will do",
    ),
}
_IDX_SIDE = 28
_IDX_CLASSES = 10
_IMAGES_MAGIC, _LABELS_MAGIC = 0x00000803, 0x00000801


def names() -> list[str]:
    """Return the names that :func:`load` knows.

    Example:
        >>> names()
        ['digits', 'fashion-mnist', 'mnist']
    """
    return ["digits", *_IDX_SOURCES]


def load(
    name: str, root: str | os.PathLike[str] | None = None, *, num_train: int | None = None, seed: int = 0
) -> Dataset:
    """Load a data set into memory, normalised; deterministic, without network.

    - ``"digits"``: 1,797 handwritten digits of 8x8 that come with scikit-learn; test set: the third of every five
      images of each class (359), training set: the rest (1,438).
    - ``"fashion-mnist"``, ``"mnist"``: 60,000 + 10,000 images of 28x28 from the four idx files, gzipped or not, in
      ``root`` or its usual sub-folders (``raw``, ``FashionMNIST/raw``, ...).

    Args:
        name: one of :func:`names`.
        root: folder of the idx files. By default ./data and /usr/share/datasets/NAME are looked at. Not used by digits.
        num_train: keep so many training images: the first after a shuffle with ``seed``. By default all, in file order.
        seed: for ``num_train`` only; integer in [0, 2**32).
    Raises: ValueError for an unknown name, a damaged file or a ``num_train`` out of range; FileNotFoundError where the
        idx files are not found, saying where it looked and where to get them; ImportError for digits without
        scikit-learn.
    """
    if name not in names():
        near = difflib.get_close_matches(str(name).lower(), names(), n=1, cutoff=0.4)
        suggestion = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown data set {name!r}{suggestion} Known: {', '.join(names())}")
    if name == "digits":
        train, test = _load_digits()
        table = _normalisation(16, _DIGITS_MEAN, _DIGITS_STD)
    else:
        source = _IDX_SOURCES[name]
        train, test = _load_idx(name, source, root)
        table = _normalisation(255, source.mean, source.std)
    images, labels = train
    if num_train is not None:
        num_train = _integer("num_train", num_train, 1)
        seed = _integer("seed", seed, 0, 2**32)
        if num_train > len(images):
            raise ValueError(f"num_train={num_train} is more than the {len(images)} training images of {name}")
        chosen = np.random.RandomState(seed).permutation(len(images))[:num_train]
        images, labels = images[chosen], labels[chosen]
    return Dataset(
        name=name,
        train_x=torch.from_numpy(table[images][:, np.newaxis]),
        train_y=torch.from_numpy(labels),
        test_x=torch.from_numpy(table[test[0]][:, np.newaxis]),
        test_y=torch.from_numpy(test[1]),
        num_classes=10,
    )


def _normalisation(largest: int, mean: float, std: float) -> npt.NDArray[np.float32]:
    """Table from pixel value to normalised value: one rounding from float64, and no float64 copy of the images."""
    return ((np.arange(largest + 1) / largest - mean) / std).astype(np.float32)


def _load_digits() -> tuple[_Split, _Split]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set digits comes with scikit-learn: pip install 'qgm_ext[train]'") from error
    bunch = load_digits()
    images = np.asarray(bunch.images).astype(np.uint8)  # whole numbers 0 to 16, stored as float64
    labels = np.asarray(bunch.target).astype(np.int64)
    # Position of each image among those of its class; taking every fifth spreads the writers over both parts.
    rank = np.empty(len(labels), dtype=np.int64)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    is_test = rank % 5 == 2
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


def _load_idx(name: str, source: _IdxSource, root: str | os.PathLike[str] | None) -> tuple[_Split, _Split]:
    roots = [Path(r) for r in source.roots] if root is None else [Path(root).expanduser()]
    looked = [r / folder for r in roots for folder in source.folders]
    stems = [(part, kind) for part in ("train", "t10k") for kind in ("images", "labels")]
    found: list[Path] = []
    missing: list[str] = []
    for folder in looked:
        files = [_find_idx(folder, *stem) for stem in stems]
        present = [file for file in files if file is not None]
        if len(present) == len(stems):
            found = present
            break
        if present and not missing:
            lost = [_idx_names(*stem)[0] for stem, file in zip(stems, files, strict=True) if file is None]
            missing = [f"{folder} has only some of them, it lacks {', '.join(lost)}."]
    if not found:
        expected = ", ".join(f"{_idx_names(*stem)[0]}[.gz]" for stem in stems)
        where = ", ".join(str(folder) for folder in looked)
        raise FileNotFoundError(
            " ".join(
                [
                    f"{name}: the files {expected} were not found.",
                    *missing,
                    f"Looked in: {where}. To get them: {source.hint}.",
                ]
            )
        )
    train_x, train_y, test_x, test_y = found
    return _read_split(train_x, train_y), _read_split(test_x, test_y)


def _idx_names(part: str, kind: str) -> list[str]:
    """File names in use for one of the four files, without and with .gz; the original one first."""
    dimensions = 3 if kind == "images" else 1
    stems = [f"{part}-{kind}-idx{dimensions}-ubyte", f"{part}-{kind}.idx{dimensions}-ubyte"]
    return [stem + suffix for suffix in ("", ".gz") for stem in stems]


def _find_idx(folder: Path, part: str, kind: str) -> Path | None:
    for file_name in _idx_names(part, kind):
        if (folder / file_name).is_file():
            return folder / file_name
    return None


def _read_split(images_path: Path, labels_path: Path) -> _Split:
    images = _read_idx(images_path, _IMAGES_MAGIC)
    labels = _read_idx(labels_path, _LABELS_MAGIC)
    if images.shape[1:] != (_IDX_SIDE, _IDX_SIDE):
        raise ValueError(
            f"{images_path}: images must be {_IDX_SIDE}x{_IDX_SIDE}, got {images.shape[1]}x{images.shape[2]}"
        )
    if len(images) == 0:
        raise ValueError(f"{images_path}: holds no images")
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels; they must match"
        )
    if labels.max() >= _IDX_CLASSES:
        raise ValueError(f"{labels_path}: labels must be 0 to {_IDX_CLASSES - 1}, got {labels.max()}")
    return images, labels.astype(np.int64)


def _read_idx(path: Path, magic: int) -> _Images:
    """Read one idx file, gzipped or not: magic number, one big-endian uint32 per dimension, then bytes."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path}: damaged gzip file of {len(content)} bytes ({error}); it is truncated or changed, get it again"
            ) from error
    dimensions = magic & 0xFF
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise ValueError(f"{path}: expected an idx header of {header} bytes, got a file of {len(content)} bytes")
    first, *shape = (int(v) for v in np.frombuffer(content, dtype=">u4", count=1 + dimensions))
    if first != magic:
        kind = "images" if magic == _IMAGES_MAGIC else "labels"
        raise ValueError(f"{path}: expected magic number {magic:#010x} ({kind}), got {first:#010x}")
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes ({header} of header, values of shape {shape}), got {len(content)} bytes"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
