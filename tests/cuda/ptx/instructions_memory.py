"""Loads, stores, asynchronous copies, atomics, fences and address conversions.

cp.async is performed when it is issued, but its bytes may not be touched before a wait of the
issuing thread, and by other threads not before a barrier after it: that is what a real copy in flight would require.
Floating-point atomics are unknown on purpose: their result depends on thread order, which this project rules out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import parser as syntax
from .access import LOCAL_WINDOW, SHARED_WINDOW, Access
from .decode import Form, Reader, Step, opcode
from .faults import MachineFault, OutOfBounds
from .lanes import AsyncCopy, Batch, Lanes
from .types import MEMORY_TYPES, TYPES, Array, PtxType

#: Hints that change where data is cached, never its value.
CACHE_HINTS = [
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
    "L2::evict_first",
    "L2::evict_last",
    "L2::evict_normal",
    "L2::64B",
    "L2::128B",
    "L2::256B",
]


def take_hints(form: Form) -> None:
    while form.take(*CACHE_HINTS):
        pass


def address_reader(form: Form, operand: syntax.Operand) -> Reader:
    """Closure that gives the int64 addresses of ``[base + offset]``, always an array [lanes]."""
    if not isinstance(operand, syntax.Memory):
        raise form.unknown(f"address {operand}")
    offset = np.int64(operand.offset)
    base = operand.base
    wide = not isinstance(base, syntax.Register) or form.decoder.types[form.decoder.slots[base.name]].size == 8
    read = form.read(base, TYPES["s64" if wide else "u32"])

    def address(batch: Batch, lanes: Lanes) -> Array:
        value = read(batch, lanes)
        if value.ndim == 0:
            return np.full(lanes.count, value + offset, np.int64)
        result: Array = value + offset if wide else value.astype(np.int64) + offset
        return result

    return address


def _space(form: Form) -> str:
    """Consume the state space; ``.shared::cta`` is this block's shared memory."""
    space = form.take("global", "shared", "shared::cta", "local", "param", "const")
    return {None: "generic", "shared::cta": "shared", "const": "global"}.get(space, space or "")


def _vector(form: Form, operand: syntax.Operand) -> tuple[syntax.Operand, ...]:
    count = form.take("v2", "v4", "v8")
    items = operand.items if isinstance(operand, syntax.Vector) else (operand,)
    if len(items) != int(count[1:] if count else 1):
        raise form.unknown(f"{len(items)} registers")
    return items


def _volatile(form: Form) -> None:
    """.weak is the default; .volatile only forbids the compiler to merge accesses."""
    form.take("weak", "volatile")


# ------------------------------------------------------------------------------------------------ ld, st
@opcode("ld", "ldu")
def _ld(form: Form) -> Step:
    """ld: from global (with .nc too), shared, local, const, param or generic memory, one to eight elements."""
    kind = form.type(MEMORY_TYPES)
    _volatile(form)
    space = _space(form)
    coherent = form.take("nc") is None
    take_hints(form)
    form.count(2)
    items = _vector(form, form.operands[0])
    if space == "param":
        return _ld_param(form, kind, items)
    read_address = address_reader(form, form.operands[1])
    access = form.decoder.access(space, "load", kind.size * len(items), form.instruction)
    access.coherent = coherent
    writes = [form.write(item, kind) for item in items]
    dtype = kind.bits

    if len(writes) == 1 and kind.size <= 8:
        (write,) = writes

        def load_one(batch: Batch, lanes: Lanes) -> None:
            write(batch, lanes, access.load(batch, lanes, read_address(batch, lanes)).view(kind.dtype))

        return load_one

    def load(batch: Batch, lanes: Lanes) -> None:
        rows = access.load(batch, lanes, read_address(batch, lanes))
        columns = rows.reshape(lanes.count, -1).view(dtype).T.copy()
        for k, write in enumerate(writes):
            write(batch, lanes, columns[k].view(kind.dtype))

    return load


