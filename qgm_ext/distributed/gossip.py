"""GossipRound: one pass over a mixing matrix as one worker sees it, bucket by bucket.

A bucket is a stretch of the worker's vectors: its messages are made and sent, the neighbours' come, and both are
merged, in any order among buckets. A round is built once and used in every step with the same neighbours, so that steps
make no views and no requests anew. Which passes a step has is the business of :mod:`qgm_ext.distributed.engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qgm_ext import ops
from qgm_ext.distributed.exchange import Batch, Exchange, Message, Pending, Stamp
from qgm_ext.messages import MessageFormat

__all__ = ["GossipPlan", "GossipRound", "Round", "blocks_of"]


class GossipPlan(NamedTuple):
    """A row and a column of a mixing matrix, as messages."""

    senders: list[int]  # ascending, without this worker
    receivers: list[int]
    terms: list[int]  # ascending, with this worker if it counts: whose messages are summed
    weights: list[float]
    mean: bool

    @property
    def talks(self) -> bool:
        """Whether this worker exchanges anything."""
        return bool(self.senders or self.receivers)


def blocks_of(place: slice) -> slice:
    """Those of the block sums of a row (:func:`qgm_ext.ops.new_block_sums`) that are a bucket's."""
    return slice(place.start // ops.REDUCE_BLOCK, -(-place.stop // ops.REDUCE_BLOCK))


class _Bucket(NamedTuple):
    make: ops.Prepared  # the messages of this worker
    merge: ops.Prepared  # those of all terms; if they are rounded, with what the own ones lost
    mine: list[Tensor]
    batch: Batch
    rounded: _Rounded | None


class _Rounded(NamedTuple):
    """Of messages that are rounded on their way, each with its place: what belongs to them besides."""

    written: MessageFormat
    errors: list[Tensor]
    packed: list[Tensor]
    lost: list[Tensor]
    incoming: list[tuple[Tensor, Tensor]]  # (as bytes, as numbers)


class Round(Protocol):
    """The buckets of one pass over a mixing matrix, each of which can be sent before the others."""

    @property
    def places(self) -> Sequence[slice]:
        """The buckets."""

    def has_sent(self, bucket: int) -> bool:
        """Whether the messages of a bucket, by its place in ``places``, are under way."""

    def send(self, bucket: int) -> None:
        """Make the messages of a bucket and start their exchange."""

    def finish(self) -> None:
        """Send what has not been sent, and merge everything."""


class GossipRound:
    """A :class:`Round` among workers none of which gets lost.

    Args:
        x, g, state: the worker's vectors, each [D].
        rule: what is done to them.
        plan: whose messages it takes and gives.
        worker: its number.
        places: the buckets.
        numbers: of the buckets, distinct among all that are under way at the same time.
        message: gives the buffer for messages of so many bytes of a bucket, by number, and a slot.
        exchange: how messages travel.
        written: how messages are written, if not as they are.
        errors: their error memories then, each [D].

    Attributes:
        places: the buckets.
    """

    def __init__(
        self,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        rule: str,
        plan: GossipPlan,
        worker: int,
        places: Sequence[slice],
        numbers: Sequence[int],
        message: Callable[[int, int, int], Message],
        exchange: Exchange,
        written: MessageFormat | None = None,
        errors: Sequence[Tensor] = (),
    ) -> None:
        self.places = places
        self._exchange, self._numbers = exchange, numbers
        # What the own messages lost by rounding counts in full.
        weights = plan.weights if written is None else [*plan.weights, 1.0]
        mean = plan.mean and written is None
        self._buckets: list[_Bucket] = []
        compute = ops.compute_dtype(x.dtype)
        count = ops.rules("cuda" if x.is_cuda else "cpu")[rule].messages
        for place, number in zip(places, numbers, strict=True):
            width = place.stop - place.start
            size = count * (width * compute.itemsize if written is None else written.nbytes(width, compute))
            outgoing = message(size, number, -1)
            incoming = {peer: message(size, number, k) for k, peer in enumerate(plan.senders)}
            ends: list[list[Tensor]] = [[] for _ in range(count)]
            rounded = None
            if written is None:
                vectors = {peer: one.vectors(count, compute) for peer, one in incoming.items()}
                vectors[worker] = outgoing.vectors(count, compute)
            else:
                vectors = {peer: list(x.new_empty(count, width, dtype=compute)) for peer in (*incoming, worker)}
                rounded = _Rounded(
                    written,
                    [error[place] for error in errors],
                    outgoing.vectors(count, torch.uint8),
                    list(x.new_empty(count, width, dtype=compute)),
                    [
                        pair
                        for peer, one in incoming.items()
                        for pair in zip(one.vectors(count, torch.uint8), vectors[peer], strict=True)
                    ],
                )
                ends = [[lost] for lost in rounded.lost]
            mine, own = (x[place], g[place], [vector[place] for vector in state]), vectors[worker]
            received = [one for k in range(count) for one in (*(vectors[peer][k] for peer in plan.terms), *ends[k])]
            self._buckets.append(
                _Bucket(
                    ops.prepare_local_step(*mine, own, rule),
                    ops.prepare_merge(*mine, received, weights, mean, rule),
                    own,
                    exchange.batch([(peer, outgoing) for peer in plan.receivers], list(incoming.items()), number),
                    rounded,
                )
            )
        self._sent: dict[int, list[Pending]] = {}

    def begin(self, hyper: list[float], row: Tensor | None, sums: Tensor | None, step: int, part: int) -> None:
        """Use it for a pass with these numbers and block sums, which is ``part`` of step number ``step``."""
        self._hyper, self._row, self._sums, self._step, self._part = hyper, row, sums, step, part
        self._sent = {}

    def has_sent(self, bucket: int) -> bool:
        """Whether the messages of a bucket are under way."""
        return bucket in self._sent

    def send(self, bucket: int) -> None:
        """Make the messages of a bucket, by its place in ``places``, and start their exchange."""
        part = self._buckets[bucket]
        part.make(self._hyper, self._row)
        if part.rounded is not None:
            places = zip(part.mine, part.rounded.errors, part.rounded.packed, part.rounded.lost, strict=True)
            for message, error, packed, lost in places:
                part.rounded.written.send(message, error, packed, lost)
        stamp = Stamp(self._step, self._part, self._numbers[bucket])
        self._sent[bucket] = self._exchange.start(part.batch, stamp)

    def finish(self) -> None:
        """Send what has not been sent, and merge everything."""
        for bucket in range(len(self._buckets)):
            if bucket not in self._sent:
                self.send(bucket)
        outgoing = []
        for bucket, pending in self._sent.items():
            self._exchange.wait([one for one in pending if one.incoming])
            outgoing += [one for one in pending if not one.incoming]
            part = self._buckets[bucket]
            if part.rounded is not None:
                for packed, vector in part.rounded.incoming:
                    part.rounded.written.read(packed, vector)
            sums = None if self._sums is None else self._sums[blocks_of(self.places[bucket])]
            part.merge(self._hyper, self._row, sums)
        self._exchange.wait(outgoing)  # the buffers are written again in the next pass
        self._sent = {}
