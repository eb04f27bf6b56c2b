"""Takeover: whose saved state each worker takes up when they start again, and how it gets there.

torchrun starts all workers again when one has died, maybe on other machines, in another order, with an empty disk. Each
says what it sees in its folder. All take up the step of which most workers' states are left, the newest such one.
A worker that does not see its own state gets it from a rank that does; if it is left nowhere, the worker takes that of
a neighbour. States travel as JSON and bytes over the process group; nothing that comes is unpickled, and each tensor is
compared with its checksum. What is in a state is the business of :mod:`qgm_ext.distributed.checkpoint`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qgm_ext.distributed.agreement import as_bytes
from qgm_ext.distributed.peer_loss import global_rank, meeting
from qgm_ext.topology import Topology

__all__ = ["Sources", "State", "checksum", "choose", "hand_over"]

#: JSON, and the tensors that it names.
State = tuple[dict[str, Any], dict[str, Tensor]]

_LARGEST = 1 << 28  # bytes of JSON; more is garbage
_PIECE = 1 << 26  # bytes in one message
_LOOKED_AHEAD = 64  # steps of a topology that never repeats
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class Sources(NamedTuple):
    """Who takes up what.

    Args:
        step: of the state.
        owners: by rank the worker whose state it takes up.
        senders: by rank the rank that can read it, which is the rank itself if it can.
    """

    step: int
    owners: list[int]
    senders: list[int]

    @property
    def taken(self) -> dict[int, int]:
        """The workers that take the state of another, and whose."""
        return {worker: owner for worker, owner in enumerate(self.owners) if owner != worker}


def choose(
    seen: Sequence[Mapping[int, Collection[int]]], unsaved: Collection[int], topology: Topology | None
) -> Sources | None:
    """Decide who takes up what; from the same arguments the same on every rank.

    Args:
        seen: by rank: of which steps it sees the states of which workers.
        unsaved: workers that have begun but saved nothing yet: there is no whole step then, and none is lost.
        topology: whose neighbours are asked first; the one that the worker would hear next comes before others.

    Returns:
        The sources, or None if there is nothing to take up.

    Example:
        >>> choose([{5: [0], 6: [0]}, {5: [1]}], [], None)
        Sources(step=5, owners=[0, 1], senders=[0, 1])
        >>> choose([{5: [0], 6: [0]}, {}], [], None)
        Sources(step=6, owners=[0, 0], senders=[0, 0])
    """
    size = len(seen)
    readers: dict[int, dict[int, list[int]]] = {}  # step -> worker -> ranks
    for rank, steps in enumerate(seen):
        for step, workers in steps.items():
            for worker in workers:
                readers.setdefault(step, {}).setdefault(worker, []).append(rank)
    if not readers:
        return None
    step = max(readers, key=lambda step: (len(readers[step]), step))
    left = readers[step]
    if any(worker not in left for worker in unsaved):
        return None
    owners = [next(other for other in _nearest(rank, size, step, topology) if other in left) for rank in range(size)]
    senders = [rank if rank in left[owner] else left[owner][0] for rank, owner in enumerate(owners)]
    return Sources(step, owners, senders)


def _nearest(worker: int, size: int, step: int, topology: Topology | None) -> Iterator[int]:
    """The worker, its neighbours, and all others by the distance of their numbers."""
    yield worker
    if topology is not None:
        for time in range(step, step + (topology.period or _LOOKED_AHEAD)):
            yield from topology.mixing(time).row(worker)[0].tolist()
    for distance in range(1, size):
        yield (worker + distance) % size


def hand_over(
    sources: Sources, read: Callable[[int], State], group: dist.ProcessGroup | None, device: torch.device
) -> State:
    """The state that this worker takes up; a collective.

    Args:
        sources: the same on all ranks.
        read: gives the state of a worker that this rank can read.
        group: the workers.
        device: where the group's backend wants its tensors.

    Raises:
        ValueError: if it is damaged, or the rank that reads it can't, or sends something else; it is named.
        PeerLostError: if a worker is gone.
    """
    rank = dist.get_rank(group) if len(sources.owners) > 1 else 0
    mine: State | None = None
    failed: ValueError | None = None
    for receiver, (owner, sender) in enumerate(zip(sources.owners, sources.senders, strict=True)):
        if rank not in (sender, receiver):
            continue
        if rank != sender:
            mine = _receive(owner, sender, group, device)
            continue
        try:
            state = read(owner)
        except ValueError as error:  # told when all who wait for this rank have heard
            failed = error
            state = None
        if rank != receiver:
            _send(state, receiver, group, device)
        else:
            mine = state
    if failed is not None:
        raise failed
    assert mine is not None  # each rank is a receiver once
    return mine


def checksum(tensor: Tensor) -> int:
    """Of the bytes of a tensor on the CPU."""
    data: Any = as_bytes(tensor).numpy()
    return zlib.crc32(data)


def _send(state: State | None, receiver: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
    target = global_rank(group, receiver)

    def send(tensor: Tensor) -> None:
        with meeting(group):
            dist.send(tensor.to(device), target, group=group)

    content, tensors = state if state is not None else ({}, {})
    shapes = [[key, str(tensor.dtype), list(tensor.shape)] for key, tensor in tensors.items()]
    text = b"" if state is None else json.dumps([content, shapes]).encode()
    send(torch.tensor([len(text)]))
    pieces = [torch.frombuffer(bytearray(text), dtype=torch.uint8)] if text else []
    pieces += [as_bytes(tensor) for tensor in tensors.values()]
    for flat in pieces:
        for begin in range(0, len(flat), _PIECE):
            send(flat[begin : begin + _PIECE])


def _receive(owner: int, sender: int, group: dist.ProcessGroup | None, device: torch.device) -> State:
    source = global_rank(group, sender)

    def receive(tensor: Tensor) -> Tensor:
        with meeting(group):
            dist.recv(tensor, source, group=group)
        return tensor.cpu()

    def flat(size: int) -> Tensor:
        found = torch.empty(size, dtype=torch.uint8)
        for begin in range(0, size, _PIECE):
            piece = torch.empty(min(_PIECE, size - begin), dtype=torch.uint8, device=device)
            found[begin : begin + _PIECE] = receive(piece)
        return found

    length = receive(torch.empty(1, dtype=torch.int64, device=device))
    if int(length) == 0:
        raise ValueError(f"rank {sender} can't read the checkpoint of worker {owner}; its own error says why")
    wrong = f"rank {sender} sent something else than the checkpoint of worker {owner}"
    if not 0 < int(length) <= _LARGEST:
        raise ValueError(f"{wrong}: it announces {int(length)} bytes of JSON")
    tensors: dict[str, Tensor] = {}
    try:
        content, shapes = json.loads(bytes(flat(int(length)).numpy()).decode())
        for key, name, shape in shapes:
            dtype, sizes = _DTYPES[name], [int(width) for width in shape]
            if min(sizes, default=0) < 0:
                raise ValueError(f"a tensor of shape {sizes}")
            tensors[str(key)] = flat(math.prod(sizes) * dtype.itemsize).view(dtype).view(sizes)
        differing = [key for key, wanted in content["checksums"].items() if checksum(tensors[key]) != wanted]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{wrong}: {error}") from error
    if differing:
        raise ValueError(f"{wrong}: wrong checksum of {differing[0]}")
    return content, tensors
