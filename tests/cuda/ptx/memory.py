"""Device memory of the PTX machine: global allocations with exact bounds, shared and local memory, race detection.

Every access is a set of lanes that touch ``size`` bytes (1 to 32, a power of two) each at ``address``. Checked:
alignment, bounds, that shared, local and workspace bytes were written before they are read, and data races. Data moves
as *rows*: an array [lanes] of unsigned integers for sizes up to 8, [lanes, size / 8] of uint64 above. Knows nothing of
instructions.

Races are found by stamps. A stamp is (barriers its block has passed + 1, block, thread); each granule of memory (the
kernel's smallest access) remembers the stamp of its last writer and of its readers. Two stamps conflict when they are
of different blocks, or of different threads of one block that no barrier separates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .faults import MachineFault, Misaligned, OutOfBounds, Race, Uninitialised
from .types import Array

ALIGN = 32  # the widest access; backing stores begin at a multiple of it
FIRST_ADDRESS = 0x7F00_0000_0000  # far above 2^32, so that an address cut to 32 bits is out of bounds
GAP = 4096  # unmapped bytes between allocations

THREAD_BITS = 11  # 1024 threads, and the mark below
EPOCH_SHIFT = 42  # 2^31 blocks
MAX_EPOCHS = 1 << 19
BLOCK_MASK = (1 << (EPOCH_SHIFT - THREAD_BITS)) - 1
PENDING = 1 << 62  # a cp.async that has not been waited for
NOBODY = 0
SEVERAL_THREADS = (1 << THREAD_BITS) - 1  # in the thread bits of a reader: more than one thread of the block
SEVERAL_BLOCKS = -1  # a reader: threads of more than one block


def rows_of(store: Array, size: int) -> Array:
    """View a byte store as rows of ``size`` bytes."""
    if size <= 8:
        return store.view(f"u{size}")
    return store.view(np.uint64).reshape(-1, size // 8)


def _first(mask: Array) -> int:
    """Position of the first lane with a True."""
    return int(np.argmax(mask if mask.ndim == 1 else mask.any(axis=1)))


def _check_aligned(address: Array, size: int, what: str) -> None:
    if size > 1:
        bad = (address & (size - 1)) != 0
        if bad.any():
            k = _first(bad)
            raise Misaligned(f"{what} of {size} bytes at {int(address[k]):#x}, which is no multiple of {size}", k)


# ------------------------------------------------------------------------------------------------ races
class Shadow:
    """Last writer and readers of each granule of one piece of memory."""

    def __init__(self, granules: int, granule: int) -> None:
        self.granule = granule
        self.writer = np.zeros(granules, np.int64)
        self.reader = np.zeros(granules, np.int64)

    def grow(self, granules: int) -> None:
        extra = granules - len(self.writer)
        if extra > 0:
            self.writer = np.concatenate([self.writer, np.zeros(extra, np.int64)])
            self.reader = np.concatenate([self.reader, np.zeros(extra, np.int64)])

    def _views(self, size: int, stamp: Array) -> tuple[Array, Array, Array]:
        count = size // self.granule
        if count == 1:
            return self.writer, self.reader, stamp
        return self.writer.reshape(-1, count), self.reader.reshape(-1, count), stamp[:, None]

    def load(self, row: Array, size: int, stamp: Array, coherent: bool = True) -> None:
        """Note a read of rows; raise Race when another thread's write is not ordered before it.

        A load that is not coherent may return what was there before the launch, so it must not see any write.
        """
        writer, reader, stamp = self._views(size, stamp)
        if not coherent and (stale := writer[row] != NOBODY).any():
            raise Race("a non-coherent load (ld.global.nc) reads what this launch has written", _first(stale))
        _check_conflict(writer[row], stamp, "reads what", "wrote")
        old = reader[row]
        new = np.broadcast_to(stamp, old.shape)
        if not ((old == NOBODY) | (old == stamp)).all():
            new = _merge_readers(old, new)
        reader[row] = new
        kept = reader[row]
        lost = kept != new
        if lost.any():  # several lanes of this group read one granule, and only one was noted
            merged = _merge_readers(kept, new)
            index = np.broadcast_to(row if new.ndim == 1 else row[:, None], new.shape)[lost]
            column: tuple[Array, ...] = () if new.ndim == 1 else (np.nonzero(lost)[1],)
            values = merged[lost]
            reader[(index, *column)] = values
            far = values == SEVERAL_BLOCKS  # the strongest mark must win
            reader[(index[far], *(c[far] for c in column))] = SEVERAL_BLOCKS

    def store(self, row: Array, size: int, stamp: Array, pending: bool = False) -> None:
        """Note a write of rows; raise Race when another thread's access is not ordered before it."""
        writer, reader, stamp = self._views(size, stamp)
        _check_conflict(writer[row], stamp, "writes what", "wrote")
        _check_conflict(reader[row], stamp, "writes what", "read")
        if pending:
            stamp = stamp | PENDING
        writer[row] = stamp
        lost = writer[row] != stamp
        if lost.any():
            raise Race("two threads store to one address in one instruction", _first(lost))

    def settle(self, row: Array, size: int, stamp: Array) -> None:
        """A cp.async has been waited for: from now on its bytes count as written by its thread."""
        writer, _, stamp = self._views(size, stamp)
        writer[row] = stamp


