"""CrossWorker: one worker of an algorithm that takes gradients elsewhere, in a process of its own.

A step begins with what the neighbours have sent at the end of the one before: their parameters, at which the worker
takes gradients of its own data. Those may go back to the neighbours as answers, which are summed in the order in which
:class:`qgm_ext.cross_optimizer.CrossOptimizer` sums them. Then parameters are mixed and sent again. Bits are those of
the worker's row there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qgm_ext import compressors, ops
from qgm_ext.algorithms import Pass
from qgm_ext.algorithms.cross_gradient import CrossGradientAlgorithm
from qgm_ext.compressors import Compressed, Compressor
from qgm_ext.cross_gradients import Answers, CrossSteps
from qgm_ext.distributed.agreement import digest, gather_json
from qgm_ext.distributed.engine import Clock, Place, Vectors, WorkerEngine
from qgm_ext.distributed.exchange import Message
from qgm_ext.distributed.gossip import GossipPlan
from qgm_ext.mixing import Mixing

__all__ = ["CrossWorker"]

_FIRST, _ANSWERS, _CHANGES, _NEXT = range(4)  # kinds of messages: parameters of this step, ..., and of the next


class CrossWorker(CrossSteps):
    """The steps of one worker.

    Args:
        engine: its topology, number and messages.
    """

    def __init__(self, engine: WorkerEngine) -> None:
        super().__init__()
        self.topology = engine.topology
        self.workers = range(engine.worker, engine.worker + 1)
        self._engine = engine
        self._received: dict[int, Tensor] | None = None  # by neighbour of this step its sent_params; None: not yet
        self._copies: dict[str, dict[int, Tensor]] = {}  # of a state by name, that of each neighbour
        self._kind: tuple[object, ...] | None = None  # what received vectors must be like
        self._sent_now = [0, 0]

    def begin(self, algorithm: CrossGradientAlgorithm, vectors: Vectors, lr: float, clock: Clock, number: int) -> None:
        """Turn to the next step; :meth:`gradients` and :meth:`finish`, or :meth:`abandon`, follow.

        Args: as in :meth:`WorkerEngine.turn`.
        """
        self._algorithm, self._vectors, self._lr, self._clock = algorithm, vectors, lr, clock
        self.x, self.layout, self.compute = vectors.x, vectors.layout, ops.compute_dtype(vectors.x.dtype)
        kind = (self.layout.shapes, self.compute, self.x.device)
        if kind != self._kind:  # then all workers have changed it, and ask each other again
            self._kind, self._received, self._copies = kind, None, {}
        self.num_steps = clock.number
        self._place = Place(number, 0, 0)
        self._sent_now = [0, 0]

    def finish(self) -> None:
        """Take the step."""
        self.advance(self._vectors.g, self._lr)
        self._engine.bytes_sent += self._sent_now[0]
        self._engine.bytes_received += self._sent_now[1]
        clock = self._clock
        clock.previous_lr = self._lr or clock.previous_lr
        clock.number += 1
        clock.round += 1

    def abandon(self) -> None:
        super().abandon()
        if self.num_steps == 0:
            self._received = None

    @property
    def method(self) -> CrossGradientAlgorithm:
        return self._algorithm

    @property
    def state(self) -> Mapping[str, Tensor]:
        return self._vectors.state

    def get(self, name: str) -> Tensor:
        if name in self.state:
            return self.state[name]
        rows = [self.state[f"{name}_{peer}"] for peer in self._plan(0).senders]
        return torch.cat(rows) if rows else self.x.new_zeros(0, self.x.shape[1], dtype=self.compute)

    def put(self, name: str, values: Tensor) -> None:
        if name in self.state:
            self.state[name].copy_(values)
            return
        for peer, row in zip(self._plan(0).senders, values, strict=True):
            self.state[f"{name}_{peer}"].copy_(row)

    def start_alike(self) -> bool:
        exchange = self._engine.exchange
        if exchange is None:
            return True
        every = gather_json(exchange.group, digest([self.x]), exchange.device)
        return all(one == every[0] for one in every)

    def send(self, step: int, message_bytes: int) -> None:
        plan = self._plan(step)
        self._sent_now[0] += len(plan.receivers) * message_bytes
        self._sent_now[1] += len(plan.senders) * message_bytes

    def gossip_rule(self, rule: str, hyper: list[float], g: Tensor, state: Sequence[str]) -> None:
        part = Pass(rule, hyper, tuple(state), self.topology.mixing(self.num_steps))
        self._engine.run(part, self._vectors, self._place)  # whose gradient is g

    def mix_params(self, gamma: float, step: int) -> None:
        mixing = self.topology.mixing(step)
        self._received = self._swap(self.state["sent_params"][0], mixing, _NEXT)
        own = self.state["sent_params"][0]
        self._merge(self.x[0], own, self._received, self._engine.plan(mixing.relaxed(gamma)))

    def sent_over(self, links: Sequence[int]) -> Tensor:
        if self._received is None:  # in the first step, also of a run that was resumed
            mixing = self.topology.mixing(self.num_steps)
            self._received = self._swap(self.state["sent_params"][0], mixing, _FIRST)
        senders = self.links(self.num_steps).senders
        return torch.stack([self._received[senders[link]] for link in links])

    def mix_changes(
        self, name: str, change: Compressed, compressor: Compressor, streams: Sequence[int], seed: int
    ) -> Tensor:
        plan, state = self._plan(self.num_steps), self.state[name]
        if name not in self._copies:
            if self.num_steps == 0:  # all start from the same
                self._copies[name] = {peer: state[0].clone() for peer in plan.senders}
            else:
                came = self._swap(state[0], self.topology.mixing(self.num_steps), _FIRST)
                self._copies[name] = {peer: row.clone() for peer, row in came.items()}
        assert change.data is not None
        size = self.packed_bytes(compressor)
        outgoing = self.message(size, _CHANGES, -1)
        outgoing.payload.copy_(change.data[0])
        incoming = {peer: self.message(size, _CHANGES, k) for k, peer in enumerate(plan.senders)}
        self.exchange([(peer, outgoing) for peer in plan.receivers], list(incoming.items()), _CHANGES)
        copies = self._copies[name]
        for peer, message in incoming.items():
            row = torch.zeros_like(state[0])
            self.unpack(compressor, message.payload, row, peer, seed)
            copies[peer] += row
        state += change.values
        mixed = torch.empty_like(state)
        self._merge(mixed[0], state[0], copies, plan)
        return mixed

    def compress(self, compressor: Compressor, vectors: Tensor, streams: Sequence[int], seed: int) -> Compressed:
        """As in the class; what is sent comes with it, and the values are what is unpacked from that."""
        out, data = torch.zeros_like(vectors), []
        for vector, row, stream in zip(vectors, out, streams, strict=True):
            source = self._source(compressor, stream, seed)
            pieces = [view.flatten().cpu() for view in self.layout.views(vector) if view.numel()]
            packed = torch.cat([compressor.pack(piece, source) for piece in pieces])
            self.unpack(compressor, packed, row, stream, seed)
            data.append(packed)
        return Compressed(out, data)

    def answers(self, own: Tensor, compressor: Compressor | None = None, seed: int = 0) -> Answers:
        return _Sent(self, own, compressor, seed)

    # Messages ---------------------------------------------------------------------------------------------------------

    def packed_bytes(self, compressor: Compressor) -> int:
        """Size of what :meth:`compress` makes of a row."""
        return sum(
            compressor.packed_bytes(length, self.compute.itemsize) for _, length in self.layout.segments if length
        )

    def unpack(self, compressor: Compressor, packed: Tensor, out: Tensor, stream: int, seed: int) -> None:
        """Read a compressed row of that stream into [D], whose gaps stay."""
        source, packed, begin = self._source(compressor, stream, seed), packed.cpu(), 0
        for view in self.layout.views(out):
            if not view.numel():
                continue
            size = compressor.packed_bytes(view.numel(), self.compute.itemsize)
            piece = torch.empty(view.numel(), dtype=out.dtype)
            compressor.unpack(packed[begin : begin + size], piece, source)
            view.copy_(piece.view(view.shape))
            begin += size

    def message(self, size: int, kind: int, slot: int) -> Message:
        """A buffer to be used again in every step."""
        return self._engine.message(self.x.device, size, kind, slot)

    def exchange(
        self, sends: Sequence[tuple[int, Message]], receives: Sequence[tuple[int, Message]], kind: int
    ) -> None:
        """Send and receive, and wait for both."""
        if sends or receives:
            self._engine.wait(self._engine.post(sends, receives, self._place._replace(part=kind), kind))

    def _source(self, compressor: Compressor, stream: int, seed: int) -> torch.Generator | None:
        return compressors.generator(seed, self.num_steps, stream) if compressor.is_random else None

    def _plan(self, step: int) -> GossipPlan:
        return self._engine.plan(self.topology.mixing(step))

    def _swap(self, row: Tensor, mixing: Mixing, kind: int) -> dict[int, Tensor]:
        """Send a row to the neighbours; theirs, which stay until the next time."""
        plan, size = self._engine.plan(mixing), row.numel() * self.compute.itemsize
        outgoing = self.message(size, kind, -1)
        outgoing.payload.view(self.compute).copy_(row)
        incoming = {peer: self.message(size, kind, k) for k, peer in enumerate(plan.senders)}
        self.exchange([(peer, outgoing) for peer in plan.receivers], list(incoming.items()), kind)
        return {peer: message.payload.view(self.compute) for peer, message in incoming.items()}

    def _merge(self, out: Tensor, own: Tensor, others: Mapping[int, Tensor], plan: GossipPlan) -> None:
        """out <- the sum of rows, weighted as the plan says."""
        rows = [others.get(peer, own) for peer in plan.terms]
        # The rule of DSGD without a gradient step is gossip averaging.
        ops.merge_(out, torch.zeros_like(out), [], rows, plan.weights, plan.mean, "dsgd", [0.0, 0.0], None)


class _Sent(Answers):
    """Answers to workers in other processes."""

    def __init__(self, opt: CrossWorker, own: Tensor, compressor: Compressor | None, seed: int) -> None:
        self._opt, self._compressor, self._seed = opt, compressor, seed
        self._total = own.clone()
        self._links = opt.links(opt.num_steps)
        self._given: dict[int, Tensor] = {}  # by peer

    def add(self, links: Sequence[int], values: Compressed) -> None:
        rows = list(values.values) if values.data is None else values.data
        for link, row in zip(links, rows, strict=True):
            self._given[self._links.senders[link]] = row

    def total(self) -> Tensor:
        opt, compressor, like = self._opt, self._compressor, self._total[0]
        size = like.numel() * like.element_size() if compressor is None else opt.packed_bytes(compressor)
        sends = []
        for k, (peer, row) in enumerate(sorted(self._given.items())):
            outgoing = opt.message(size, _ANSWERS, ~k)
            outgoing.payload.copy_(row.contiguous().view(-1).view(torch.uint8))
            sends.append((peer, outgoing))
        answering = self._links.answers_to(opt.workers.start)
        incoming = {link: opt.message(size, _ANSWERS, k) for k, link in enumerate(sorted(answering))}
        receives = [(self._links.receivers[link], message) for link, message in incoming.items()]
        opt.exchange(sends, receives, _ANSWERS)
        for link in answering:
            payload = incoming[link].payload
            if compressor is None:
                self._total[0] += payload.view(like.dtype).view(like.shape)
            else:
                row = torch.zeros_like(like)
                opt.unpack(compressor, payload, row, 2 * link, self._seed)
                self._total[0] += row
        return self._total
