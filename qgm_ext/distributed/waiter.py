"""Waiter: a thread that waits for messages, where the worker itself must not.

Gloo tells only who waits whether a message has come, and breaks all connections of a worker whose wait runs out of
time. So threads wait, without a limit, and tell.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

__all__ = ["Waiter"]

_UNLIMITED, _SOON = timedelta(days=365), timedelta(milliseconds=1)


class Waiter(threading.Thread):
    """Tells the end of every message that it was given, in that order.

    Args:
        on_end: called in this thread with the error, or None if a message has been sent or has come.
    """

    def __init__(self, on_end: Callable[[Exception | None], object]) -> None:
        super().__init__(name="qgm_ext wait", daemon=True)
        self._on_end = on_end
        self._works: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._last: Any = None
        self._added = self._ended = 0
        self.start()

    @property
    def is_waiting(self) -> bool:
        """Whether the end of a message has not been told yet."""
        return self._ended < self._added

    def add(self, work: Any) -> None:
        """Wait for a message, too."""
        self._last = work
        self._added += 1
        self._works.put(work)

    def run(self) -> None:
        while (work := self._works.get()) is not None:
            try:
                work.wait(_UNLIMITED)
            except RuntimeError as error:
                self._on_end(error)
            else:
                self._on_end(None)
            self._ended += 1

    def end(self) -> None:
        """Wait for no more messages than there are."""
        self._works.put(None)

    def break_off(self) -> None:
        """Wait no longer: Gloo breaks the connection when a wait runs out of time."""
        self.end()
        with contextlib.suppress(RuntimeError):
            self._last.wait(_SOON)
