"""ImageFiles: images that stay in their files until they are needed, in place of a tensor that would not fit in memory.

As the usual ImageNet protocol has it: in evaluation the shorter side becomes 8/7 of the size and the middle is cut out;
in training a random part is scaled to the size and flipped half of the time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CROP_DRAWS", "ImageFiles"]

_TRIES = 10  # of a random part that fits, as torchvision's RandomResizedCrop has them
CROP_DRAWS = 4 * _TRIES + 1
_AREA, _LOG_RATIO = (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))

Bytes = npt.NDArray[np.uint8]


class ImageFiles:
    """Images [N, 3, size, size] in files; behaves like such a tensor where samples are taken out of it.

    Args:
        paths: N image files that Pillow can read.
        mean, std: of each channel, of pixels scaled to [0, 1].
        size: height and width of what comes out.
        device, dtype: of what comes out.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.paths = list(paths)
        self._mean, self._std, self._size = tuple(mean), tuple(std), size
        self.device, self.dtype = torch.device(device), dtype
        self._tables = [((np.arange(256) / 255 - m) / s).astype(np.float32) for m, s in zip(mean, std, strict=True)]
        self._pool: ThreadPoolExecutor | None = None

    @property
    def shape(self) -> torch.Size:
        """[N, 3, size, size]."""
        return torch.Size((len(self.paths), 3, self._size, self._size))

    def __len__(self) -> int:
        return len(self.paths)

    def dim(self) -> int:
        """4, as of a tensor of images."""
        return 4

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ImageFiles:
        """The same images, to come out on another device and of another dtype."""
        return ImageFiles(self.paths, self._mean, self._std, self._size, device, dtype)

    def subset(self, indices: Tensor) -> ImageFiles:
        """Those at these positions, still in their files."""
        paths = [self.paths[i] for i in indices.tolist()]
        return ImageFiles(paths, self._mean, self._std, self._size, self.device, self.dtype)

    def digest(self) -> bytes:
        """SHA-256 of the names (with their folder's) and sizes of the files."""
        sha = hashlib.sha256()
        for path in self.paths:
            sha.update(f"{path.parent.name}/{path.name}:{path.stat().st_size}\n".encode())
        return sha.digest()

    def __getitem__(self, part: slice) -> Tensor:
        """Decode a slice, as in evaluation."""
        return self._decode(self.paths[part], [self._middle] * len(self.paths[part]))

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """Decode the images at these positions, as in evaluation; ``dim`` is 0."""
        if dim != 0:
            raise ValueError(f"images are selected along dimension 0, got {dim}")
        return self.subset(rows)[:]

    def random_crops(self, rows: Tensor, uniforms: npt.NDArray[np.float64]) -> Tensor:
        """Decode the images at these positions, as in training.

        Args:
            rows: positions, [M].
            uniforms: numbers in [0, 1), [M, CROP_DRAWS], that decide part and flip of each.
        """
        paths = [self.paths[i] for i in rows.tolist()]
        return self._decode(paths, [lambda image, own=own: self._crop(image, own) for own in uniforms])  # type: ignore[misc]

    def _decode(self, paths: Sequence[Path], cuts: Sequence[Callable[[Image], Image]]) -> Tensor:
        out = np.empty((len(paths), 3, self._size, self._size), dtype=np.float32)

        def one(i: int) -> None:
            pixels = np.asarray(_cut_out(paths[i], cuts[i]))
            for channel, table in enumerate(self._tables):
                out[i, channel] = table[pixels[:, :, channel]]

        # Pillow gives up Python's lock while it decodes and scales; each thread writes images of its own.
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max(1, torch.get_num_threads()), "qgm_ext-images")
        for _ in self._pool.map(one, range(len(paths))):
            pass
        return torch.from_numpy(out).to(self.device, self.dtype)

    def _middle(self, image: Image) -> Image:
        from PIL.Image import Resampling

        size, shorter = self._size, self._size * 8 // 7
        scale = shorter / min(image.size)
        width, height = (max(shorter, int(side * scale)) for side in image.size)
        image = image.resize((width, height), Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.crop((left, top, left + size, top + size))

    def _crop(self, image: Image, uniforms: npt.NDArray[np.float64]) -> Image:
        from PIL.Image import Resampling, Transpose

        part = image.crop(_random_box(*image.size, uniforms)).resize((self._size, self._size), Resampling.BILINEAR)
        return part.transpose(Transpose.FLIP_LEFT_RIGHT) if uniforms[-1] < 0.5 else part


def _cut_out(path: Path, cut: Callable[[Image], Image]) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return cut(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} can't be read as an image: {error}") from error


def _random_box(width: int, height: int, uniforms: npt.NDArray[np.float64]) -> tuple[int, int, int, int]:
    """A part of 8 to 100 % of the area with a ratio of 3:4 to 4:3; after ten that don't fit, the largest in the middle.

    Source: torchvision's RandomResizedCrop (Szegedy et al., "Going Deeper with Convolutions", 2015), in other words.
    """
    for area, ratio, x, y in uniforms[:-1].reshape(_TRIES, 4):
        wanted = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
        shape = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * ratio)
        w, h = round(math.sqrt(wanted * shape)), round(math.sqrt(wanted / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    low, high = (math.exp(bound) for bound in _LOG_RATIO)
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