def _ld_param(form: Form, kind: PtxType, items: tuple[syntax.Operand, ...]) -> Step:
    """Parameters: usually at an address that is known here, else (an array in a struct) at a computed one."""
    source = form.operands[1]
    writes = [form.write(item, kind) for item in items]
    size = kind.size * len(items)
    if isinstance(source, syntax.Memory) and isinstance(source.base, syntax.Symbol):
        name, offset = source.base.name, source.base.offset + source.offset
        if name not in form.decoder.parameters:
            raise form.unknown(f"parameter {name}")
        if not 0 <= offset <= form.decoder.parameters[name] - size:
            raise OutOfBounds(f"ld.param outside its parameter in: {form.instruction.text}")

        def load_known(batch: Batch, lanes: Lanes) -> None:
            values = np.frombuffer(batch.parameters[name], kind.dtype, len(writes), offset)
            for k, write in enumerate(writes):
                write(batch, lanes, values[k])

        return load_known
    read_address = address_reader(form, source)
    bounds = [(form.decoder.parameter_offsets[name], length) for name, length in form.decoder.parameters.items()]

    def load(batch: Batch, lanes: Lanes) -> None:
        address = read_address(batch, lanes)
        if (address == address[0]).all():  # the usual case: all lanes read one place
            address = address[:1]
        inside = np.zeros(len(address), bool)
        for first, length in bounds:
            inside |= (address >= first) & (address + size <= first + length)
        if not inside.all():
            k = int(np.argmin(inside))
            raise OutOfBounds(f"load of {size} bytes at {int(address[k])} of the parameters, outside all of them", k)
        space = np.frombuffer(batch.parameter_space, np.uint8)
        rows = np.ascontiguousarray(space[address[:, None] + np.arange(size)])
        columns = rows.view(kind.dtype).T.copy()
        for k, write in enumerate(writes):
            write(batch, lanes, columns[k] if len(address) > 1 else columns[k, 0])

    return load


@opcode("st")
def _st(form: Form) -> Step:
    """st: to global, shared, local or generic memory; of a wider register the low bits."""
    kind = form.type(MEMORY_TYPES)
    _volatile(form)
    space = _space(form)
    if space == "param":
        raise form.unknown("arguments of a call")
    take_hints(form)
    form.count(2)
    items = _vector(form, form.operands[1])
    read_address = address_reader(form, form.operands[0])
    access = form.decoder.access(space, "store", kind.size * len(items), form.instruction)
    bits = TYPES[f"b{8 * kind.size}"]
    reads = [form.read(item, bits) for item in items]
    size = kind.size * len(items)

    def store(batch: Batch, lanes: Lanes) -> None:
        columns = np.empty((lanes.count, len(reads)), bits.dtype)
        for k, read in enumerate(reads):
            columns[:, k] = read(batch, lanes)
        rows = columns.view(np.uint64) if size > 8 else columns.view(f"u{size}")[:, 0]
        access.store(batch, lanes, read_address(batch, lanes), rows)

    return store


@opcode("prefetch", "prefetchu")
def _prefetch(form: Form) -> Step:
    """prefetch: a hint."""
    form.take("global")
    form.need("L1", "L2", "L2::evict_last", "L2::evict_normal")
    return _nothing


@opcode("membar", "fence")
def _fence(form: Form) -> Step:
    """membar, fence: the machine's memory is always coherent; ordering between threads is the race check's matter."""
    form.take("sc", "acq_rel", "proxy")
    form.take("cta", "gl", "gpu", "sys", "async", "cluster")
    return _nothing


def _nothing(batch: Batch, lanes: Lanes) -> None:
    return None


# ------------------------------------------------------------------------------------------------ addresses
@opcode("cvta")
def _cvta(form: Form) -> Step:
    """cvta.space: address in a state space -> generic address; cvta.to.space: back."""
    kind = form.type({"u64", "u32"})
    to = form.take("to")
    space = form.need("global", "shared", "shared::cta", "local", "const")
    window = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    if kind.size != 8:
        raise form.unknown("32-bit generic address")
    if to and window:
        return form.compute(lambda a: np.where(a >= window, a - np.uint64(window), a), kind, kind)
    delta = np.uint64(0 if to else window)
    return form.compute(lambda a: a + delta, kind, kind)


# ------------------------------------------------------------------------------------------------ cp.async
@opcode("cp")
def _cp_async(form: Form) -> Step:
    """cp.async: copy 4, 8 or 16 bytes from global to shared memory; commit_group, wait_group N and wait_all."""
    form.need("async")
    action = form.take("commit_group", "wait_group", "wait_all")
    if action == "commit_group":
        form.count(0)

        def commit(batch: Batch, lanes: Lanes) -> None:
            batch.async_group[lanes.select] += 1

        return commit
    if action is not None:
        keep = 0
        if action == "wait_group":
            form.count(1)
            count = form.operands[0]
            if not isinstance(count, syntax.Literal):
                raise form.unknown("group count that is no constant")
            keep = count.value
        return lambda batch, lanes: _settle(batch, lanes, None if action == "wait_all" else keep)
    form.need("ca", "cg")
    form.need("shared", "shared::cta")
    form.need("global")
    take_hints(form)
    form.count(3, 4)
    size_operand = form.operands[2]
    if not isinstance(size_operand, syntax.Literal) or size_operand.value not in (4, 8, 16):
        raise form.unknown("copy size")
    size = size_operand.value
    to, source = address_reader(form, form.operands[0]), address_reader(form, form.operands[1])
    read = form.decoder.access("global", "load", size, form.instruction)
    site = form.decoder.site("shared", "store", size, form.instruction)
    # a fourth operand gives how many bytes to read; the rest is filled with zeros
    present = form.source(3, "u32") if len(form.operands) == 4 else None

    def copy(batch: Batch, lanes: Lanes) -> None:
        target = to(batch, lanes)
        target = np.where(target >= SHARED_WINDOW, target - SHARED_WINDOW, target)
        if present is None:
            rows = read.load(batch, lanes, source(batch, lanes))
        else:
            rows = _partial_rows(read, batch, lanes, source(batch, lanes), present(batch, lanes), size)
        if site is not None:
            site.record(lanes, target)
        stamps = batch.stamps[lanes.select]
        row = batch.shared.store(target, batch.slot[lanes.select], size, stamps, rows, pending=True)
        batch.async_copies.append(AsyncCopy(lanes.index, row, batch.async_group[lanes.select].copy(), size))

    return copy


