"""How an instruction reaches memory: state spaces, generic addresses, counting.

Generic addresses: shared and local memory appear in windows of the 64-bit address space (SHARED_WINDOW, LOCAL_WINDOW);
everything else is global. The checks are in ``memory``, the instructions in ``instructions_memory``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .faults import MachineFault
from .lanes import Batch, Lanes
from .memory import GlobalMemory
from .statistics import AccessSite
from .types import Array

SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 1 << 57


@dataclass
class Access:
    """Performs the accesses of one instruction in its state space, and counts them.

    Attributes:
        space: ``global``, ``shared``, ``local``, or ``generic`` (decided by the address when it runs).
        coherent: False for ld.global.nc, which needs memory that nothing writes during the launch.
    """

    memory: GlobalMemory
    space: str
    size: int
    site: AccessSite | None
    coherent: bool = True

    def load(self, batch: Batch, lanes: Lanes, address: Array) -> Array:
        space, address = self.resolve(address)
        self.count(lanes, space, address)
        stamps = batch.stamps[lanes.select]
        if space == "global":
            return self.memory.load(address, self.size, stamps, coherent=self.coherent)
        if space == "shared":
            return batch.shared.load(address, batch.slot[lanes.select], self.size, stamps)
        return batch.local.load(address, lanes.index, self.size, stamps)

    def store(self, batch: Batch, lanes: Lanes, address: Array, rows: Array) -> None:
        space, address = self.resolve(address)
        self.count(lanes, space, address)
        stamps = batch.stamps[lanes.select]
        if space == "global":
            self.memory.store(address, self.size, stamps, rows)
        elif space == "shared":
            batch.shared.store(address, batch.slot[lanes.select], self.size, stamps, rows)
        else:
            batch.local.store(address, lanes.index, self.size, stamps, rows)

    def resolve(self, address: Array) -> tuple[str, Array]:
        if self.space == "local":
            # mov of a local variable gives its offset, cvta.local the window address: accept both
            return self.space, np.where(address >= LOCAL_WINDOW, address - LOCAL_WINDOW, address)
        if self.space != "generic":
            return self.space, address
        window = np.where(address >= LOCAL_WINDOW, 2, np.where(address >= SHARED_WINDOW, 1, 0))
        first = int(window[0])
        if (window != first).any():
            raise MachineFault("generic access with lanes in different state spaces", int(np.argmax(window != first)))
        return ("global", "shared", "local")[first], address - (0, SHARED_WINDOW, LOCAL_WINDOW)[first]

    def count(self, lanes: Lanes, space: str, address: Array) -> None:
        if self.site is not None:
            self.site.space = space
            self.site.record(lanes, address)
