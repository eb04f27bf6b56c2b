"""ImageNet, or any images in one folder for each class, laid out as torchvision's ImageFolder has them."""

from __future__ import annotations

from pathlib import Path

import torch

from .datasets import Dataset, Root, find, register
from .image_files import ImageFiles

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HINT = (
    "register at https://image-net.org, and unpack ILSVRC2012 so that every class has a folder of its own in train and "
    "in val; any other images in such folders will do"
)


def _load_imagenet(root: Root) -> Dataset:
    folder = find("imagenet", root, ("imagenet", "ImageNet", "ILSVRC2012", ""), ("train", "val"), _HINT)
    classes = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"{folder / 'train'} holds no folders, one for each class")
    unknown = sorted({entry.name for entry in (folder / "val").iterdir() if entry.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"{folder / 'val'} has the class {unknown[0]}, which {folder / 'train'} does not have")
    train_x, train_y = _list(folder / "train", classes)
    test_x, test_y = _list(folder / "val", classes)
    black = tuple(-mean / std for mean, std in zip(_MEAN, _STD, strict=True))
    return Dataset("imagenet", train_x, train_y, test_x, test_y, len(classes), black)


def _list(folder: Path, classes: list[str]) -> tuple[ImageFiles, torch.Tensor]:
    """Files and classes in the order of ImageFolder: sorted folders, sorted paths."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in _SUFFIXES)
        paths += own
        labels += [label] * len(own)
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(_SUFFIXES)})")
    return ImageFiles(paths, _MEAN, _STD), torch.tensor(labels)


register("imagenet", _load_imagenet)