def _check_conflict(old: Array, stamp: Array, does: str, did: str) -> None:
    other = (old != stamp) & (old != NOBODY)
    if not other.any():
        return
    same_block = (((old ^ stamp) >> THREAD_BITS) & BLOCK_MASK) == 0
    same_epoch = ((old ^ stamp) >> EPOCH_SHIFT) == 0
    waiting = (old > 0) & ((old & PENDING) != 0)
    conflict = other & ((old == SEVERAL_BLOCKS) | ~same_block | same_epoch | waiting)
    if not conflict.any():
        return
    k = _first(conflict)
    entry = conflict[k] if conflict.ndim == 2 else conflict[k : k + 1]
    culprit = int((old[k] if old.ndim == 2 else old[k : k + 1])[entry][0])
    if culprit > 0 and culprit & PENDING:
        raise Race(f"a thread {does} a cp.async still in flight will write", k)
    raise Race(f"a thread {does} {_name_stamp(culprit)} {did}, with no barrier between", k)


def _name_stamp(stamp: int) -> str:
    if stamp == SEVERAL_BLOCKS:
        return "threads of several blocks"
    thread = stamp & SEVERAL_THREADS
    block = (stamp >> THREAD_BITS) & BLOCK_MASK
    who = "several threads" if thread == SEVERAL_THREADS else f"thread {thread}"
    return f"{who} of block {block}"


def _merge_readers(old: Array, new: Array) -> Array:
    """Readers after ``new`` has read what ``old`` had read (element-wise)."""
    same_block = (((old ^ new) >> THREAD_BITS) & BLOCK_MASK) == 0
    same_epoch = ((old ^ new) >> EPOCH_SHIFT) == 0
    within = np.where(same_epoch & (old != new), new | SEVERAL_THREADS, new)
    return np.where(old == NOBODY, new, np.where((old != SEVERAL_BLOCKS) & same_block, within, SEVERAL_BLOCKS))


# ------------------------------------------------------------------------------------------------ global memory
class Allocation:
    """A named range of global memory.

    Attributes:
        base, size: first address and bytes; nothing outside them may be touched.
        store: the bytes, beginning at ``origin`` (base rounded down to 32) and padded to a multiple of 32.
        valid: which bytes hold data, or None when all do.
    """

    def __init__(self, name: str, base: int, size: int, store: Array, valid: Array | None = None) -> None:
        self.name, self.base, self.size = name, base, size
        self.end = base + size
        self.origin = base // ALIGN * ALIGN
        self.store = store
        self.valid = valid
        self.shadow: Shadow | None = None
        self.loaded_bytes = 0
        self.stored_bytes = 0

    def bytes(self) -> Array:
        """The content, uint8[size], as a view."""
        first = self.base - self.origin
        return self.store[first : first + self.size]

    def read(self, dtype: Any) -> Array:
        """A copy of the content as an array of ``dtype``."""
        return np.frombuffer(self.bytes().tobytes(), dtype)

    def rows(self, address: Array, size: int) -> Array:
        """Row numbers in ``store`` of aligned, in-bounds addresses."""
        row: Array = (address - self.origin) >> (size.bit_length() - 1)
        return row


