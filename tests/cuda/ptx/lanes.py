"""Groups of threads that execute together, and the state of the blocks that run at once.

A *lane* is one CUDA thread; a Batch holds all lanes of some blocks, block after block, so lane numbers ascend with
block, then thread. Lanes is a subset of them at one program counter. Holds no instruction and no memory rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .faults import LaunchError, MachineFault, Uninitialised
from .memory import EPOCH_SHIFT, MAX_EPOCHS, THREAD_BITS, PieceMemory
from .types import Array

WARP = 32


class Lanes:
    """Some lanes of a batch, in ascending order.

    Attributes:
        select: what indexes a per-lane array: a slice when the lanes are consecutive (cheap), else the index array.
        count: number of lanes.
        full: every lane of the batch.
    """

    __slots__ = ("_index", "_warp", "_warp_starts", "batch", "count", "full", "select")

    def __init__(self, batch: Batch, index: Array | slice) -> None:
        self.batch = batch
        self._warp: Array | None = None
        self._warp_starts: Array | None = None
        if not isinstance(index, slice):
            first, last = int(index[0]), int(index[-1])
            if last - first + 1 == len(index):
                index = slice(first, last + 1)
        self.select: Array | slice = index
        if isinstance(index, slice):
            self._index: Array | None = None
            self.count: int = index.stop - index.start
        else:
            self._index = index
            self.count = len(index)
        self.full = self.count == batch.lane_count

    @property
    def index(self) -> Array:
        """Lane numbers, int64[count]."""
        if self._index is None:
            assert isinstance(self.select, slice)
            self._index = np.arange(self.select.start, self.select.stop)
        return self._index

    @property
    def warp(self) -> Array:
        """Warp number within the batch of each lane, ascending, int64[count]."""
        if self._warp is None:
            self._warp = self.batch.warp[self.select]
        return self._warp

    @property
    def warp_starts(self) -> Array:
        """Positions at which a new warp begins, int64[number of warps]."""
        if self._warp_starts is None:
            warp = self.warp
            self._warp_starts = np.concatenate([[0], np.flatnonzero(warp[1:] != warp[:-1]) + 1])
        return self._warp_starts

    def subset(self, mask: Array) -> Lanes:
        """The lanes where ``mask`` (bool[count], not all False) holds."""
        return Lanes(self.batch, self.index[mask])

    def union(self, other: Lanes) -> Lanes:
        return Lanes(self.batch, np.sort(np.concatenate([self.index, other.index])))


@dataclass
class AsyncCopy:
    """A cp.async in flight: the lanes that issued it, its rows in shared memory, and each lane's group number."""

    lane: Array
    row: Array
    group: Array
    size: int


