"""Exchange: messages between the workers of a process group, in a fixed order and with a name for every failure.

A message is one flat tensor of bytes: 64 bytes of header, then the vectors. Sender and receiver compute its length,
its tag and its header from what they agreed on at the start, so that a message of another length, step or bucket is
refused, and nothing in it decides how it is read. Which messages a step needs is said by
:mod:`qgm_ext.distributed.engine`; Gloo ends the process if a message is longer than its buffer, which is why the length
is part of the tag: such a message is never taken, and its sender is named when the wait is over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qgm_ext.distributed.agreement import collective_device
from qgm_ext.distributed.peer_loss import (
    PROBE_TAG,
    PeerLostError,
    broken_peer,
    first_lost,
    global_rank,
    group_name,
    reason,
)
from qgm_ext.distributed.timeline import span

__all__ = ["Exchange", "Message", "MessageError", "Stamp"]

_HEADER = 64  # bytes, so that the vectors behind it are aligned
_MAGIC = 0x716D_675F_6578_7431


class MessageError(RuntimeError):
    """A worker sent something else than the message that was due.

    Attributes:
        peer: its rank in the group.
    """

    def __init__(self, message: str, peer: int) -> None:
        super().__init__(message)
        self.peer = peer


class Stamp(NamedTuple):
    """What a message is part of; both ends must agree."""

    step: int
    part: int
    bucket: int


class Message:
    """A buffer for messages of one length.

    Args:
        size: bytes of the payload.
        device: where it is.

    Attributes:
        buffer: header and payload, uint8. payload: the payload, uint8.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.zeros(_HEADER + size, dtype=torch.uint8, device=device)
        self.payload = self.buffer[_HEADER:]
        self.size = size
        # On another device than the CPU reading a header would mean waiting for it: there messages go unchecked.
        self._header: Any = self.buffer[:_HEADER].numpy().view(np.int64) if device.type == "cpu" else None

    def vectors(self, count: int, dtype: torch.dtype) -> list[Tensor]:
        """The payload as ``count`` vectors of equal length."""
        flat = self.payload.view(dtype)
        width = flat.numel() // count
        return [flat[k * width : (k + 1) * width] for k in range(count)]

    def stamp(self, sender: int, stamp: Stamp) -> None:
        """Write the header."""
        if self._header is not None:
            self._header[:6] = (_MAGIC, sender, *stamp, self.size)

    def check(self, sender: int, stamp: Stamp) -> None:
        """Raise MessageError if the header is not that of the message that was due."""
        if self._header is None:
            return
        found = self._header[:6].tolist()
        wanted = [_MAGIC, sender, *stamp, self.size]
        if found == wanted:
            return
        if found[0] != _MAGIC:
            raise MessageError(f"rank {sender} sent garbage instead of its message of step {stamp.step}", sender)
        names = ("magic", "sender", "step", "part", "bucket", "bytes")
        wrong = [f"{name} {f} instead of {w}" for name, f, w in zip(names, found, wanted, strict=True) if f != w]
        raise MessageError(f"rank {sender} sent another message than was due: {', '.join(wrong)}", sender)


class Batch(NamedTuple):
    """Messages that are exchanged together, as often as wanted."""

    messages: list[tuple[int, Message, bool]]  # peer, buffer, whether it comes in
    operations: list[dist.P2POp]


class Pending(NamedTuple):
    """A message under way."""

    work: Any
    peer: int
    message: Message
    stamp: Stamp
    incoming: bool


