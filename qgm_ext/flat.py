"""Parameters and gradients as slices of flat, aligned buffers, so that one pass can step them all.

Holds the layout and the views. Who owns the buffers, and when views must be bound again, is the business of
:mod:`qgm_ext.simulator` and :mod:`qgm_ext.optim`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "FlatLayout", "padded"]

ALIGNMENT = 64  # elements: a cache line or more of every storage type, and whole vectors on every device


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


class FlatLayout:
    """Where each tensor of a list lies in a flat buffer: one after the other, each start aligned.

    The gaps are part of the buffer and hold zeros: zero parameters with zero gradients stay zero under every rule.

    Args:
        shapes: the shapes, in order.
        strides: of each tensor, without gaps or overlap, as those of a channels_last parameter. (Default: the last
            dimension is contiguous.)
        alignment: elements; 1 leaves no gaps.

    Attributes:
        shapes, offsets: of each tensor. segments: (offset, number of elements) of each. size: elements of the buffer, a
            multiple of ``alignment``. strides: as given, or None.

    Example:
        >>> layout = FlatLayout([(2, 3), (5,)])
        >>> layout.offsets, layout.size
        ((0, 64), 128)
    """

    def __init__(
        self,
        shapes: Iterable[Sequence[int]],
        strides: Iterable[Sequence[int]] | None = None,
        alignment: int = ALIGNMENT,
    ) -> None:
        self.shapes = tuple(torch.Size(shape) for shape in shapes)
        self.strides = None if strides is None else tuple(tuple(stride) for stride in strides)
        offsets, end = [], 0
        for shape in self.shapes:
            offsets.append(end)
            end += padded(shape.numel(), alignment)
        self.offsets = tuple(offsets)
        self.segments = tuple((offset, shape.numel()) for offset, shape in zip(offsets, self.shapes, strict=True))
        self.size = end
        self._gaps: dict[torch.device, Tensor] = {}

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors as views of a flat buffer, [..., size] -> each [..., *shape]."""
        if buffer.shape[-1] != self.size:
            raise ValueError(f"buffer must have {self.size} elements in its last dimension, got {list(buffer.shape)}")
        lead = buffer.shape[:-1]
        if self.strides is not None:
            start, between = buffer.storage_offset(), buffer.stride()[:-1]
            return [
                buffer.as_strided((*lead, *shape), (*between, *stride), start + offset)
                for shape, stride, offset in zip(self.shapes, self.strides, self.offsets, strict=True)
            ]
        return [
            buffer.narrow(-1, offset, length).view((*lead, *shape))
            for (offset, length), shape in zip(self.segments, self.shapes, strict=True)
        ]

    def clear_gaps(self, buffer: Tensor) -> None:
        """Put zeros into the gaps of a flat buffer, [..., size], in place: NaN, as a factor, may have reached them."""
        if buffer.device not in self._gaps:
            is_gap = torch.ones(self.size, dtype=torch.bool)
            for offset, length in self.segments:
                is_gap[offset : offset + length] = False
            self._gaps[buffer.device] = is_gap.nonzero()[:, 0].to(buffer.device)
        buffer.index_fill_(-1, self._gaps[buffer.device], 0.0)

    def allocate(self, *lead: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A zeroed buffer [*lead, size]."""
        return torch.zeros(*lead, self.size, dtype=dtype, device=device)
