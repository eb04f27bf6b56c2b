"""Communication: what the steps of a worker sent and received, counted pass by pass.

The bytes of an algorithm are those of :class:`qgm_ext.StackedOptimizer`, here of one worker. What really travels is
counted where it is sent, in :mod:`qgm_ext.distributed.exchange`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Communication", "lane_sizes", "share_size"]

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Communication:
    """What one worker exchanged with others.

    Args:
        bytes_sent, bytes_received: as the algorithm counts them: the numbers of the parameters, compressed where the
            algorithm compresses. Over all workers, what :class:`qgm_ext.StackedOptimizer` calls ``bytes_sent``.
        wire_bytes_sent, wire_bytes_received: of what travelled: with headers and the gaps between parameters.
        seconds: that the worker waited for messages.
        stale_messages: that it merged though they were of an earlier step (the option staleness).
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    wire_bytes_sent: int = 0
    wire_bytes_received: int = 0
    seconds: float = 0.0
    stale_messages: int = 0

    def __add__(self, more: Communication) -> Communication:
        return Communication(*map(operator.add, self._figures(), more._figures()))

    def __sub__(self, before: Communication) -> Communication:
        return Communication(*map(operator.sub, self._figures(), before._figures()))

    def _figures(self) -> Iterable[Any]:
        return vars(self).values()  # in their order; dataclasses.astuple takes longer than all else about a step's end


@functools.lru_cache(maxsize=64)
def share_size(segments: Segments, pieces: tuple[tuple[int, int], ...]) -> int:
    """How many numbers of the parameters lie in pieces of a row.

    Args:
        segments: (first, length) of each parameter in the row.
        pieces: (begin, end) of each piece; they don't overlap.
    """
    return sum(
        max(0, min(end, first + length) - max(begin, first)) for begin, end in pieces for first, length in segments
    )


@functools.lru_cache(maxsize=64)
def lane_sizes(segments: Segments, count: int) -> tuple[int, ...]:
    """How many numbers of the parameters lie at places k, k + count, k + 2 count, ... of a row, for every k < count."""
    return tuple(
        sum(len(range(first + (lane - first) % count, first + length, count)) for first, length in segments)
        for lane in range(count)
    )
