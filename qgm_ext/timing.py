"""Where the time of training goes: seconds for each phase, by the clock of the device that does the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

__all__ = ["Timer", "Timings"]


class Timings(NamedTuple):
    """Seconds spent in the parts of training; clipping counts as gradient. On CUDA by the device's clock."""

    gradient: float
    optimizer: float
    evaluation: float


class Timer:
    """Seconds per phase: of the host's clock on the CPU, of events on CUDA, where calls return before work is done."""

    _KEPT = 256  # events not read yet; beyond that the oldest are read, and waited for

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._seconds = dict.fromkeys(Timings._fields, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block."""
        if not self._cuda:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] += time.perf_counter() - start
            return
        stream = torch.cuda.current_stream(self._device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(stream)
        try:
            yield
        finally:
            end.record(stream)
            self._events.append((name, begin, end))
            if len(self._events) > self._KEPT:
                self._read(self._KEPT // 2)

    def seconds(self) -> Timings:
        """The sums."""
        self._read(len(self._events))
        return Timings(**self._seconds)

    def _read(self, count: int) -> None:
        for name, begin, end in self._events[:count]:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        del self._events[:count]