class SparseAllocation(Allocation):
    """An allocation too large to back with memory: pages appear when they are first touched.

    Args:
        fill: maps byte offsets of whole pages (int64[pages]) to their first content, uint8[pages, PAGE]; zero bytes
            when None.
    """

    PAGE = 4096

    def __init__(self, name: str, base: int, size: int, fill: Callable[[Array], Array] | None = None) -> None:
        if base % self.PAGE:
            raise ValueError(f"base of a sparse allocation must be a multiple of {self.PAGE}, got {base:#x}")
        super().__init__(name, base, size, np.zeros(0, np.uint8))
        self.fill = fill
        self.pages = np.zeros(0, np.int64)  # touched pages, ascending
        self.places = np.zeros(0, np.int64)  # where in the store each of them lies

    def bytes(self) -> Array:
        raise ValueError(f"allocation '{self.name}' is sparse: read it with read_at")

    def read_at(self, offset: int, count: int, dtype: Any) -> Array:
        """``count`` elements of ``dtype`` from byte ``offset`` on, which must be a multiple of their size."""
        size = np.dtype(dtype).itemsize
        address = self.base + offset + np.arange(count, dtype=np.int64) * size
        row = self.rows(address, size)  # may grow the store, so it comes first
        content: Array = rows_of(self.store, size)[row].view(dtype)
        return content

    def rows(self, address: Array, size: int) -> Array:
        offset = address - self.base
        page = offset // self.PAGE
        wanted = np.unique(page)
        missing = wanted[~np.isin(wanted, self.pages)]
        if len(missing):
            self._add_pages(missing)
        place = self.places[np.searchsorted(self.pages, page)]
        row: Array = (place * self.PAGE + offset % self.PAGE) >> (size.bit_length() - 1)
        return row

    def _add_pages(self, missing: Array) -> None:
        first = len(self.pages)
        content = np.zeros((len(missing), self.PAGE), np.uint8) if self.fill is None else self.fill(missing * self.PAGE)
        self.store = np.concatenate([self.store, content.reshape(-1)])
        pages = np.concatenate([self.pages, missing])
        places = np.concatenate([self.places, first + np.arange(len(missing))])
        order = np.argsort(pages)
        self.pages, self.places = pages[order], places[order]
        if self.shadow is not None:
            self.shadow.grow(len(self.store) // self.shadow.granule)


class GlobalMemory:
    """All allocations that kernels may touch. Addresses between them are unmapped."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []  # ascending by base
        self._bases = np.zeros(0, np.int64)
        self._next = FIRST_ADDRESS
        self._granule: int | None = None  # None: races are not looked for

    def add(self, name: str, array: Array, address: int | None = None, *, written: bool = True) -> Allocation:
        """Place a copy of ``array`` in device memory.

        Args:
            name: used in fault messages.
            array: initial content.
            address: virtual address, or None for the next free one (a multiple of 256 above 2^32).
            written: False for a workspace or output whose bytes must not be read before a kernel wrote them.
        """
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        base = self._place(len(data)) if address is None else address
        lead = base % ALIGN
        store = np.zeros((lead + len(data) + ALIGN - 1) // ALIGN * ALIGN, np.uint8)
        store[lead : lead + len(data)] = data
        valid = None if written else np.zeros(len(store), np.bool_)
        return self._insert(Allocation(name, base, len(data), store, valid))

    def attach(self, name: str, array: Array, *, written: bool = True) -> Allocation:
        """Map a C-contiguous host array at its own address, in place: kernels read and write the array itself."""
        if not array.flags.c_contiguous:
            raise ValueError(f"array '{name}' must be C-contiguous to be mapped as device memory")
        return self.attach_raw(name, array.ctypes.data, array.nbytes, written=written)

    def attach_raw(self, name: str, base: int, size: int, *, written: bool = True) -> Allocation:
        """Map ``size`` bytes of host memory at their own address; the caller keeps them alive.

        ``written`` is False for a workspace, as in ``add``.
        """
        origin = base // ALIGN * ALIGN
        padded = (base - origin + size + ALIGN - 1) // ALIGN * ALIGN
        # the view begins and ends up to 31 bytes outside; the bounds check keeps every access inside
        store = np.ctypeslib.as_array((ctypes.c_uint8 * padded).from_address(origin))
        valid = None if written else np.zeros(len(store), np.bool_)
        return self._insert(Allocation(name, base, size, store, valid))

    def add_sparse(
        self, name: str, size: int, address: int | None = None, fill: Callable[[Array], Array] | None = None
    ) -> SparseAllocation:
        """Reserve ``size`` bytes, any number of them, backed page by page as they are touched (SparseAllocation)."""
        base = self._place(size) if address is None else address
        allocation = SparseAllocation(name, base, size, fill)
        self._insert(allocation)
        return allocation

    def clear(self) -> None:
        """Unmap everything."""
        self.allocations.clear()
        self._bases = np.zeros(0, np.int64)

    def remove(self, allocation: Allocation) -> None:
        self.allocations.remove(allocation)
        self._bases = np.array([a.base for a in self.allocations], np.int64)

    def begin_launch(self, granule: int, races: bool) -> None:
        """Forget who touched what, and count accesses afresh.

        Args:
            granule: smallest global access of the kernel in bytes.
        """
        self._granule = granule if races else None
        for allocation in self.allocations:
            allocation.shadow = None
            allocation.loaded_bytes = allocation.stored_bytes = 0

    def load(self, address: Array, size: int, stamp: Array | None, *, coherent: bool = True) -> Array:
        """Rows at ``address`` (int64[lanes]); ``stamp`` None leaves races unchecked (atomics)."""
        _check_aligned(address, size, "global load")
        result: Array | None = None
        for allocation, chosen in self._resolve(address, size, "load"):
            at = address if chosen is None else address[chosen]
            row = allocation.rows(at, size)
            with InAllocation(allocation, at, chosen):
                if allocation.valid is not None and not (valid := rows_of_flags(allocation.valid, size)[row]).all():
                    raise Uninitialised("global load of bytes that nothing has written", _first(~valid))
                if self._granule is not None and stamp is not None:
                    self._shadow(allocation).load(row, size, stamp if chosen is None else stamp[chosen], coherent)
            allocation.loaded_bytes += size * len(at)
            values = rows_of(allocation.store, size)[row]
            if chosen is None:
                return values
            if result is None:
                result = np.zeros((len(address), *values.shape[1:]), values.dtype)
            result[chosen] = values
        assert result is not None
        return result

    def store(self, address: Array, size: int, stamp: Array | None, rows: Array) -> None:
        """Write rows at ``address`` (int64[lanes])."""
        _check_aligned(address, size, "global store")
        for allocation, chosen in self._resolve(address, size, "store"):
            at = address if chosen is None else address[chosen]
            row = allocation.rows(at, size)
            if self._granule is not None and stamp is not None:
                with InAllocation(allocation, at, chosen):
                    self._shadow(allocation).store(row, size, stamp if chosen is None else stamp[chosen])
            allocation.stored_bytes += size * len(at)
            if allocation.valid is not None:
                rows_of_flags(allocation.valid, size)[row] = True
            rows_of(allocation.store, size)[row] = rows if chosen is None else rows[chosen]

    def _shadow(self, allocation: Allocation) -> Shadow:
        if allocation.shadow is None:
            assert self._granule is not None
            allocation.shadow = Shadow(len(allocation.store) // self._granule, self._granule)
        return allocation.shadow

    def _resolve(self, address: Array, size: int, what: str) -> Iterator[tuple[Allocation, Array | None]]:
        """The allocations that the addresses lie in, each with its lanes (None: all)."""
        low, high = int(address.min()), int(address.max()) + size
        k = int(np.searchsorted(self._bases, low, "right")) - 1
        if k >= 0 and high <= self.allocations[k].end:
            yield self.allocations[k], None
            return
        place = np.searchsorted(self._bases, address, "right") - 1
        ends = np.array([a.end for a in self.allocations] or [0], np.int64)
        bad = (place < 0) | (address + size > ends[place])
        if bad.any():
            k = _first(bad)
            raise OutOfBounds(
                f"global {what} of {size} bytes at {int(address[k]):#x}, {self._describe(int(address[k]))}", k
            )
        for k in np.unique(place):
            yield self.allocations[int(k)], np.flatnonzero(place == k)

    def _describe(self, address: int) -> str:
        """Where an unmapped address lies, relative to the nearest allocation."""
        if not self.allocations:
            return "and nothing is allocated"
        nearest = min(self.allocations, key=lambda a: max(a.base - address, address - a.end + 1, 0))
        relative = address - nearest.base
        return f"offset {relative} of '{nearest.name}', which has {nearest.size} bytes"

    def _place(self, size: int) -> int:
        base = self._next
        self._next = (base + size + GAP + 4095) // 4096 * 4096
        return base

    def _insert(self, allocation: Allocation) -> Allocation:
        for other in self.allocations:
            if allocation.base < other.end and other.base < allocation.end:
                raise ValueError(f"allocation '{allocation.name}' overlaps '{other.name}'")
        self.allocations.append(allocation)
        self.allocations.sort(key=lambda a: a.base)
        self._bases = np.array([a.base for a in self.allocations], np.int64)
        return allocation


def rows_of_flags(flags: Array, size: int) -> Array:
    """View one flag a byte as rows of ``size`` flags."""
    return flags if size == 1 else flags.reshape(-1, size)


class InAllocation:
    """Adds the allocation's name and offset to a fault found inside, and maps its position back to the whole group."""

    def __init__(self, allocation: Allocation, address: Array, chosen: Array | None) -> None:
        self.allocation, self.address, self.chosen = allocation, address, chosen

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        if isinstance(fault, MachineFault) and fault.position is not None:
            offset = int(self.address[fault.position]) - self.allocation.base
            kind_of_fault = "race in global memory, " if isinstance(fault, Race) else ""
            fault.message = f"{kind_of_fault}'{self.allocation.name}' + {offset} bytes: {fault.message}"
            if self.chosen is not None:
                fault.position = int(self.chosen[fault.position])


# ------------------------------------------------------------------------------------------------ shared, local memory
class PieceMemory:
    """Equal private pieces of memory: shared memory (a piece for each block) or local memory (for each thread).

    Args:
        name: ``shared`` or ``local``, for messages.
        pieces, size: how many, and bytes of each.
        granule: bytes for which initialisation and races are tracked; no access may be smaller.
        races: track races.
    """

    def __init__(self, name: str, pieces: int, size: int, granule: int, *, races: bool) -> None:
        self.name, self.size, self.granule = name, size, granule
        self.pitch = (size + ALIGN - 1) // ALIGN * ALIGN
        total = pieces * self.pitch
        self.data = np.full(total, 0xFF, np.uint8)  # a NaN, should a check ever be missed
        self.valid = np.zeros(total // granule, np.bool_)
        self.shadow = Shadow(total // granule, granule) if races else None

    def _row(self, address: Array, piece: Array, size: int, what: str) -> Array:
        what = f"{self.name} {what}"
        _check_aligned(address, size, what)
        bad = (address < 0) | (address + size > self.size)
        if bad.any():
            k = _first(bad)
            raise OutOfBounds(f"{what} of {size} bytes at offset {int(address[k])} of {self.size} bytes", k)
        return (piece * self.pitch + address) >> (size.bit_length() - 1)

    def load(self, address: Array, piece: Array, size: int, stamp: Array) -> Array:
        """Rows at offset ``address`` (int64[lanes]) of the lane's ``piece`` (int64[lanes])."""
        row = self._row(address, piece, size, "load")
        valid = rows_of_flags(self.valid, size // self.granule)[row]
        if not valid.all():
            k = _first(~valid)
            raise Uninitialised(f"{self.name} load at offset {int(address[k])}, which nothing has written", k)
        if self.shadow is not None:
            self._race(address, self.shadow.load, row, size, stamp)
        return rows_of(self.data, size)[row]

    def store(
        self, address: Array, piece: Array, size: int, stamp: Array, rows: Array, *, pending: bool = False
    ) -> Array:
        """Write rows; ``pending`` marks a cp.async, which ``settle`` ends. Returns the row numbers."""
        row = self._row(address, piece, size, "store")
        if self.shadow is not None:
            self._race(address, self.shadow.store, row, size, stamp, pending)
        rows_of_flags(self.valid, size // self.granule)[row] = True
        rows_of(self.data, size)[row] = rows
        return row

    def _race(self, address: Array, check: Callable[..., None], *arguments: Any) -> None:
        try:
            check(*arguments)
        except Race as fault:
            offset = int(address[fault.position or 0])
            fault.message = f"race in {self.name} memory at offset {offset}: {fault.message}"
            raise