class Batch:
    """Registers, shared memory and identity of all threads of the blocks that run at once.

    Args:
        grid, block: launch dimensions (x, y, z).
        blocks: linear numbers of the blocks to run, int64.
        register_bits: numpy type of each register slot.
        shared_bytes: static plus dynamic shared memory of a block; dynamic_bytes: the dynamic part of it.
        shared_granule: smallest shared access of the kernel in bytes.
        local_bytes: local memory of a thread.
        parameters: bytes of every kernel parameter, by name; parameter_space: all of them at their offsets.
        races: look for data races in shared memory.
    """

    def __init__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        blocks: Array,
        register_bits: list[np.dtype[np.generic]],
        register_names: list[str],
        shared_bytes: int,
        dynamic_bytes: int,
        shared_granule: int,
        local_bytes: int,
        parameters: dict[str, bytes],
        parameter_space: bytes,
        races: bool,
    ) -> None:
        self.grid, self.block = grid, block
        self.shared_bytes, self.dynamic_bytes = shared_bytes, dynamic_bytes
        self.parameters = parameters
        self.parameter_space = parameter_space
        self.blocks = blocks
        self.threads = block[0] * block[1] * block[2]
        self.lane_count = len(blocks) * self.threads
        lane = np.arange(self.lane_count)
        self.thread = lane % self.threads
        self.slot = lane // self.threads  # which of the batch's blocks
        self.block_of_lane = blocks[self.slot]
        self.warps_per_block = -(-self.threads // WARP)
        self.warp_count = self.warps_per_block * len(blocks)
        self.warp = self.slot * self.warps_per_block + self.thread // WARP
        self.lane_id = self.thread % WARP
        self.stamps = (1 << EPOCH_SHIFT) | (self.block_of_lane << THREAD_BITS) | self.thread
        self.register_bits = register_bits
        self.register_names = register_names
        self.barriers = 0
        self.registers: list[Array | None] = [None] * len(register_bits)
        # per register: True once every lane has written it, else which lanes have
        self.defined: list[Array | bool] = [False] * len(register_bits)
        # per register: the group last found to have written it, which saves looking again
        self.known: list[Lanes | None] = [None] * len(register_bits)
        self.shared = PieceMemory("shared", len(blocks), shared_bytes, shared_granule, races=races)
        self.local = PieceMemory("local", self.lane_count, local_bytes, 1, races=False)
        self.async_copies: list[AsyncCopy] = []  # cp.async not waited for
        self.async_group = np.zeros(self.lane_count, np.int64)
        self._special: dict[str, Array] = {}

    def check_defined(self, slot: int, lanes: Lanes) -> None:
        """Raise Uninitialised unless every lane of the group has written the register."""
        defined = self.defined[slot]
        if defined is True:
            return
        good = np.zeros(lanes.count, bool) if defined is False else defined[lanes.select]
        if not good.all():
            name = self.register_names[slot].split("#")[0]
            raise Uninitialised(f"read of register {name}, which nothing has written", int(np.argmin(good)))
        self.known[slot] = lanes

    def define(self, slot: int, lanes: Lanes) -> None:
        """Note that the group has written the register."""
        defined = self.defined[slot]
        if defined is False:
            defined = self.defined[slot] = np.zeros(self.lane_count, bool)
        if defined is not True:
            defined[lanes.select] = True
            if defined.all():
                self.defined[slot] = True
        self.known[slot] = lanes

    def pass_barrier(self, slots: Array) -> None:
        """Order everything before a barrier against everything after it, for the blocks in ``slots``."""
        member = np.zeros(len(self.blocks), bool)
        member[slots] = True
        self.stamps[member[self.slot]] += 1 << EPOCH_SHIFT
        self.barriers += 1
        if self.barriers >= MAX_EPOCHS:
            raise MachineFault(f"more than {MAX_EPOCHS} barriers in one launch")

    def special(self, name: str) -> Array:
        """A special register such as ``%tid.x``, uint32[lane_count]."""
        if name not in self._special:
            self._special[name] = np.ascontiguousarray(
                np.broadcast_to(self._compute_special(name), self.lane_count)
            ).astype(np.uint32)
        return self._special[name]

    def _compute_special(self, name: str) -> Array | int:
        word, _, axis = name[1:].partition(".")
        if axis:
            size = self.block if word in ("tid", "ntid") else self.grid
            k = "xyz".index(axis)
            if word in ("ntid", "nctaid"):
                return size[k]
            linear = self.thread if word == "tid" else self.block_of_lane
            return linear // int(np.prod(size[:k])) % size[k]
        if word == "laneid":
            return self.lane_id
        if word == "warpid":
            return self.thread // WARP
        if word == "nwarpid":
            return self.warps_per_block
        if word == "dynamic_smem_size":
            return self.dynamic_bytes
        if word == "total_smem_size":
            return self.shared_bytes
        bit = np.left_shift(1, self.lane_id)
        masks = {"eq": bit, "lt": bit - 1, "le": 2 * bit - 1, "ge": (1 << WARP) - bit, "gt": (1 << WARP) - 2 * bit}
        if word.startswith("lanemask_"):
            return masks[word.removeprefix("lanemask_")]
        raise LaunchError(f"special register {name} is not known")

    def place_of(self, lane: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(block x, y, z), (thread x, y, z) of a lane."""

        def split(linear: int, size: tuple[int, int, int]) -> tuple[int, int, int]:
            return linear % size[0], linear // size[0] % size[1], linear // (size[0] * size[1])

        return split(int(self.block_of_lane[lane]), self.grid), split(int(self.thread[lane]), self.block)
