"""Staleness: passes that merge a neighbour's last message instead of waiting for the next (``staleness=k``).

In its step t a worker merges, of each neighbour, the newest message that has come, of step t or earlier, and waits only
while that is older than step t - k. So nobody gets more than k + 1 steps ahead of a slow neighbour in what it sends,
and the neighbour itself finds the messages of its own step. Weights stay what they are:
x_i <- sum_j W_ij m_j of step t_j, t - k <= t_j <= t.

What it costs: the rows of W still sum to one, so workers that agree stay where they are; but a message may count twice
or not at all, so the mean over workers is no longer kept exactly, and which message counts depends on time, so runs are
not repeatable. The graph must be static and undirected, or nothing would keep a worker from running away.

A message is asked for one step before its own, so that it is there when it is due, and threads tell that it is
(:mod:`qgm_ext.distributed.waiter`): k + 2 buffers for each neighbour, and as many for what is sent. So there is always
one message asked for that has not been sent yet; in :meth:`StaleEngine.drain` workers send each other a last, empty
one. After it no message is under way.
"""

from __future__ import annotations

import functools
import itertools
import queue
import time
import weakref
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from qgm_ext import ops
from qgm_ext.algorithms import Pass, RelayPass
from qgm_ext.distributed.engine import Place, Vectors, WorkerEngine
from qgm_ext.distributed.exchange import Exchange, Message, MessageError, Pending, Stamp
from qgm_ext.distributed.gossip import GossipPlan, blocks_of
from qgm_ext.distributed.peer_loss import PeerLostError, meeting
from qgm_ext.distributed.timeline import span
from qgm_ext.distributed.waiter import Waiter
from qgm_ext.topology import Topology

__all__ = ["StaleEngine"]

_LAST = -1  # in place of the part: of a message that only says that no more come
_MOST_BUCKETS = 1 << 24
_numbers = itertools.count(1)  # of engines; messages of 0 are those of WorkerEngine
_Key = tuple[int, int]  # first bucket and part: what is exchanged once a step


class _Channel:
    """The messages of one pass: one a step, or round, to and from each neighbour.

    Args:
        plan: the neighbours.
        exchange: how messages travel.
        sizes: bytes of a message, bucket by bucket.
        first_number: for the tags, of the first bucket in the first slot.
        depth: k + 2.
        device: of the buffers.

    Attributes:
        sizes: as above.
        round: how many messages have been sent to each neighbour.
        outgoing: [slot][bucket]; round r is in slot r % depth.
        incoming: the same by neighbour.
        sends, receives: [slot][bucket], how they are started.
        sending: [slot], what may not have been sent yet.
        stamps: [slot], of the first bucket.
        ends: by neighbour how many buckets have come.
        checked: by neighbour of how many rounds the headers have been read.
    """

    def __init__(
        self,
        plan: GossipPlan,
        exchange: Exchange,
        sizes: Sequence[int],
        first_number: int,
        depth: int,
        device: torch.device,
    ) -> None:
        def buffers() -> list[list[Message]]:
            return [[Message(size, device) for size in sizes] for _ in range(depth)]

        self.sizes, self.round = list(sizes), 0
        self.outgoing = buffers()
        self.incoming = {peer: buffers() for peer in plan.senders}
        self.sending: list[list[Pending]] = [[] for _ in range(depth)]
        self.stamps = [Stamp(0, 0, 0)] * depth
        self.ends, self.checked = dict.fromkeys(plan.senders, 0), dict.fromkeys(plan.senders, 0)
        # Numbered by slots, too, because messages of several rounds may be under way at a time.
        numbers = [[first_number + k * depth + slot for k in range(len(sizes))] for slot in range(depth)]
        self.sends = [
            [exchange.batch([(peer, one) for peer in plan.receivers], [], number) for one, number in pairs]
            for pairs in (zip(*both, strict=True) for both in zip(self.outgoing, numbers, strict=True))
        ]
        self.receives = [
            [
                exchange.batch([], [(peer, rows[slot][k]) for peer, rows in self.incoming.items()], number)
                for k, number in enumerate(numbers[slot])
            ]
            for slot in range(depth)
        ]

    def newest(self, peer: int) -> int:
        """The round of the newest message that has come; -1 before the first."""
        return self.ends[peer] // len(self.sizes) - 1

    def late(self, oldest: int) -> list[int]:
        """The neighbours whose newest message is older than this round."""
        return [peer for peer in self.ends if self.newest(peer) < oldest]

    def check(self) -> None:
        """Read the headers of what has come and is due; raises MessageError."""
        depth = len(self.stamps)
        for peer, done in self.checked.items():
            due = min(self.newest(peer) + 1, self.round)
            for number in range(done, due):
                stamp = self.stamps[number % depth]
                for k, message in enumerate(self.incoming[peer][number % depth]):
                    message.check(peer, stamp._replace(bucket=stamp.bucket + k))
            self.checked[peer] = due


