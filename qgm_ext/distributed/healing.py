"""Healing: passes that go on without lost workers (``on_peer_loss="heal"``).

A lost worker is taken out of the mixing matrix, and its neighbours give its weight to themselves
(:meth:`qgm_ext.mixing.Mixing.without`). No worker goes back a step or takes half of one: the rows of all others are
what they were, and a neighbour merges only when it has all messages or has agreed with the others
(:mod:`qgm_ext.distributed.roll`) that the missing one does not count. The connections among the survivors stay as
they are, for Gloo breaks those to the lost worker only.

But Gloo breaks all connections of a worker whose wait for a message runs out of time. So here threads wait
(:mod:`qgm_ext.distributed.waiter`), and the step waits for the threads. A worker that is alive but silent for
``timeout`` seconds is no loss to heal: that ends the step with PeerLostError, as does everything where workers can't
agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from qgm_ext import ops
from qgm_ext.algorithms import Pass, RelayPass
from qgm_ext.distributed.engine import Place, Vectors, WorkerEngine
from qgm_ext.distributed.exchange import Exchange, Message, MessageError, PeerLostError, Stamp
from qgm_ext.distributed.gossip import blocks_of
from qgm_ext.distributed.roll import Excluded, GaveUp, Loss, Roll
from qgm_ext.distributed.timeline import span
from qgm_ext.distributed.waiter import Waiter
from qgm_ext.topology import Topology

__all__ = ["HealingEngine"]

_STEP = 1 << 32  # what a step counts in turns, which number the passes of all its vectors
_VECTORS = 1 << 12
_MEETING = 1 << 30  # tag above those of messages
_PATIENCE = 0.01  # seconds between two looks at the store
_BUFFERS = 3  # of each sender: the two last messages, which others may need, and the one that comes


Found = TypeVar("Found")


class _End(NamedTuple):
    """A message has been sent or has come, or never will be."""

    incoming: bool
    peer: int
    error: Exception | None


class HealingEngine(WorkerEngine):
    """The steps of one worker among others that may be lost.

    Args:
        topology, worker, bucket_bytes: as :class:`WorkerEngine`.
        exchange: of the worker, over Gloo; its counters are kept up here as well.
        timeout: seconds after which a silent worker is an error.
    """

    def __init__(self, topology: Topology, worker: int, exchange: Exchange, bucket_bytes: int, timeout: float) -> None:
        super().__init__(topology, worker, exchange, bucket_bytes)
        self._peers, self._timeout = exchange, timeout
        self._losses: dict[int, Loss] = {}
        self._events: queue.SimpleQueue[_End | Loss | Exception] = queue.SimpleQueue()
        self._waiters: dict[tuple[bool, int], Waiter] = {}
        self._received: dict[int, int] = {}
        store = distributed_c10d._get_default_store()
        self._roll = Roll(store, exchange.name, exchange.rank, exchange.size, timeout, self._events.put)
        weakref.finalize(self, Roll.close, self._roll)  # also at exit, before the store's client is gone

    @property
    def lost(self) -> dict[int, int]:
        """The workers that are lost, by rank: the number of the first step without it."""
        return {rank: loss.last // _STEP + 1 for rank, loss in sorted(self._losses.items())}

    @property
    def meetings(self) -> str:
        """Where in the store those of this engine are."""
        return f"{self._roll.prefix}/meeting"

    def together(self, done: Callable[[], Found | None]) -> Found:
        """Between two steps: ask ``done`` until it gives something, and leave when all that are left have it.

        Until then each waits for a sign of every other, and so one that is lost is noticed.

        Raises:
            PeerLostError: if a worker is silent, or the workers can't agree on who is lost.
        """
        try:
            return self._together(done)
        except PeerLostError:
            self._give_up()
            raise
        except dist.DistError as error:
            self._give_up()
            raise PeerLostError(f"the store at which the workers met is gone, with its host ({error})", 0) from error

    def _together(self, done: Callable[[], Found | None]) -> Found:
        others = [peer for peer in range(self._peers.size) if peer not in (self.worker, *self._losses)]
        sign, signs = torch.zeros(1, dtype=torch.uint8), torch.zeros(len(others), 1, dtype=torch.uint8)
        for peer, buffer in zip(others, signs, strict=True):
            self._start(True, peer, dist.irecv, buffer, _MEETING)
        missing, sending = set(others), set(others)
        result: Found | None = None
        end = time.monotonic() + self._timeout
        while result is None or missing or sending:
            if result is None and (result := done()) is not None:
                for peer in sorted(sending):
                    self._start(False, peer, dist.isend, sign, _MEETING)
            try:
                event = self._events.get(timeout=_PATIENCE)
            except queue.Empty:
                if time.monotonic() > end:
                    self._end_silent(min(missing or sending), "between two steps")
                continue
            if (found := self._known(event, "between two steps")) is None:
                continue
            if isinstance(found, Loss):
                self._losses[found.rank] = found
                missing.discard(found.rank)
                sending.discard(found.rank)
            elif found.error is None:
                (missing if found.incoming else sending).discard(found.peer)
            elif found.peer not in self._losses:
                self._declare(found.peer, found.error, "between two steps")
        return result

    def round(self, part: Pass, vectors: Vectors, place: Place) -> None:
        """None: nothing is sent early, and passes without neighbours are all that is left to the class above."""

    def run(self, part: Pass | RelayPass, vectors: Vectors, place: Place) -> None:
        """One pass.

        Raises:
            PeerLostError: if a worker is silent, or the workers can't agree on who is lost.
        """
        if isinstance(part, RelayPass) or part.exact_mean:
            raise RuntimeError(f"{part.rule} needs all workers, so none may be lost")
        turn = place.step * _STEP + place.first_bucket * _VECTORS + place.part
        plan = self._plan(part.mixing.without(self._absent(turn)))
        if not plan.senders:
            super().run(part, vectors, place)
            return
        x, g = vectors.x, vectors.g
        compute = ops.compute_dtype(x.dtype)
        count = ops.rules("cpu")[part.rule].messages
        row = None if part.row_scalars is None else part.row_scalars[0]
        places = self._buckets(x, part)
        stamps = [Stamp(place.step, place.part, place.first_bucket + k) for k in range(len(places))]
        self._roll.expect(plan.senders)
        slots = {peer: self._received.get(peer, 0) % _BUFFERS for peer in plan.senders}
        outgoing: list[Message] = []
        incoming: dict[int, list[Message]] = {peer: [] for peer in plan.senders}
        for bucket, stamp in zip(places, stamps, strict=True):
            size = count * (bucket.stop - bucket.start) * compute.itemsize
            outgoing.append(self._message(x.device, size, stamp.bucket, -1))
            mine = outgoing[-1].vectors(count, compute)
            pieces = [vectors.state[name][0, bucket] for name in part.state]
            ops.local_step_(x[0, bucket], g[0, bucket], pieces, mine, part.rule, part.hyper, row)
            for peer, slot in slots.items():
                incoming[peer].append(self._message(x.device, size, stamp.bucket, peer * _BUFFERS + slot))
            with span("send", stamp):
                self._start_bucket(plan.receivers, outgoing[-1], incoming, stamp)
        try:
            with span("wait from", stamps[0]):
                self._collect(plan.receivers, incoming, turn, stamps)
        except (MessageError, PeerLostError):
            self._give_up()
            raise
        plan = self._plan(part.mixing.without(self._absent(turn)))
        for k, bucket in enumerate(places):
            parts = {peer: messages[k].vectors(count, compute) for peer, messages in incoming.items()}
            parts[self.worker] = outgoing[k].vectors(count, compute)
            received = [parts[peer][i] for i in range(count) for peer in plan.terms]
            pieces = [vectors.state[name][0, bucket] for name in part.state]
            sums = None if part.block_sums is None else part.block_sums[0, blocks_of(bucket)]
            numbers = (plan.weights, plan.mean, part.rule, part.hyper, row, sums)
            ops.merge_(x[0, bucket], g[0, bucket], pieces, received, *numbers)

    def count(self, part: Pass | RelayPass, vectors: Vectors) -> None:
        """Count the bytes of one pass; the messages to a worker that got lost in it don't count."""
        if isinstance(part, Pass):
            part = dataclasses.replace(part, mixing=part.mixing.without(self._losses))
        super().count(part, vectors)

    def _absent(self, turn: int) -> tuple[int, ...]:
        return tuple(sorted(rank for rank, loss in self._losses.items() if loss.last < turn))

    def _start_bucket(
        self, receivers: Sequence[int], outgoing: Message, incoming: dict[int, list[Message]], stamp: Stamp
    ) -> None:
        """Start the messages of one bucket, one by one, for with some of them it may be too late."""
        exchange = self._peers
        outgoing.stamp(exchange.rank, stamp)
        tag = exchange.tag(stamp.bucket, outgoing)
        for peer, messages in incoming.items():
            if peer not in self._losses:  # else its message is fetched, if it counts
                self._start(True, peer, dist.irecv, messages[-1].buffer, tag)
        for peer in receivers:
            if peer not in self._losses:
                self._start(False, peer, dist.isend, outgoing.buffer, tag)
                exchange.bytes_sent += outgoing.buffer.numel()

    def _start(self, incoming: bool, peer: int, call: Callable[..., Any], buffer: Tensor, tag: int) -> None:
        try:
            work = call(buffer, self._peers.global_rank(peer), group=self._peers.group, tag=tag)
        except RuntimeError as error:
            self._events.put(_End(incoming, peer, error))
            return
        if (incoming, peer) not in self._waiters:
            self._waiters[incoming, peer] = Waiter(functools.partial(_tell, self._events, incoming, peer))
        self._waiters[incoming, peer].add(work)

    def _collect(
        self, receivers: Sequence[int], incoming: dict[int, list[Message]], turn: int, stamps: Sequence[Stamp]
    ) -> None:
        """Wait until every message has been sent, and has come or does not count."""
        begin = time.perf_counter()
        buckets = len(next(iter(incoming.values())))
        missing = dict.fromkeys((peer for peer in incoming if peer not in self._losses), buckets)
        sending = dict.fromkeys((peer for peer in receivers if peer not in self._losses), buckets)
        for peer in incoming.keys() - missing.keys():
            self._fetch(self._losses[peer], incoming[peer], turn, stamps)
        while missing or sending:
            event = self._next_event(missing or sending, stamps[0])
            if isinstance(event, Loss):
                self._losses[event.rank] = event
                sending.pop(event.rank, None)
                if missing.pop(event.rank, None) is not None and event.last >= turn:
                    self._fetch(event, incoming[event.rank], turn, stamps)
                continue
            awaited = missing if event.incoming else sending
            if event.peer not in awaited:  # of a lost worker
                continue
            if event.error is not None:
                self._declare(event.peer, event.error, f"in step {stamps[0].step}")
                continue
            awaited[event.peer] -= 1
            # A message that comes after this worker has said that it has not come waits for what Loss says.
            if not awaited[event.peer] and (not event.incoming or self._take(event.peer, incoming, turn, stamps)):
                del awaited[event.peer]
        self._peers.seconds += time.perf_counter() - begin

    def _give_up(self) -> None:
        """End the threads that wait, for the end of the process would abort in them; the connections end with them."""
        for waiter in self._waiters.values():
            waiter.break_off()
        for waiter in self._waiters.values():
            waiter.join(5.0)

    def _take(self, peer: int, incoming: dict[int, list[Message]], turn: int, stamps: Sequence[Stamp]) -> bool:
        for message, stamp in zip(incoming[peer], stamps, strict=True):
            message.check(peer, stamp)
            self._peers.bytes_received += message.buffer.numel()
        if not self._roll.hold(peer, turn, [message.payload for message in incoming[peer]]):
            return False
        self._received[peer] = self._received.get(peer, 0) + 1
        return True

    def _next_event(self, waiting: dict[int, int], stamp: Stamp) -> _End | Loss:
        when = f"in step {stamp.step}"
        while True:
            try:
                event = self._events.get(timeout=self._timeout)
            except queue.Empty:
                self._end_silent(min(waiting), when)
            if (found := self._known(event, when)) is not None:
                return found

    def _known(self, event: _End | Loss | Exception, when: str) -> _End | Loss | None:
        """An event that does not end the run, or None if it does not matter."""
        if isinstance(event, GaveUp):
            raise PeerLostError(str(event), event.peer)
        if isinstance(event, Excluded):
            raise PeerLostError(
                f"rank {self.worker} of {self._peers.size}, this worker, was taken for lost by the others {when}: a "
                "connection to it broke",
                self.worker,
            )
        # The store is gone, as at the end of a run when its host is the first to end; no matter unless one is lost.
        return None if isinstance(event, Exception) else event

    def _end_silent(self, peer: int, when: str) -> NoReturn:
        text = (
            f"rank {peer} of {self._peers.size} is silent {when}, or waits for one that is: no message came within "
            f"{self._timeout:g} s, but its connection is not broken, so it can't be left out"
        )
        with contextlib.suppress(RuntimeError):  # of a store that is gone
            self._roll.give_up(text, peer)
        raise PeerLostError(text, peer)

    def _declare(self, peer: int, error: Exception, when: str) -> None:
        try:
            self._roll.declare(peer)
        except RuntimeError as broken:
            raise PeerLostError(
                f"rank {peer} of {self._peers.size} is gone: its connection broke {when} ({error}), and the store at "
                f"which workers agree on that is gone, too ({broken})",
                peer,
            ) from broken

    def _fetch(self, loss: Loss, into: Sequence[Message], turn: int, stamps: Sequence[Stamp]) -> None:
        payloads = [message.payload for message in into]
        if turn not in loss.holders or not self._roll.fetch(loss, turn, payloads):
            raise PeerLostError(
                f"rank {loss.rank} of {self._peers.size} is lost, and so is its message of step "
                f"{stamps[0].step}, which others have used",
                loss.rank,
            )


def _tell(
    events: queue.SimpleQueue[_End | Loss | Exception], incoming: bool, peer: int, error: Exception | None
) -> None:
    """Of a thread that waits, which must not keep the engine alive."""
    events.put(_End(incoming, peer, error))