def _partial_rows(read: Access, batch: Batch, lanes: Lanes, address: Array, present: Any, size: int) -> Array:
    """Rows of which 0 or ``size`` bytes are read."""
    count = np.broadcast_to(present, lanes.count)
    odd = (count != 0) & (count != size)
    if odd.any():
        raise MachineFault("cp.async of a part of its bytes is not supported", int(np.argmax(odd)))
    rows = np.zeros((lanes.count, size // 8) if size > 8 else lanes.count, np.uint32 if size == 4 else np.uint64)
    wanted = count == size
    if wanted.any():
        rows[wanted] = read.load(batch, lanes.subset(wanted), address[wanted])
    return rows


def _settle(batch: Batch, lanes: Lanes, keep: int | None) -> None:
    """End the copies of these lanes, except those of the ``keep`` newest groups; None: all, committed or not."""
    waiting = np.zeros(batch.lane_count, bool)
    waiting[lanes.select] = True
    remaining: list[AsyncCopy] = []
    for copy in batch.async_copies:
        limit = np.iinfo(np.int64).max if keep is None else batch.async_group[copy.lane] - keep
        done = waiting[copy.lane] & (copy.group < limit)
        if done.any() and batch.shared.shadow is not None:
            batch.shared.shadow.settle(copy.row[done], copy.size, batch.stamps[copy.lane[done]])
        if not done.all():
            remaining.append(AsyncCopy(copy.lane[~done], copy.row[~done], copy.group[~done], copy.size))
    batch.async_copies = remaining


# ------------------------------------------------------------------------------------------------ atomics
_ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}


@opcode("atom", "red")
def _atomic(form: Form) -> Step:
    """atom, red on integers: lane after lane in ascending order, which is one of the orders a GPU may take."""
    kind = form.type({"u32", "s32", "u64", "s64", "b32", "b64"})
    form.take("relaxed", "acquire", "release", "acq_rel")
    form.take("gpu", "cta", "sys")
    space = _space(form)
    returns = form.opcode == "atom"
    operation = form.need(*_ATOMICS, *(["cas"] if returns else []))
    operands = form.operands[1:] if returns else form.operands
    if len(operands) != (3 if operation == "cas" else 2):
        raise form.unknown(f"{len(form.operands)} operands")
    read_address = address_reader(form, operands[0])
    values = [form.read(operand, kind) for operand in operands[1:]]
    write = form.destination(0, kind) if returns else None
    load = form.decoder.access(space, "load", kind.size, form.instruction)
    store = form.decoder.access(space, "store", kind.size, form.instruction)

    def step(batch: Batch, lanes: Lanes) -> None:
        address = read_address(batch, lanes)
        inputs = [np.broadcast_to(v(batch, lanes), lanes.count) for v in values]
        result = np.empty(lanes.count, kind.dtype)
        for k in range(lanes.count):
            one = Lanes(batch, lanes.index[k : k + 1])
            old = _unordered(load, batch, one, address[k : k + 1]).view(kind.dtype)
            if operation == "cas":
                new = np.where(old == inputs[0][k], inputs[1][k], old)
            else:
                new = np.asarray(_ATOMICS[operation](old, inputs[0][k]))
            _unordered(store, batch, one, address[k : k + 1], new.astype(kind.dtype).view(kind.bits))
            result[k] = old[0]
        if write is not None:
            write(batch, lanes, result)

    return step


def _unordered(access: Access, batch: Batch, lanes: Lanes, address: Array, rows: Array | None = None) -> Array:
    """An access that no race check sees: atomics may meet other atomics."""
    space, address = access.resolve(address)
    access.count(lanes, space, address)
    if space == "global":
        if rows is None:
            return access.memory.load(address, access.size, None)
        access.memory.store(address, access.size, None, rows)
        return rows
    if space != "shared":
        raise MachineFault("atomic in local memory", 0)
    shadow, batch.shared.shadow = batch.shared.shadow, None
    try:
        slot = batch.slot[lanes.select]
        if rows is None:
            return batch.shared.load(address, slot, access.size, batch.stamps[lanes.select])
        batch.shared.store(address, slot, access.size, batch.stamps[lanes.select], rows)
        return rows
    finally:
        batch.shared.shadow = shadow
