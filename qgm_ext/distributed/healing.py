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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from qgm_ext import ops
from qgm_ext.algorithms import Pass, RelayPass
from qgm_ext.distributed.engine import Place, Vectors, WorkerEngine
from qgm_ext.distributed.exchange import Exchange, Message, MessageError, Stamp
from qgm_ext.distributed.gossip import GossipPlan, Round, blocks_of
from qgm_ext.distributed.peer_loss import PeerLostError
from qgm_ext.distributed.roll import Excluded, GaveUp, Loss, Roll
from qgm_ext.distributed.timeline import span
from qgm_ext.distributed.waiter import Waiter
from qgm_ext.messages import MessageFormat, memories
from qgm_ext.topology import Topology

__all__ = ["HealingEngine"]

_STEP = 1 << 32  # what a step counts in turns, which number the passes of all its vectors
_VECTORS = 1 << 12
_MEETING = 1 << 30  # tag above those of messages
_BETWEEN = -1  # the turn of meetings
_PATIENCE = 0.01  # seconds between two looks at the store
_BUFFERS = 3  # of each sender: the two last messages, which others may need, and the one that comes


Found = TypeVar("Found")


class _End(NamedTuple):
    """A message of a turn has been sent or has come, or never will be."""

    turn: int
    incoming: bool
    peer: int
    error: Exception | None


class HealingEngine(WorkerEngine):
    """The steps of one worker among others that may be lost.

    Args:
        topology, worker, bucket_bytes, written: as :class:`WorkerEngine`.
        exchange: of the worker, over Gloo; its counters are kept up here as well.
        timeout: seconds after which a silent worker is an error.
    """

    def __init__(
        self,
        topology: Topology,
        worker: int,
        exchange: Exchange,
        bucket_bytes: int,
        written: MessageFormat | None,
        timeout: float,
    ) -> None:
        super().__init__(topology, worker, exchange, bucket_bytes, written)
        self._peers, self._timeout = exchange, timeout
        self._losses: dict[int, Loss] = {}
        self._events: queue.SimpleQueue[_End | Loss | Exception] = queue.SimpleQueue()
        self._waiters: dict[tuple[bool, int], tuple[Waiter, queue.SimpleQueue[int]]] = {}  # and the turns it waits for
        self._received: dict[tuple[int, int], int] = {}  # messages of a peer to the vectors of a first bucket
        self._open: dict[int, _HealingRound] = {}  # by turn
        self._vectors: set[int] = set()  # their first buckets
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
            self._start(_BETWEEN, True, peer, dist.irecv, buffer, _MEETING)
        missing, sending = set(others), set(others)
        result: Found | None = None
        end = time.monotonic() + self._timeout
        while result is None or missing or sending:
            if result is None and (result := done()) is not None:
                for peer in sorted(sending):
                    self._start(_BETWEEN, False, peer, dist.isend, sign, _MEETING)
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
            elif found.error is None and found.turn == _BETWEEN:
                (missing if found.incoming else sending).discard(found.peer)
            elif found.error is not None and found.peer not in self._losses:
                self._declare(found.peer, found.error, "between two steps")
        return result

    def run(self, part: Pass | RelayPass, vectors: Vectors, place: Place) -> None:
        """One pass.

        Raises:
            PeerLostError: if a worker is silent, or the workers can't agree on who is lost.
        """
        if isinstance(part, RelayPass) or part.exact_mean:
            raise RuntimeError(f"{part.rule} needs all workers, so none may be lost")
        super().run(part, vectors, place)

    def round(self, part: Pass, vectors: Vectors, place: Place) -> Round | None:
        """The round of a pass, ready to be sent; None if no neighbour is left."""
        turn = place.step * _STEP + place.first_bucket * _VECTORS + place.part
        if not self._plan_of(part, turn).senders:
            return None
        self._vectors.add(place.first_bucket)
        return _HealingRound(self, part, vectors, place, turn)

    def _plan_of(self, part: Pass, turn: int) -> GossipPlan:
        lost = [rank for rank, loss in self._losses.items() if loss.last < turn]
        return self.plan(part.mixing.without(lost))

    def count(self, part: Pass | RelayPass, vectors: Vectors) -> None:
        """Count the bytes of one pass; the messages to a worker that got lost in it don't count."""
        if isinstance(part, Pass):
            part = dataclasses.replace(part, mixing=part.mixing.without(self._losses))
        super().count(part, vectors)

    def _start_bucket(
        self, receivers: Sequence[int], outgoing: Message, incoming: dict[int, Message], stamp: Stamp, turn: int
    ) -> None:
        """Start the messages of one bucket, one by one, for with some of them it may be too late."""
        exchange = self._peers
        outgoing.stamp(exchange.rank, stamp)
        tag = exchange.tag(stamp.bucket, outgoing)
        for peer, message in incoming.items():
            if peer not in self._losses:  # else its message is fetched, if it counts
                self._start(turn, True, peer, dist.irecv, message.buffer, tag)
        for peer in receivers:
            if peer not in self._losses:
                self._start(turn, False, peer, dist.isend, outgoing.buffer, tag)
                exchange.bytes_sent += outgoing.buffer.numel()

    def _start(self, turn: int, incoming: bool, peer: int, call: Callable[..., Any], buffer: Tensor, tag: int) -> None:
        try:
            work = call(buffer, self._peers.global_rank(peer), group=self._peers.group, tag=tag)
        except RuntimeError as error:
            self._events.put(_End(turn, incoming, peer, error))
            return
        if (incoming, peer) not in self._waiters:
            turns: queue.SimpleQueue[int] = queue.SimpleQueue()
            waiter = Waiter(functools.partial(_tell, self._events, turns, incoming, peer))
            self._waiters[incoming, peer] = (waiter, turns)
        waiter, turns = self._waiters[incoming, peer]
        turns.put(turn)
        waiter.add(work)

    def _collect(self, own: _HealingRound) -> None:
        """Wait until every message of a round has been sent, and has come or does not count."""
        begin = time.perf_counter()
        own.take_what_came()
        while own.missing or own.sending:
            event = self._next_event(own.missing or own.sending, own.stamps[0])
            if isinstance(event, Loss):
                self._losses[event.rank] = event
                for opened in self._open.values():
                    opened.lose(event)
                continue
            found = self._open.get(event.turn)
            awaited = {} if found is None else found.missing if event.incoming else found.sending
            if event.peer not in awaited:  # of a lost worker
                continue
            if event.error is not None:
                self._declare(event.peer, event.error, f"in step {own.stamps[0].step}")
                continue
            awaited[event.peer] -= 1
            if found is own:
                own.take_what_came()
            elif not event.incoming and not awaited[event.peer]:
                del awaited[event.peer]
        self._peers.seconds += time.perf_counter() - begin

    def _give_up(self) -> None:
        """End the threads that wait, for the end of the process would abort in them; the connections end with them."""
        for waiter, _ in self._waiters.values():
            waiter.break_off()
        for waiter, _ in self._waiters.values():
            waiter.join(5.0)

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


