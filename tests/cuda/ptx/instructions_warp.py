"""Warp instructions: shuffle, vote, reduction, warp barrier. All need every lane that their mask names.

Lanes execute together when they are at the same instruction; lanes still elsewhere, or gone, count as absent, since on
a GPU such a warp operation hangs or returns garbage. Block barriers are in ``machine``: they need the scheduler.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import parser as syntax
from .decode import Form, Step, opcode
from .faults import BadShuffle
from .lanes import WARP, Batch, Lanes
from .types import TYPES, Array

PRED = TYPES["pred"]


def present_bits(lanes: Lanes) -> Array:
    """For every warp of the batch, which of its lanes execute now: uint32[warps]."""
    table = np.zeros((lanes.batch.warp_count, WARP), np.uint8)
    table[lanes.warp, lanes.batch.lane_id[lanes.select]] = 1
    return np.packbits(table, axis=1, bitorder="little").view(np.uint32)[:, 0]


def check_members(lanes: Lanes, mask: Any) -> Array:
    """Raise BadShuffle unless each lane is in its own mask and all lanes of the mask execute; returns present_bits."""
    mask = np.broadcast_to(mask, lanes.count)
    present = present_bits(lanes)
    own = np.left_shift(np.uint32(1), lanes.batch.lane_id[lanes.select].astype(np.uint32))
    outside = (mask & own) == 0
    if outside.any():
        k = int(np.argmax(outside))
        raise BadShuffle(f"warp operation with mask {int(mask[k]):#010x} executed by a lane outside the mask", k)
    absent = mask & ~present[lanes.warp]
    if absent.any():
        k = int(np.argmax(absent != 0))
        raise BadShuffle(
            f"warp operation with mask {int(mask[k]):#010x}: lanes {int(absent[k]):#010x} of it do not execute it", k
        )
    return present


@opcode("shfl")
def _shfl(form: Form) -> Step:
    """shfl.sync.mode d|p, a, b, c, mask: read another lane's a; own a, and p false, where that is out of range."""
    form.need("sync")
    form.type({"b32"})
    mode = form.need("up", "down", "bfly", "idx")
    form.count(5)
    target = form.operands[0]
    pair = target if isinstance(target, syntax.Pair) else None
    write = form.write(pair.first if pair else target, "b32")
    write_valid = form.write(pair.second, PRED) if pair else None
    value, offset, clamp, members = (form.source(k, "u32") for k in (1, 2, 3, 4))

    def step(batch: Batch, lanes: Lanes) -> None:
        mask = np.broadcast_to(members(batch, lanes), lanes.count)
        check_members(lanes, mask)
        lane = batch.lane_id[lanes.select]
        b = np.broadcast_to(offset(batch, lanes), lanes.count).astype(np.int64) & 31
        c = np.broadcast_to(clamp(batch, lanes), lanes.count).astype(np.int64)
        segment, bound = (c >> 8) & 31, c & 31
        last = (lane & segment) | (bound & ~segment)
        if mode == "up":
            source = lane - b
            valid = source >= last
        else:
            source = {"down": lane + b, "bfly": lane ^ b, "idx": (lane & segment) | (b & ~segment)}[mode]
            valid = source <= last
        source = np.where(valid, source, lane)
        read_outside = ((mask >> source.astype(np.uint32)) & np.uint32(1)) == 0
        if read_outside.any():
            k = int(np.argmax(read_outside))
            raise BadShuffle(f"shuffle reads lane {int(source[k])}, which is not in mask {int(mask[k]):#010x}", k)
        table = np.zeros((batch.warp_count, WARP), np.uint32)
        table[lanes.warp, lane] = value(batch, lanes)
        write(batch, lanes, table[lanes.warp, source])
        if write_valid is not None:
            write_valid(batch, lanes, valid)

    return step


@opcode("vote")
def _vote(form: Form) -> Step:
    """vote.sync.all|any|uni|ballot over the lanes of the mask."""
    form.need("sync")
    mode = form.need("all", "any", "uni", "ballot")
    kind = form.type({"b32"} if mode == "ballot" else {"pred"})
    form.count(3)
    write, predicate, members = form.destination(0, kind), form.source(1, PRED), form.source(2, "u32")

    def step(batch: Batch, lanes: Lanes) -> None:
        mask = np.broadcast_to(members(batch, lanes), lanes.count)
        check_members(lanes, mask)
        table = np.zeros((batch.warp_count, WARP), np.uint8)
        table[lanes.warp, batch.lane_id[lanes.select]] = predicate(batch, lanes)
        ballot = np.packbits(table, axis=1, bitorder="little").view(np.uint32)[:, 0][lanes.warp] & mask
        result = {
            "ballot": ballot,
            "any": ballot != 0,
            "all": ballot == mask,
            "uni": (ballot == 0) | (ballot == mask),
        }[mode]
        write(batch, lanes, result)

    return step


@opcode("bar")
def _bar_warp(form: Form) -> Step:
    """bar.warp.sync: the lanes of the mask meet. It orders no memory here, so races it would end are still reported."""
    form.need("warp")
    form.need("sync")
    form.count(1)
    members = form.source(0, "u32")

    def step(batch: Batch, lanes: Lanes) -> None:
        check_members(lanes, members(batch, lanes))

    return step


@opcode("activemask")
def _activemask(form: Form) -> Step:
    """activemask: the lanes of the warp that execute this together."""
    form.type({"b32"})
    form.count(1)
    write = form.destination(0, "b32")
    return lambda batch, lanes: write(batch, lanes, present_bits(lanes)[lanes.warp])


_REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux")
def _redux(form: Form) -> Step:
    """redux.sync: integer reduction over the lanes of the mask, which must be the executing lanes of the warp."""
    form.need("sync")
    kind = form.type({"u32", "s32", "b32"})
    function = _REDUCTIONS[form.need(*_REDUCTIONS)]
    form.count(3)
    write, value, members = form.destination(0, kind), form.source(1, kind), form.source(2, "u32")

    def step(batch: Batch, lanes: Lanes) -> None:
        mask = np.broadcast_to(members(batch, lanes), lanes.count)
        present = check_members(lanes, mask)
        partial = mask != present[lanes.warp]
        if partial.any():
            raise BadShuffle(
                "redux.sync by several masks of one warp at once is not supported", int(np.argmax(partial))
            )
        values = np.ascontiguousarray(np.broadcast_to(value(batch, lanes), lanes.count))
        totals = function.reduceat(values, lanes.warp_starts, dtype=kind.dtype)
        lengths = np.diff(np.append(lanes.warp_starts, lanes.count))
        write(batch, lanes, np.repeat(totals, lengths))

    return step
