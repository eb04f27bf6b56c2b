"""Augmentation: random changes of training images, each a pure function of the image and of numbers it is handed.

The numbers come from (seed, step, worker, position in the batch), see :mod:`qgm_ext.data.batches`; so a resumed run,
another engine or another number of processes changes nothing.

- ``"crop_flip"``: 4 black pixels all around, a random part of the old size, and half of the images flipped: the usual
  for CIFAR-10, as in Lin et al., "Quasi-Global Momentum" (ICML 2021);
- ``"resized_crop"``: a random part scaled to the size, half of them flipped: the usual for ImageNet;
- ``"erasing"``: in half of the images a random rectangle set to 0 (Zhong et al., "Random Erasing Data Augmentation",
  AAAI 2020; numbers as torchvision has them).
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .datasets import Dataset
from .image_files import CROP_DRAWS, ImageFiles

__all__ = ["NAMES", "Augmentation", "make"]

NAMES = ("none", "crop_flip", "erasing", "resized_crop")

Uniforms = npt.NDArray[np.float64]


class Augmentation(Protocol):
    """How samples are changed.

    Attributes:
        draws: how many random numbers each sample takes.
    """

    draws: int

    def __call__(self, samples: Tensor | ImageFiles, rows: Tensor, uniforms: Uniforms) -> Tensor:
        """The samples at ``rows`` [M], changed, [M, ...]; ``uniforms`` [M, draws] in [0, 1) decide how."""


def make(name: str, dataset: Dataset) -> Augmentation | None:
    """The augmentation called ``name`` for a data set; None for "none".

    Raises:
        ValueError: if there is none of this name, or the data set has no images for it.
    """
    if name not in NAMES:
        raise ValueError(f"augment must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "none":
        return None
    in_files = isinstance(dataset.train_x, ImageFiles)
    if in_files != (name == "resized_crop") or dataset.black is None:
        kind = "images in files" if in_files else "images" if dataset.black is not None else "no images"
        wanted = "images in files (imagenet)" if name == "resized_crop" else "images in memory"
        raise ValueError(f"augment = {name!r} is for {wanted}; {dataset.name} has {kind}")
    if name == "resized_crop":
        return ResizedCrop()
    return CropFlip(dataset.black) if name == "crop_flip" else Erasing()


class CropFlip:
    """Shift by up to ``padding`` pixels in each direction, black moving in; flip half of the images.

    Args:
        black: what a black pixel is, one number for each channel.
        padding: P >= 0.
    """

    draws = 3

    def __init__(self, black: tuple[float, ...], padding: int = 4) -> None:
        self._black, self._padding = black, padding

    def __call__(self, samples: Tensor | ImageFiles, rows: Tensor, uniforms: Uniforms) -> Tensor:
        images = samples.index_select(0, rows)
        _, _, height, width = images.shape
        pad = self._padding
        black = torch.tensor(self._black, dtype=images.dtype, device=images.device)[:, None, None]
        padded = black.expand(len(images), -1, height + 2 * pad, width + 2 * pad).contiguous()
        padded[:, :, pad : pad + height, pad : pad + width] = images
        drawn = torch.from_numpy(uniforms).to(images.device)
        top, left = (drawn[:, :2] * (2 * pad + 1)).long().unbind(1)
        across = torch.arange(width, device=images.device)
        across = torch.where(drawn[:, 2, None] < 0.5, across.flip(0), across)  # [M, W]
        down = torch.arange(height, device=images.device) + top[:, None]
        chosen = padded[
            torch.arange(len(images), device=images.device)[:, None, None],
            :,
            down[:, :, None],
            (across + left[:, None])[:, None, :],
        ]
        return chosen.permute(0, 3, 1, 2).contiguous()


class ResizedCrop:
    """A random part of each image file, scaled to the size; flip half of the images."""

    draws = CROP_DRAWS

    def __call__(self, samples: Tensor | ImageFiles, rows: Tensor, uniforms: Uniforms) -> Tensor:
        if not isinstance(samples, ImageFiles):
            raise TypeError(f"resized_crop takes images in files, got {type(samples).__name__}")
        return samples.random_crops(rows, uniforms)


class Erasing:
    """In half of the images set a rectangle of 2 to 33 % of the area, ratio 0.3 to 3.3, to 0."""

    draws = 5

    def __call__(self, samples: Tensor | ImageFiles, rows: Tensor, uniforms: Uniforms) -> Tensor:
        images = samples.index_select(0, rows)
        _, _, height, width = images.shape
        area = height * width * (0.02 + 0.31 * uniforms[:, 1])
        low, high = math.log(0.3), math.log(3.3)
        ratio = np.exp(low + (high - low) * uniforms[:, 2])
        h = np.minimum(np.rint(np.sqrt(area * ratio)), height)
        w = np.minimum(np.rint(np.sqrt(area / ratio)), width)
        top = np.floor(uniforms[:, 3] * (height - h + 1))
        left = np.floor(uniforms[:, 4] * (width - w + 1))
        h[uniforms[:, 0] >= 0.5] = 0
        down, across = np.arange(height), np.arange(width)
        inside = ((down >= top[:, None]) & (down < (top + h)[:, None]))[:, None, :, None]
        inside = inside & ((across >= left[:, None]) & (across < (left + w)[:, None]))[:, None, None, :]
        return images.masked_fill(torch.from_numpy(inside).to(images.device), 0)