class StaleEngine(WorkerEngine):
    """The steps of one worker that does not wait for slow neighbours.

    Args:
        topology, worker, bucket_bytes: as :class:`WorkerEngine`; the topology static and undirected.
        exchange: of the worker, over Gloo; its counters are kept up here as well.
        staleness: k >= 0, how many steps old the messages may be that it merges.
        timeout: seconds after which a message that is waited for is an error.

    Attributes:
        ages: by neighbour, how often its message was 0, 1, ..., k steps old.
    """

    def __init__(
        self,
        topology: Topology,
        worker: int,
        exchange: Exchange,
        bucket_bytes: int,
        staleness: int,
        timeout: float,
    ) -> None:
        super().__init__(topology, worker, exchange, bucket_bytes)
        self._peers, self._depth, self._timeout = exchange, staleness + 2, timeout
        self._staleness, self._number = staleness, 0
        self._channels: dict[_Key, _Channel] = {}
        self._waiters: dict[tuple[_Key, int], Waiter] = {}
        self._events: queue.SimpleQueue[tuple[_Key, int, Exception | None]] = queue.SimpleQueue()
        self.ages: dict[int, list[int]] = {}
        weakref.finalize(self, _end, self._waiters)  # also at exit, which would abort in threads that wait

    def round(self, part: Pass, vectors: Vectors, place: Place) -> None:
        """None: nothing is sent early, and passes without neighbours are all that is left to the class above."""

    def run(self, part: Pass | RelayPass, vectors: Vectors, place: Place) -> None:
        """One pass.

        Raises:
            PeerLostError: if a message does not come in time or its sender is gone.
            MessageError: if something else came.
        """
        if isinstance(part, RelayPass) or part.exact_mean or part.packed is not None:
            raise RuntimeError(f"{part.rule} needs the messages of the step itself")
        plan = self.plan(part.mixing)
        if not plan.talks:
            super().run(part, vectors, place)
            return
        try:
            self._gossip(part, plan, vectors, place)
        except (MessageError, PeerLostError):
            _end(self._waiters)
            raise

    def _gossip(self, part: Pass, plan: GossipPlan, vectors: Vectors, at: Place) -> None:
        x, g = vectors.x, vectors.g
        compute = ops.compute_dtype(x.dtype)
        count = ops.rules("cpu")[part.rule].messages
        row = None if part.row_scalars is None else part.row_scalars[0]
        places = self._buckets(x, part)
        channel = self._channel(plan, [count * (p.stop - p.start) * compute.itemsize for p in places], x.device, at)
        now, slot = self._begin(channel, Stamp(at.step, at.part, at.first_bucket))
        for k, place in enumerate(places):
            state = [vectors.state[name][0, place] for name in part.state]
            mine = channel.outgoing[slot][k].vectors(count, compute)
            ops.local_step_(x[0, place], g[0, place], state, mine, part.rule, part.hyper, row)
            self._receive(channel, now + 1, k, at)
            self._send(channel, slot, k)
        self._collect(channel, max(0, now - self._staleness))
        newest = {peer: min(channel.newest(peer), now) for peer in plan.senders}
        for peer, one in newest.items():
            self.ages.setdefault(peer, [0] * (self._staleness + 1))[now - one] += 1
        self.stale_messages += sum(one < now for one in newest.values())
        for k, place in enumerate(places):
            parts = {
                peer: channel.incoming[peer][one % self._depth][k].vectors(count, compute)
                for peer, one in newest.items()
            }
            parts[self.worker] = channel.outgoing[slot][k].vectors(count, compute)
            received = [parts[peer][i] for i in range(count) for peer in plan.terms]
            state = [vectors.state[name][0, place] for name in part.state]
            sums = None if part.block_sums is None else part.block_sums[0, blocks_of(place)]
            numbers = (plan.weights, plan.mean, part.rule, part.hyper, row, sums)
            ops.merge_(x[0, place], g[0, place], state, received, *numbers)

    def drain(self) -> None:
        """Wait until no message is under way; then forget those of others, so that the next step waits for new ones.

        All workers call it after the same step.

        Raises: as :meth:`run`.
        """
        try:
            for channel in self._channels.values():
                now, slot = self._begin(channel, channel.stamps[(channel.round - 1) % self._depth]._replace(part=_LAST))
                for k in range(len(channel.sizes)):
                    self._send(channel, slot, k)
                self._collect(channel, now)
                for pending in channel.sending:
                    self._peers.wait(pending)
        except (MessageError, PeerLostError):
            _end(self._waiters)
            raise
        self._channels.clear()

    def _channel(self, plan: GossipPlan, sizes: Sequence[int], device: torch.device, at: Place) -> _Channel:
        """That of a pass; a new one where its vectors have got another size, which they have on all workers."""
        key = (at.first_bucket, at.part)
        if key in self._channels and self._channels[key].sizes != sizes:
            self.drain()
        if key not in self._channels:
            first = self._agreed_number() * _MOST_BUCKETS + at.first_bucket * self._depth
            channel = self._channels[key] = _Channel(plan, self._peers, sizes, first, self._depth, device)
            for k in range(len(sizes)):
                self._receive(channel, 0, k, at)
        return self._channels[key]

    def _agreed_number(self) -> int:
        """Of this engine, the same on all workers and for no other engine; a collective at first.

        Messages of several optimizers may be under way at the same time, and must not be taken for each other's.
        """
        if not self._number:
            mine = torch.tensor([next(_numbers)])
            with meeting(self._peers.group):
                dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._peers.group)
            self._number = int(mine)
            while next(_numbers) < self._number:
                pass
        return self._number

    def _begin(self, channel: _Channel, stamp: Stamp) -> tuple[int, int]:
        """The number and slot of the next round, in which nothing is under way any more."""
        now = channel.round
        slot = now % self._depth
        # The neighbours have asked for it: their message of k + 1 rounds ago, which has come, was sent after that.
        self._peers.wait(channel.sending[slot])
        channel.stamps[slot], channel.sending[slot] = stamp, []
        channel.round += 1
        return now, slot

    def _receive(self, channel: _Channel, number: int, bucket: int, at: Place) -> None:
        """Ask for one bucket of a round."""
        key, stamp = (at.first_bucket, at.part), Stamp(at.step, at.part, at.first_bucket + bucket)
        for one in self._peers.start(channel.receives[number % self._depth][bucket], stamp):
            if (key, one.peer) not in self._waiters:
                self._waiters[key, one.peer] = Waiter(functools.partial(_tell, self._events, key, one.peer))
            self._waiters[key, one.peer].add(one.work)

    def _send(self, channel: _Channel, slot: int, bucket: int) -> None:
        stamp = channel.stamps[slot]
        stamp = stamp._replace(bucket=stamp.bucket + bucket)
        channel.sending[slot] += self._peers.start(channel.sends[slot][bucket], stamp)

    def _collect(self, channel: _Channel, oldest: int) -> None:
        """Take what has come, and wait until every neighbour's message of round ``oldest`` has."""
        while not self._events.empty():
            self._take(*self._events.get())
        begin = time.perf_counter()
        while late := channel.late(oldest):
            stamp = channel.stamps[oldest % self._depth]
            try:
                with span("wait for", stamp, late[0]):
                    event = self._events.get(timeout=self._timeout)
            except queue.Empty:
                raise self._peers.lost(late[0], stamp, RuntimeError("Timed out")) from None
            self._take(*event)
        self._peers.seconds += time.perf_counter() - begin
        channel.check()

    def _take(self, key: _Key, peer: int, error: Exception | None) -> None:
        """One bucket has come, or never will."""
        channel = self._channels[key]
        if error is not None:
            raise self._peers.lost(peer, channel.stamps[(channel.round - 1) % self._depth], error)
        number, bucket = divmod(channel.ends[peer], len(channel.sizes))
        self._peers.bytes_received += channel.incoming[peer][number % self._depth][bucket].buffer.numel()
        channel.ends[peer] += 1


def _tell(
    events: queue.SimpleQueue[tuple[_Key, int, Exception | None]], key: _Key, peer: int, error: Exception | None
) -> None:
    """Of a thread that waits, which must not keep the engine alive."""
    events.put((key, peer, error))


def _end(waiters: Mapping[tuple[_Key, int], Waiter]) -> None:
    """End the threads, and where they wait the connections, which tells the neighbours."""
    for waiter in waiters.values():
        waiter.break_off() if waiter.is_waiting else waiter.end()
    for waiter in waiters.values():
        waiter.join(5.0)
