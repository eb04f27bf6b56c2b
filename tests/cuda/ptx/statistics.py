"""What a launch cost: bytes, 32-byte sectors, bank conflicts, instructions. Counts only; it has no clock.

A *request* is one warp's execution of one access instruction. Global memory serves it in 32-byte sectors; the ideal is
the number of sectors that its distinct bytes would fill. Shared memory serves it in wavefronts: 128 bytes at a time,
each of the 32 banks giving one 4-byte word; the ideal is one wavefront for every 128 bytes requested.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .lanes import WARP, Lanes
from .types import Array

SECTOR = 32
BANKS = 32


@dataclass
class AccessSite:
    """Counts for one load or store instruction.

    Attributes:
        space: ``global``, ``shared`` or ``local``; kind: ``load`` or ``store``; size: bytes a lane.
        line, text: place in the PTX; source: ``file:line`` of the CUDA source, when compiled with -lineinfo.
        requests, lanes: executions by warps and by single threads.
        sectors, ideal_sectors: of global requests; wavefronts, ideal_wavefronts: of shared ones.
    """

    space: str
    kind: str
    size: int
    line: int
    text: str
    source: str = ""
    requests: int = 0
    lanes: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0

    @property
    def bytes(self) -> int:
        return self.lanes * self.size

    def record(self, lanes: Lanes, address: Array) -> None:
        self.requests += len(lanes.warp_starts)
        self.lanes += lanes.count
        if self.space == "global":
            self._record_sectors(lanes, address)
        elif self.space == "shared":
            self._record_wavefronts(lanes, address)

    def _record_sectors(self, lanes: Lanes, address: Array) -> None:
        sector, warp = address // SECTOR, lanes.warp
        same_warp = warp[1:] == warp[:-1]
        if ((sector[1:] < sector[:-1]) & same_warp).any():
            order = np.lexsort((address, warp))
            address, warp = address[order], warp[order]
            sector = address // SECTOR
        # within a warp addresses now ascend by sector, so that counting changes counts distinct ones
        new_sector = np.concatenate([[True], (sector[1:] != sector[:-1]) | ~same_warp])
        self.sectors += int(np.count_nonzero(new_sector)) * max(1, self.size // SECTOR)
        new_address = np.concatenate([[True], (address[1:] != address[:-1]) | ~same_warp])
        distinct = np.add.reduceat(new_address.astype(np.int64), lanes.warp_starts)
        self.ideal_sectors += int((-(-distinct * self.size // SECTOR)).sum())

    def _record_wavefronts(self, lanes: Lanes, address: Array) -> None:
        # a request of 8 or 16 bytes a lane is served in 2 or 4 phases of consecutive lanes, each at most 128 bytes
        words = max(1, self.size // 4)
        per_phase = WARP // words
        phase = lanes.warp * words + lanes.batch.lane_id[lanes.select] // per_phase
        word = (address // 4)[:, None] + np.arange(words)
        key = np.unique(np.broadcast_to(phase[:, None], word.shape).ravel() * (1 << 32) + word.ravel())
        # distinct words, then how many of them fall on one bank of one phase
        bank = (key >> 32) * BANKS + (key & 0xFFFFFFFF) % BANKS
        bank, depth = np.unique(bank, return_counts=True)
        phases = bank // BANKS
        starts = np.concatenate([[0], np.flatnonzero(phases[1:] != phases[:-1]) + 1])
        self.wavefronts += int(np.maximum.reduceat(depth, starts).sum())
        self.ideal_wavefronts += len(starts)