class _HealingRound:
    """A :class:`qgm_ext.distributed.gossip.Round` whose messages count if the workers agree that they do.

    Args:
        engine: whose.
        part, vectors, place: the pass.
        turn: its number.

    Attributes:
        places, stamps: of the buckets.
        missing, sending: how many messages have not come from, or not left for, each worker that is not lost.
    """

    def __init__(self, engine: HealingEngine, part: Pass, vectors: Vectors, place: Place, turn: int) -> None:
        self._engine, self._part, self._vectors, self._turn = engine, part, vectors, turn
        self._first_bucket = place.first_bucket
        self._written = engine._written
        x = vectors.x
        self._compute = ops.compute_dtype(x.dtype)
        self._count = ops.rules("cpu")[part.rule].messages
        self._row = None if part.row_scalars is None else part.row_scalars[0]
        self.places = engine._buckets(x, part)
        self.stamps = [Stamp(place.step, place.part, place.first_bucket + k) for k in range(len(self.places))]
        plan = engine._plan_of(part, turn)
        self._receivers = plan.receivers
        engine._roll.expect(plan.senders)
        self._incoming: dict[int, list[Message]] = {}
        self._outgoing = [engine.message(x.device, size, stamp.bucket, -1) for size, stamp in self._sizes()]
        for peer in plan.senders:
            slot = peer * _BUFFERS + engine._received.get((peer, place.first_bucket), 0) % _BUFFERS
            self._incoming[peer] = [engine.message(x.device, size, s.bucket, slot) for size, s in self._sizes()]
        self.missing = {peer: len(self.places) for peer in plan.senders if peer not in engine._losses}
        self.sending = {peer: len(self.places) for peer in plan.receivers if peer not in engine._losses}
        # Of which a message counts still.
        self._lost_before = [engine._losses[peer] for peer in plan.senders if peer in engine._losses]
        self._made: dict[int, _Made] = {}
        engine._open[turn] = self

    def _sizes(self) -> Iterator[tuple[int, Stamp]]:
        """Bytes of a message of each bucket."""
        for bucket, stamp in zip(self.places, self.stamps, strict=True):
            width = bucket.stop - bucket.start
            each = width * self._compute.itemsize
            yield self._count * (each if self._written is None else self._written.nbytes(width, self._compute)), stamp

    def has_sent(self, bucket: int) -> bool:
        """Whether the messages of a bucket are under way."""
        return bucket in self._made

    def send(self, bucket: int) -> None:
        """Make the messages of a bucket and start their exchange."""
        engine, part, place = self._engine, self._part, self.places[bucket]
        x, g = self._vectors.x[0, place], self._vectors.g[0, place]
        outgoing = self._outgoing[bucket]
        if self._written is None:
            made = _Made(outgoing.vectors(self._count, self._compute), [], [], [])
            ops.local_step_(x, g, self._state(place), made.mine, part.rule, part.hyper, self._row)
        else:
            errors = self._errors(place)
            mine, lost, exact = (list(x.new_empty(self._count, len(x), dtype=self._compute)) for _ in range(3))
            made = _Made(mine, lost, exact, [error.clone() for error in errors])
            ops.local_step_(x, g, self._state(place), mine, part.rule, part.hyper, self._row)
            packed = outgoing.vectors(self._count, torch.uint8)
            for k, message in enumerate(mine):
                exact[k].copy_(message)
                self._written.send(message, errors[k], packed[k], lost[k])
        self._made[bucket] = made
        incoming = {peer: messages[bucket] for peer, messages in self._incoming.items()}
        with span("send", self.stamps[bucket]):
            engine._start_bucket(self._receivers, outgoing, incoming, self.stamps[bucket], self._turn)

    def finish(self) -> None:
        """Send what has not been sent, agree on what counts, and merge it."""
        engine = self._engine
        for bucket in range(len(self.places)):
            if bucket not in self._made:
                self.send(bucket)
        try:
            with span("wait from", self.stamps[0]):
                for loss in self._lost_before:
                    self._fetch(loss)
                engine._collect(self)
        except (MessageError, PeerLostError):
            engine._give_up()
            raise
        del engine._open[self._turn]
        plan = engine._plan_of(self._part, self._turn)
        for bucket in range(len(self.places)):
            self._merge(bucket, plan)
        self._made = {}

    def _merge(self, bucket: int, plan: GossipPlan) -> None:
        part, place, count, compute = self._part, self.places[bucket], self._count, self._compute
        x, g, made = self._vectors.x[0, place], self._vectors.g[0, place], self._made[bucket]
        vectors = {self._engine.worker: made.mine}
        for peer in plan.senders:
            message = self._incoming[peer][bucket]
            if self._written is None:
                vectors[peer] = message.vectors(count, compute)
            else:
                vectors[peer] = list(x.new_empty(count, len(x), dtype=compute))
                for packed, out in zip(message.vectors(count, torch.uint8), vectors[peer], strict=True):
                    self._written.read(packed, out)
        weights, mean = plan.weights, plan.mean
        rounded = self._written is not None
        if rounded and not plan.senders:  # all got lost, so nothing was sent, and nothing rounded
            for kept, before in ((made.mine, made.exact), (self._errors(place), made.errors)):
                for vector, value in zip(kept, before, strict=True):
                    vector.copy_(value)
            for lost in made.lost:
                lost.zero_()
        ends = [[lost] for lost in made.lost] if rounded else [[]] * count
        received = [one for k in range(count) for one in (*(vectors[peer][k] for peer in plan.terms), *ends[k])]
        if rounded:
            weights, mean = [*weights, 1.0], False
        sums = None if part.block_sums is None else part.block_sums[0, blocks_of(place)]
        ops.merge_(x, g, self._state(place), received, weights, mean, part.rule, part.hyper, self._row, sums)

    def _state(self, place: slice) -> list[Tensor]:
        return [self._vectors.state[name][0, place] for name in self._part.state]

    def _errors(self, place: slice) -> list[Tensor]:
        return [memory[0, place] for memory in memories(self._vectors.state)]

    def take_what_came(self) -> None:
        """Hold the messages of those that have sent all, unless this worker has said that it does not hold them."""
        for peer in [peer for peer, count in self.sending.items() if not count]:
            del self.sending[peer]
        for peer in [peer for peer, count in self.missing.items() if not count]:
            for message, stamp in zip(self._incoming[peer], self.stamps, strict=True):
                message.check(peer, stamp)
            payloads = [message.payload for message in self._incoming[peer]]
            # A round of each vectors may be under way, and who waits for this one is a step behind at most.
            if self._engine._roll.hold(peer, self._turn, payloads, 2 * len(self._engine._vectors)):
                self._engine._peers.bytes_received += sum(one.buffer.numel() for one in self._incoming[peer])
                key = (peer, self._first_bucket)
                self._engine._received[key] = self._engine._received.get(key, 0) + 1
                del self.missing[peer]

    def lose(self, loss: Loss) -> None:
        """Go on without a worker, or with its last message, wherever that is."""
        self.sending.pop(loss.rank, None)
        if self.missing.pop(loss.rank, None) is not None and loss.last >= self._turn:
            self._fetch(loss)

    def _fetch(self, loss: Loss) -> None:
        payloads = [message.payload for message in self._incoming[loss.rank]]
        if self._turn not in loss.holders or not self._engine._roll.fetch(loss, self._turn, payloads):
            raise PeerLostError(
                f"rank {loss.rank} of {self._engine._peers.size} is lost, and so is its message of step "
                f"{self.stamps[0].step}, which others have used",
                loss.rank,
            )


class _Made(NamedTuple):
    """The own messages of a bucket, as others read them, and, if they are rounded, what they lost, what they were, and
    the error memories before.
    """

    mine: list[Tensor]
    lost: list[Tensor]
    exact: list[Tensor]
    errors: list[Tensor]


def _tell(
    events: queue.SimpleQueue[_End | Loss | Exception],
    turns: queue.SimpleQueue[int],
    incoming: bool,
    peer: int,
    error: Exception | None,
) -> None:
    """Of a thread that waits, which must not keep the engine alive."""
    events.put(_End(turns.get(), incoming, peer, error))