class Exchange:
    """Sends and receives for one worker of a process group.

    Args:
        group: the workers; None for the default group.
        timeout: seconds after which a missing message is an error.

    Attributes:
        rank, size: of this worker and the group.
        bytes_sent, bytes_received: payload and headers so far. seconds: time spent waiting for messages so far.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._timeout = timedelta(seconds=timeout)
        self._global_ranks = [global_rank(group, r) for r in range(self.size)]
        self.backend = dist.get_backend(group)
        self.bytes_sent = 0
        self.bytes_received = 0
        self.seconds = 0.0

    @property
    def device(self) -> torch.device:
        """Where the backend wants tensors of collectives."""
        return collective_device(self.group)

    @property
    def name(self) -> str:
        """Of the group."""
        return group_name(self.group)

    def global_rank(self, peer: int) -> int:
        """What a worker is called outside of the group."""
        return self._global_ranks[peer]

    def tag(self, bucket: int, message: Message) -> int:
        """The tag of a message of a bucket; its length is part of it."""
        return (bucket * 1_000_003 + message.size) % PROBE_TAG

    def batch(
        self, sends: Sequence[tuple[int, Message]], receives: Sequence[tuple[int, Message]], bucket: int
    ) -> Batch:
        """Messages of a bucket to and from peers, to be exchanged by :meth:`start`."""
        messages = [(peer, message, True) for peer, message in receives] + [
            (peer, message, False) for peer, message in sends
        ]
        operations = []
        for peer, message, incoming in messages:
            call, tag = dist.irecv if incoming else dist.isend, self.tag(bucket, message)
            operations.append(dist.P2POp(call, message.buffer, self.global_rank(peer), group=self.group, tag=tag))
        return Batch(messages, operations)

    def start(self, batch: Batch, stamp: Stamp) -> list[Pending]:
        """Start the messages of a batch; their buffers belong to it until :meth:`wait`.

        Raises:
            PeerLostError: if a connection is broken already.
        """
        stamped: Message | None = None
        for _, message, incoming in batch.messages:
            if incoming:
                continue
            if message is not stamped:  # one message often goes to several peers
                message.stamp(self.rank, stamp)
                stamped = message
            self.bytes_sent += message.buffer.numel()
        try:
            with span("send", stamp):
                works = dist.batch_isend_irecv(batch.operations) if batch.operations else []
        except RuntimeError as error:
            peers = [peer for peer, _, _ in batch.messages]
            raise self.lost(broken_peer(self.group, peers), stamp, error) from error
        if len(works) != len(batch.messages):  # a backend that joins the batch into one
            works = [works[0]] * len(batch.messages)
        return [
            Pending(work, peer, message, stamp, incoming)
            for work, (peer, message, incoming) in zip(works, batch.messages, strict=True)
        ]

    def post(
        self, sends: Sequence[tuple[int, Message]], receives: Sequence[tuple[int, Message]], stamp: Stamp
    ) -> list[Pending]:
        """Start messages that are exchanged this once."""
        return self.start(self.batch(sends, receives, stamp.bucket), stamp)

    def wait(self, pending: Sequence[Pending]) -> None:
        """Wait for messages, and check those that have come.

        Raises:
            PeerLostError: if one does not come in time or its sender is gone.
            MessageError: if something else came.
        """
        start = time.perf_counter()
        for work, peer, message, stamp, incoming in pending:
            try:
                with span("wait for" if incoming else "finish sending to", stamp, peer):
                    if self.backend == "gloo":
                        work.wait(self._timeout)
                    else:
                        work.wait()
            except RuntimeError as error:
                raise self.lost(peer, stamp, error) from error
            if incoming:
                message.check(peer, stamp)
                self.bytes_received += message.buffer.numel()
        self.seconds += time.perf_counter() - start

    def wait_together(self, work: Any) -> None:
        """Wait for a collective; in :func:`qgm_ext.distributed.peer_loss.meeting`."""
        if self.backend == "gloo":
            work.wait(self._timeout)
        else:
            work.wait()

    def lost(self, peer: int, stamp: Stamp, error: Exception) -> PeerLostError:
        """The error that names the worker that was lost first, as far as the survivors know."""
        first = first_lost(self.group, peer)
        why = reason(error)
        if "Timed out" in why:
            limit = f"{self._timeout.total_seconds():g} s"
            what = f"sent no message of bucket {stamp.bucket} of step {stamp.step} within {limit}"
        else:
            what = f"is gone: its connection broke in step {stamp.step}"
        if first != peer:
            return PeerLostError(
                f"rank {first} of {self.size} is lost, and so rank {peer}, which waited for it, {what} ({why})",
                first,
            )
        return PeerLostError(f"rank {peer} of {self.size} {what} ({why})", peer)
