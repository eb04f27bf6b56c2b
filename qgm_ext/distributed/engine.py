"""WorkerEngine: runs the passes of an algorithm for one worker, with messages where the stacked step reads other rows.

A pass becomes: the rule's local half, which writes straight into send buffers; one batch of sends and receives for
each bucket; the rule's merging half over what came, in ascending order of workers, so that the bits are those of the
worker's row in :class:`qgm_ext.StackedOptimizer`. An exact mean is summed in parts: each worker adds up its share of
the coordinates, again in order, and hands it to all. Relayed sums go along the edges of the trees.

It knows vectors, not models or parameter groups (:mod:`qgm_ext.optim`), and not how messages travel
(:mod:`qgm_ext.distributed.exchange`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from qgm_ext import graphs, messages, ops
from qgm_ext import topology as topologies
from qgm_ext.algorithms import Algorithm, PackedMessage, Pass, RelayPass, Step, identity_mixing
from qgm_ext.algorithms.planning import plan_ahead
from qgm_ext.distributed.communication import lane_sizes, share_size
from qgm_ext.distributed.exchange import Exchange, Message, Pending, Stamp
from qgm_ext.distributed.gossip import GossipPlan, GossipRound, Round, blocks_of
from qgm_ext.flat import ALIGNMENT, FlatLayout
from qgm_ext.messages import MessageFormat
from qgm_ext.mixing import Mixing
from qgm_ext.topology import Topology

__all__ = ["Clock", "Turn", "Vectors", "WorkerEngine", "relay_state_names"]

_KEPT_PLANS = 64  # of topologies that never repeat, only the last few are needed


class Vectors(NamedTuple):
    """What a step changes: one worker's row of everything.

    Args:
        x: parameters, [1, D]. g: gradient at x, [1, D].
        state: the state vectors by name, each [1, D] in the compute dtype; for relayed sums those of
            :func:`relay_state_names`.
        layout: where each parameter lies in the row.
    """

    x: Tensor
    g: Tensor
    state: Mapping[str, Tensor]
    layout: FlatLayout


@dataclass
class Clock:
    """What an algorithm remembers from step to step besides vectors.

    Args:
        number: steps taken. round: of those, in how many the workers averaged.
        previous_lr: the last step size that was not 0; None before the first.
        scalars: the algorithm's numbers of each worker, [n] float64 by name.
    """

    number: int = 0
    round: int = 0
    previous_lr: float | None = None
    scalars: dict[str, Tensor] = field(default_factory=dict)


def relay_state_names(name: str, topology: Topology, worker: int) -> list[str]:
    """The state vectors that hold the relayed messages of one worker: one for each neighbour in any of the trees."""
    return [f"{name}_{peer}" for peer in _relay_peers(topology, worker)]


def _relay_peers(topology: Topology, worker: int) -> list[int]:
    return sorted({peer for tree in topology.trees().trees for peer in _tree_neighbors(tree.edges, worker)})


def _tree_neighbors(edges: graphs.Edges, worker: int) -> list[int]:
    to, frm = edges
    return sorted(frm[to == worker].tolist())


class Place(NamedTuple):
    """Where a pass is in the training, for the headers and tags of its messages."""

    step: int
    part: int
    first_bucket: int


class WorkerEngine:
    """The steps of one worker.

    Args:
        topology: who averages with whom.
        worker: which of its workers this is.
        exchange: how messages travel; None for a worker without others.
        bucket_bytes: vectors are cut into buckets of at most this size, but of 64 elements at least (4096 where a rule
            sums squares by blocks).
        written: how messages to neighbours are written, if not as they are.

    Attributes:
        bytes_sent, bytes_received: of this worker so far, as the algorithms count them
            (:class:`qgm_ext.distributed.communication.Communication`).
        stale_messages: merged so far that were of an earlier step; 0 but in :class:`qgm_ext.distributed.stale`.
    """

    def __init__(
        self,
        topology: Topology,
        worker: int,
        exchange: Exchange | None,
        bucket_bytes: int,
        written: MessageFormat | None = None,
    ) -> None:
        self.topology = topology
        self.worker = worker
        self.exchange = exchange
        self._bucket_bytes = bucket_bytes
        self._written = written
        self._plans: OrderedDict[int, tuple[Mixing, GossipPlan]] = OrderedDict()
        self._messages: dict[tuple[object, ...], Message] = {}
        self._rounds: OrderedDict[tuple[object, ...], tuple[Vectors, GossipPlan, GossipRound]] = OrderedDict()
        self._silent = identity_mixing(1)
        self.bytes_sent = 0
        self.bytes_received = 0
        self.stale_messages = 0

    def turn(
        self,
        algorithm: Algorithm,
        vectors: Vectors,
        lr: float,
        clock: Clock,
        gossip: bool = True,
        number: int = 0,
        first_bucket: int = 0,
    ) -> Turn:
        """One step, to be taken by :meth:`Turn.finish`.

        Args:
            algorithm: what to do.
            vectors: what to do it to.
            lr: step size.
            clock: of this algorithm and these vectors; advanced.
            gossip: False: every worker for itself, W = I.
            number: of the step, the same on all workers.
            first_bucket: buckets are numbered from it, so that those of several vectors can be told apart.
        """
        return Turn(self, algorithm, vectors, lr, clock, gossip, number, first_bucket)

    def num_buckets(self, vectors: Vectors) -> int:
        """Into how many buckets they are cut."""
        return len(self._buckets(vectors.x))

    def start_state(self, algorithm: Algorithm, vectors: Vectors) -> None:
        """Give state vectors, which are zero, what they start from."""
        own = {name: vector for name, vector in vectors.state.items() if name in algorithm.state_names}
        relayed = [name for name in algorithm.state_names if name not in own]
        if not relayed:
            algorithm.start_state(self.topology, vectors.x, own)
            return
        for name in relayed:  # the other vectors of algorithms that relay start from zero
            trees = self.topology.trees().trees
            for k, tree in enumerate(trees):
                to, frm = tree.edges
                for edge in (to == self.worker).nonzero()[0].tolist():
                    target = vectors.state[f"{name}_{int(frm[edge])}"][0, k :: len(trees)]
                    x = vectors.x[0, k :: len(trees)].to(target.dtype)
                    target.copy_(algorithm.initial_relay(tree, edge, x))

    # Passes -----------------------------------------------------------------------------------------------------------

    def run(self, part: Pass | RelayPass, vectors: Vectors, place: Place) -> None:
        """One pass."""
        if isinstance(part, RelayPass):
            self._relay(part, vectors, place)
        elif part.exact_mean and self.topology.num_workers > 1:
            self._exact_mean(part, vectors, place)
        elif part.packed is not None and self.plan(part.mixing).talks:
            self._send_packed(part, part.packed, vectors, place)
        elif (found := self.round(part, vectors, place)) is not None:
            found.finish()
        else:
            x, state = vectors.x, [vectors.state[name] for name in part.state]
            tensors = self._silent.tensors(x.device, ops.compute_dtype(x.dtype))
            numbers = (part.row_scalars, part.block_sums)
            ops.gossip_step_(x, vectors.g, state, tensors, self._silent.form, part.rule, part.hyper, *numbers)

    def round(self, part: Pass, vectors: Vectors, place: Place) -> Round | None:
        """The round of a pass, ready to be sent; None if this worker exchanges nothing in it."""
        plan = self.plan(part.mixing)
        if not plan.talks:
            return None
        if self.exchange is None:
            raise RuntimeError("a worker without others has nobody to send to")
        key = (place.first_bucket, id(plan), part.rule, part.state)
        known = self._rounds.get(key)
        if known is None or known[0] is not vectors or known[1] is not plan:
            for old in [k for k, kept in self._rounds.items() if k[0] == key[0] and kept[0] is not vectors]:
                del self._rounds[old]
            device, buckets = vectors.x.device, self._buckets(vectors.x, part)
            made = GossipRound(
                vectors.x[0],
                vectors.g[0],
                [vectors.state[name][0] for name in part.state],
                part.rule,
                plan,
                self.worker,
                buckets,
                range(place.first_bucket, place.first_bucket + len(buckets)),
                lambda size, bucket, slot: self.message(device, size, bucket, slot),
                self.exchange,
                self._written,
                [memory[0] for memory in messages.memories(vectors.state)],
            )
            known = self._rounds[key] = (vectors, plan, made)
            if len(self._rounds) > _KEPT_PLANS:
                self._rounds.popitem(last=False)
        row = None if part.row_scalars is None else part.row_scalars[0]
        sums = None if part.block_sums is None else part.block_sums[0]
        known[2].begin(part.hyper, row, sums, place.step, place.part)
        return known[2]

    def _send_packed(self, part: Pass, packed: PackedMessage, vectors: Vectors, at: Place) -> None:
        """A pass whose one message is compressed, in one piece."""
        plan, x, g = self.plan(part.mixing), vectors.x[0], vectors.g[0]
        state = [vectors.state[name][0] for name in part.state]
        mine = torch.empty(len(x), dtype=ops.compute_dtype(x.dtype), device=x.device)
        ops.local_step_(x, g, state, [mine], part.rule, part.hyper, None)
        size = packed.data.numel()
        outgoing = self.message(x.device, size, at.first_bucket, -1)
        outgoing.payload.copy_(packed.data)
        incoming = {peer: self.message(x.device, size, at.first_bucket, k) for k, peer in enumerate(plan.senders)}
        sends = [(peer, outgoing) for peer in plan.receivers]
        self.wait(self.post(sends, list(incoming.items()), at, at.first_bucket))
        messages = {self.worker: mine}
        for peer, message in incoming.items():
            messages[peer] = torch.zeros_like(mine)
            packed.unpack(message.payload, peer, messages[peer])
        received = [messages[peer] for peer in plan.terms]
        ops.merge_(x, g, state, received, plan.weights, plan.mean, part.rule, part.hyper, None)

    def _exact_mean(self, part: Pass, vectors: Vectors, at: Place) -> None:
        """Messages averaged over all workers: each sums its share of the coordinates in order and hands it to all."""
        x, g, n = vectors.x, vectors.g, self.topology.num_workers
        state = [vectors.state[name] for name in part.state]
        compute = ops.compute_dtype(x.dtype)
        count = ops.rules("cuda" if x.is_cuda else "cpu")[part.rule].messages
        row = None if part.row_scalars is None else part.row_scalars[0]
        others = [peer for peer in range(n) if peer != self.worker]
        for bucket, place in enumerate(self._buckets(x, part), at.first_bucket):
            width = place.stop - place.start
            mine = [torch.empty(width, dtype=compute, device=x.device) for _ in range(count)]
            pieces = [vector[0, place] for vector in state]
            ops.local_step_(x[0, place], g[0, place], pieces, mine, part.rule, part.hyper, row)
            shares = _shares(width, n)
            own = shares[self.worker]
            outgoing, incoming = {}, {}
            for k, peer in enumerate(others):
                outgoing[peer] = self.message(x.device, count * _length(shares[peer]) * compute.itemsize, bucket, ~k)
                for target, vector in zip(outgoing[peer].vectors(count, compute), mine, strict=True):
                    target.copy_(vector[shares[peer]])
                incoming[peer] = self.message(x.device, count * _length(own) * compute.itemsize, bucket, k)
            self.wait(self.post(list(outgoing.items()), list(incoming.items()), at, 2 * bucket))
            total = self.message(x.device, count * _length(own) * compute.itemsize, bucket, None)
            parts = {peer: message.vectors(count, compute) for peer, message in incoming.items()}
            parts[self.worker] = [vector[own] for vector in mine]
            for k, target in enumerate(total.vectors(count, compute)):
                _mean_into(target, [parts[peer][k] for peer in range(n)])
            final = {
                peer: self.message(x.device, count * _length(shares[peer]) * compute.itemsize, bucket, k)
                for k, peer in enumerate(others)
            }
            self.wait(self.post([(peer, total) for peer in others], list(final.items()), at, 2 * bucket + 1))
            for peer, message in (*final.items(), (self.worker, total)):
                for target, vector in zip(mine, message.vectors(count, compute), strict=True):
                    target[shares[peer]] = vector
            sums = None if part.block_sums is None else part.block_sums[0, blocks_of(place)]
            ops.merge_(x[0, place], g[0, place], pieces, mine, [1.0], False, part.rule, part.hyper, row, sums)

    def _relay(self, part: RelayPass, vectors: Vectors, at: Place) -> None:
        """m_ij <- h_i + sum of the last m_li over the neighbours l but j; x from (count h_i + sum of new m_ji) / n."""
        x, trees = vectors.x, part.trees.trees
        compute = ops.compute_dtype(x.dtype)
        h = torch.empty(x.shape[1], dtype=compute, device=x.device)
        state = [vectors.state[name][0] for name in part.state]
        ops.local_step_(x[0], vectors.g[0], state, [h], part.rule, part.hyper, None)
        kept = {peer: vectors.state[f"{part.messages}_{peer}"][0] for peer in _relay_peers(self.topology, self.worker)}
        neighbors = [_tree_neighbors(tree.edges, self.worker) for tree in trees]
        lanes = [slice(k, None, len(trees)) for k in range(len(trees))]
        outgoing, incoming = {}, {}
        for q, peer in enumerate(kept):
            mine = [lane for lane, near in zip(lanes, neighbors, strict=True) if peer in near]
            size = sum(h[lane].numel() for lane in mine) * compute.itemsize
            outgoing[peer], incoming[peer] = (self.message(x.device, size, at.first_bucket, k) for k in (~q, q))
            for target, lane in zip(_cut(outgoing[peer], [h[lane] for lane in mine], compute), mine, strict=True):
                target.copy_(h[lane])
                for other in neighbors[lanes.index(lane)]:
                    if other != peer:
                        target.add_(kept[other][lane])
        self.wait(self.post(list(outgoing.items()), list(incoming.items()), at, at.first_bucket))
        mixed = torch.empty_like(h)
        for k, (lane, near) in enumerate(zip(lanes, neighbors, strict=True)):
            torch.mul(h[lane], float(part.counts[k, self.worker]), out=mixed[lane])
            for peer in near:
                mine = [other for other, some in zip(lanes, neighbors, strict=True) if peer in some]
                pieces = _cut(incoming[peer], [h[other] for other in mine], compute)
                kept[peer][lane] = pieces[mine.index(lane)]
                mixed[lane].add_(kept[peer][lane])
        # Divided in the compute type, as the kernel does.
        mixed.mul_(torch.ones((), dtype=compute) / self.topology.num_workers)
        ops.merge_(x[0], vectors.g[0], state, [mixed], [1.0], False, part.rule, part.hyper, None)

    def count(self, part: Pass | RelayPass, vectors: Vectors) -> None:
        """Count the bytes of one pass."""
        segments, n = vectors.layout.segments, self.topology.num_workers
        itemsize = ops.compute_dtype(vectors.x.dtype).itemsize
        numbers = sum(length for _, length in segments)
        if isinstance(part, RelayPass):
            sizes = lane_sizes(segments, len(part.trees.trees))
            near = [len(_tree_neighbors(tree.edges, self.worker)) for tree in part.trees.trees]
            sent = received = itemsize * sum(size * count for size, count in zip(sizes, near, strict=True))
        else:
            vector = itemsize * ops.rules("cuda" if vectors.x.is_cuda else "cpu")[part.rule].messages
            if part.exact_mean:  # the shares of the others to them, and the sum of the own share to all
                own = share_size(segments, self._own_shares(part, vectors.x))
                sent = received = vector * (numbers + (n - 2) * own) if n > 1 else 0
            else:
                size = numbers * vector if part.message_bytes is None else part.message_bytes
                if self._written is not None:
                    each = sum(self._written.message_bytes(length, itemsize) for _, length in segments)
                    size = each * (vector // itemsize)
                plan = self.plan(part.mixing)
                sent, received = len(plan.receivers) * size, len(plan.senders) * size
        self.bytes_sent += sent
        self.bytes_received += received

    def _own_shares(self, part: Pass, x: Tensor) -> tuple[tuple[int, int], ...]:
        found = []
        for place in self._buckets(x, part):
            share = _shares(place.stop - place.start, self.topology.num_workers)[self.worker]
            found.append((place.start + share.start, place.start + share.stop))
        return tuple(found)

    # Messages ---------------------------------------------------------------------------------------------------------

    def post(
        self,
        sends: Sequence[tuple[int, Message]],
        receives: Sequence[tuple[int, Message]],
        at: Place,
        bucket: int,
    ) -> list[Pending]:
        """Start messages of a pass, that are exchanged this once."""
        if self.exchange is None:
            raise RuntimeError("a worker without others has nobody to send to")
        return self.exchange.post(sends, receives, Stamp(at.step, at.part, bucket))

    def wait(self, pending: Sequence[Pending]) -> None:
        """Wait for messages, and check those that have come."""
        if self.exchange is not None:
            self.exchange.wait(pending)

    def message(self, device: torch.device, size: int, bucket: int, slot: int | None) -> Message:
        """A buffer to be used again in every step; slots tell apart those that are in use at the same time."""
        key = (device, size, bucket, slot)
        if key not in self._messages:
            self._messages[key] = Message(size, device)
        return self._messages[key]

    def _buckets(self, x: Tensor, part: Pass | None = None) -> list[slice]:
        """Those of a pass, which are no more than those of none."""
        size, width = x.shape[1], self._bucket_bytes // ops.compute_dtype(x.dtype).itemsize
        sums = part is not None and part.block_sums is not None  # in whole blocks
        unit = ops.REDUCE_BLOCK if sums or width >= ops.REDUCE_BLOCK else ALIGNMENT
        width = max(unit, width // unit * unit)
        return [slice(begin, min(begin + width, size)) for begin in range(0, size, width)]

    def plan(self, mixing: Mixing) -> GossipPlan:
        """What this worker sends, takes and weighs with a mixing matrix."""
        found = self._plans.get(id(mixing))
        if found is None:
            columns, weights = mixing.row(self.worker)
            if not len(columns):
                raise ValueError(f"worker {self.worker} receives nothing, not even from itself: its row of W is empty")
            to, frm = graphs.off_diagonal_edges(mixing)
            plan = GossipPlan(
                [peer for peer in columns.tolist() if peer != self.worker],
                sorted(to[frm == self.worker].tolist()),
                columns.tolist(),
                weights.tolist(),
                mixing.form == "mean",
            )
            found = self._plans[id(mixing)] = (mixing, plan)  # the matrix is kept, so that its id stays its own
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return found[1]


class Turn:
    """One step of one worker's vectors: the passes of an algorithm, one after the other.

    Args: as in :meth:`WorkerEngine.turn`.
    """

    def __init__(
        self,
        engine: WorkerEngine,
        algorithm: Algorithm,
        vectors: Vectors,
        lr: float,
        clock: Clock,
        gossip: bool,
        number: int,
        first_bucket: int,
    ) -> None:
        self._engine, self._algorithm, self._vectors, self._clock = engine, algorithm, vectors, clock
        self._gossip, self._lr = gossip, lr
        self._place = Place(number, 0, first_bucket)
        self._early: Round | None = None

    def only_pass(self) -> Pass | None:
        """The pass with neighbours that is the whole step, if it is known before the gradients are."""
        parts = plan_ahead(self._algorithm, self._step())
        if parts is None or len(parts) != 1 or isinstance(parts[0], RelayPass) or parts[0].exact_mean:
            return None
        return parts[0]

    def begin_early(self, part: Pass) -> Round | None:
        """The round of :meth:`only_pass`, whose buckets may be sent before :meth:`finish`; None if it sends nothing."""
        self._early = self._engine.round(part, self._vectors, self._place)
        return self._early

    def finish(self) -> None:
        """Take the step, or what is left of it.

        Raises:
            ValueError: if the algorithm can't do without the others for a step.
        """
        step = self._step()
        for part in self._algorithm.passes(step):
            if not self._gossip and (isinstance(part, RelayPass) or part.exact_mean):
                raise ValueError(
                    f"{self._algorithm.name} needs the other workers in every step; it can't leave out gossip"
                )
            if self._early is not None:
                self._early.finish()
            else:
                self._engine.run(part, self._vectors, self._place)
            self._engine.count(part, self._vectors)
            self._place = self._place._replace(part=self._place.part + 1)
        clock = self._clock
        clock.scalars = step.scalars
        clock.previous_lr = self._lr or clock.previous_lr
        clock.number += 1
        clock.round += self._gossip

    def _step(self) -> Step:
        clock, vectors, engine = self._clock, self._vectors, self._engine
        return Step(
            clock.number,
            self._lr,
            self._lr if clock.previous_lr is None else clock.previous_lr,
            engine.topology if self._gossip else _alone(engine.topology.num_workers),
            vectors.x,
            vectors.g,
            vectors.state,
            dict(clock.scalars),
            vectors.layout,
            engine.worker,
            clock.round,
        )


def _alone(n: int) -> Topology:
    if n not in _ALONE:
        _ALONE[n] = topologies.from_matrix(torch.eye(n, dtype=torch.float64).numpy(), allow_disconnected=True)
    return _ALONE[n]


_ALONE: dict[int, Topology] = {}


def _shares(width: int, n: int) -> list[slice]:
    """Cut ``width`` coordinates into one share for each worker, as even as alignment allows."""
    share = -(-width // (n * ALIGNMENT)) * ALIGNMENT
    return [slice(min(i * share, width), min((i + 1) * share, width)) for i in range(n)]


def _length(piece: slice) -> int:
    return int(piece.stop - piece.start)


def _mean_into(out: Tensor, vectors: Sequence[Tensor]) -> None:
    """The mean, summed in order and with the rounding of the kernels: DSGD's merge takes it over as it is."""
    if out.numel():
        ops.merge_(out, torch.empty_like(out), [], list(vectors), [1.0] * len(vectors), True, "dsgd", [0.0, 0.0])


def _cut(message: Message, like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return list(torch.split(message.payload.view(dtype), [piece.numel() for piece in like]))
