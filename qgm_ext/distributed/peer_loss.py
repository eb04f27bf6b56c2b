"""Who is lost: what a worker finds out when another does not answer any more.

A broken connection, or a wait in vain, tells of the peer that it was with; but that one may only have been waiting for
another, or have ended because another was gone. So each worker that waits in vain tells, through the store at which the
workers met, for whom it waits. Following that from one to the next ends at one that tells nothing: it is lost.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["PROBE_TAG", "PeerLostError", "broken_peer", "first_lost", "global_rank", "group_name", "meeting", "reason"]

PROBE_TAG = 1 << 30  # that no message has
_KEY = "qgm_ext/waits_in_vain"
_GRACE = timedelta(seconds=2)  # for a worker to tell that it, too, waits in vain


class PeerLostError(RuntimeError):
    """A worker does not answer any more.

    Attributes:
        peer: its rank in the group.
    """

    def __init__(self, message: str, peer: int) -> None:
        super().__init__(message)
        self.peer = peer


@contextlib.contextmanager
def meeting(group: dist.ProcessGroup | None) -> Iterator[None]:
    """A context for collectives of all workers of a group, whose errors say little more than that there was one.

    In the context there may be another one.

    Raises:
        PeerLostError: instead of the error that a collective raises when it lacks a worker.
    """
    try:
        yield
    except PeerLostError:
        raise
    except RuntimeError as error:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if size == 1:
            raise
        first = first_lost(group, broken_peer(group, [(rank + k) % size for k in range(1, size)]))
        raise PeerLostError(
            f"rank {first} of {size} is lost, where all workers meet ({reason(error)})", first
        ) from error


def reason(error: Exception) -> str:
    """What Gloo says of a broken connection, without where it says so in its source, and its good wishes.

    Example:
        >>> reason(RuntimeError("[/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:7. This is typically"))
        'Connection closed by peer [127.0.0.1]:7'
    """
    text = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(error).strip()) or type(error).__name__
    return text.splitlines()[0].split(". ")[0]


def broken_peer(group: dist.ProcessGroup | None, peers: Sequence[int]) -> int:
    """To whom the connection is broken: the first of some peers with whom no message can be started.

    If it is to none, the first of them: for whom this worker says that it waits, so that who says nothing is found.
    """
    for peer in peers:
        try:
            probe = torch.empty(1, dtype=torch.uint8)
            dist.irecv(probe, global_rank(group, peer), group=group, tag=PROBE_TAG)
        except RuntimeError:
            return peer
    return peers[0]


def global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    """The rank that torch wants to be told, of a worker of a group."""
    return rank if group is None else dist.get_global_rank(group, rank)


def group_name(group: dist.ProcessGroup | None) -> str:
    """What a group is called in the store."""
    return "default" if group is None else str(group.group_name)


def first_lost(group: dist.ProcessGroup | None, peer: int) -> int:
    """The worker that was lost first, as far as those that wait in vain know; this one waits for ``peer``."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    prefix = f"{_KEY}/{group_name(group)}"

    def key(worker: int) -> str:
        return f"{prefix}/{worker}"

    seen = {rank}
    try:
        store = distributed_c10d._get_default_store()
        store.set(key(rank), str(peer))
        while peer not in seen:
            seen.add(peer)
            try:
                store.wait([key(peer)], _GRACE)
            except RuntimeError:  # in vain, too
                return peer
            following = int(store.get(key(peer)).decode())
            if not 0 <= following < size:
                return peer
            peer = following
    except (RuntimeError, ValueError):  # the store may have died with its host; then what was seen must do
        pass
    return peer
