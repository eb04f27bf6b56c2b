"""Peers: the runtime of a worker that averages with others over a process group.

Where :class:`qgm_ext.optim.runtime.OneWorker` steps runs of parameters that have a gradient, here all trainable
parameters of a group step together, whatever has a gradient, because the others count on their messages. Also the
runtime of algorithms of several passes on a single worker.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

import qgm_ext
from qgm_ext import messages, ops
from qgm_ext.algorithms import Algorithm
from qgm_ext.distributed.agreement import check_agreement, digest, gather_json
from qgm_ext.distributed.communication import Communication
from qgm_ext.distributed.cross_worker import CrossWorker
from qgm_ext.distributed.engine import Clock, Turn, Vectors, WorkerEngine, relay_state_names
from qgm_ext.distributed.exchange import Exchange
from qgm_ext.distributed.healing import HealingEngine
from qgm_ext.distributed.options import RuntimeOptions
from qgm_ext.distributed.peer_loss import meeting
from qgm_ext.distributed.stale import StaleEngine
from qgm_ext.distributed.survivors import Survivors
from qgm_ext.flat import FlatLayout
from qgm_ext.optim.flat_parameters import FlatParameters
from qgm_ext.topology import Topology

__all__ = ["Peers", "Work"]


class Work(NamedTuple):
    """The step of one flat buffer of a parameter group."""

    flat: FlatParameters
    group: dict[str, Any]
    vectors: Vectors
    algorithm: Algorithm
    lr: float
    maximize: bool
    clock: Clock
    fresh: bool


class Peers:
    """Steps flat buffers of one worker together with its neighbours.

    Args:
        topology: who averages with whom.
        group: the process group of the workers; None for the default one, or for a single process without any.
        options: of the runtime.

    Attributes:
        num_workers, worker: how many there are, and which of them this is.
        exchange: how messages travel; None without a process group.
        last_communication: in the last step.
    """

    def __init__(self, topology: Topology, group: dist.ProcessGroup | None, options: RuntimeOptions) -> None:
        self.topology = topology
        self.options = options
        self.num_workers = topology.num_workers
        running = dist.is_available() and dist.is_initialized()
        self.exchange = Exchange(group, options.timeout) if running else None
        self.worker = self.exchange.rank if self.exchange is not None else 0
        self._written = messages.make(options.message, [])
        self._engine = self._make_engine(topology, options)
        self._number = 0
        self.last_communication = self._counted = Communication()

    def _make_engine(self, topology: Topology, options: RuntimeOptions) -> WorkerEngine:
        option = options.uneven
        if option is None or self.exchange is None or self.num_workers == 1:
            return WorkerEngine(topology, self.worker, self.exchange, options.bucket_bytes, self._written)
        if self.exchange.backend != "gloo":
            raise ValueError(f"{option} needs a process group with gloo, got {self.exchange.backend}")
        if not topology.is_symmetric:
            raise ValueError(
                f"{option} needs a topology whose mixing matrices are symmetric, so that they stay doubly stochastic "
                f"without a worker, or neighbours wait for each other; those of {topology.name!r} are not"
            )
        if options.on_peer_loss == "heal":
            arguments = (topology, self.worker, self.exchange, options.bucket_bytes, self._written)
            return HealingEngine(*arguments, timeout=options.timeout)
        if topology.period != 1:
            raise ValueError(f"{option} needs a topology that stays the same in all steps, got {topology.name!r}")
        return StaleEngine(
            topology, self.worker, self.exchange, options.bucket_bytes, options.staleness, options.timeout
        )

    @property
    def communication(self) -> Communication:
        """In all steps so far."""
        engine, exchange = self._engine, self.exchange
        if exchange is None:
            return Communication()
        return Communication(
            engine.bytes_sent,
            engine.bytes_received,
            exchange.bytes_sent,
            exchange.bytes_received,
            exchange.seconds,
            engine.stale_messages,
        )

    def survivors(self) -> Survivors | None:
        """Where workers of which some may be lost meet between steps; None unless ``on_peer_loss`` is "heal"."""
        if not isinstance(self._engine, HealingEngine) or self.exchange is None:
            return None
        store = distributed_c10d._get_default_store()
        return Survivors(self._engine, store, self.worker, self.num_workers)

    @property
    def lost_workers(self) -> dict[int, int]:
        """By rank the first step without it."""
        return self._engine.lost if isinstance(self._engine, HealingEngine) else {}

    @property
    def message_ages(self) -> dict[int, tuple[int, ...]]:
        """By neighbour how often its message was 0, 1, ... steps old when it was merged."""
        engine = self._engine
        return (
            {rank: tuple(ages) for rank, ages in sorted(engine.ages.items())} if isinstance(engine, StaleEngine) else {}
        )

    def drain(self) -> None:
        """Wait until no message is under way to or from this worker."""
        if isinstance(self._engine, StaleEngine):
            self._engine.drain()

    def state_names(self, algorithm: Algorithm) -> tuple[str, ...]:
        """The state vectors of a parameter, those that belong to links with others one by one."""
        names: list[str] = []
        for name in algorithm.state_names:
            if name in algorithm.link_state_names:
                senders = self._engine.plan(self.topology.mixing(0)).senders
                names += [f"{name}_{peer}" for peer in senders]
                continue
            relayed = algorithm.state_rows(name, self.topology) != self.num_workers or name == "relay_messages"
            names += relay_state_names(name, self.topology, self.worker) if relayed else [name]
        if self._written is not None:
            names += messages.memory_names(algorithm)
        return tuple(names)

    def start(self, fields: Mapping[str, Any], algorithms: Sequence[Algorithm], params: Sequence[Tensor]) -> None:
        """Let all workers start alike: compare what they were given, and hand the parameters of worker 0 to all.

        Args:
            fields: what must be equal on all workers, by name, JSON-ready.
            algorithms: those of all groups, to be checked against the topology.
            params: all parameters.

        Raises:
            ValueError: if workers disagree, or an algorithm does not fit the topology.
            PeerLostError: if a worker is gone.
        """
        exchange = self.exchange
        rows = torch.zeros(self.num_workers, 1)
        if exchange is not None:
            for p in params:
                if p.is_cuda and exchange.backend == "gloo":
                    raise ValueError("parameters on cuda need a process group with the backend nccl, got gloo")
            about = {
                "qgm_ext": qgm_ext.__version__,
                "topology": {"name": self.topology.name, "fingerprint": self.topology.fingerprint},
                **{f"option {name}": value for name, value in dataclasses.asdict(self.options).items()},
            }
            check_agreement(exchange.group, about | dict(fields), exchange.device)
            if self.options.broadcast_parameters:
                self._broadcast(params)
            else:
                digests = gather_json(exchange.group, digest(params), exchange.device)
                # What algorithms ask of x is which rows are equal; the digests say that.
                rows = torch.tensor([[float(digests.index(digest))] for digest in digests])
        messages.make(self.options.message, algorithms)
        for algorithm in algorithms:
            algorithm.check(self.topology, rows)
            if self.options.staleness and not algorithm.can_lose_workers:
                raise ValueError(
                    f"{algorithm.name} can't use old messages: its state or its messages are sums over workers, or it "
                    f"needs those of the step itself; staleness must be 0, got {self.options.staleness}"
                )
            if self.options.on_peer_loss == "heal" and not algorithm.can_lose_workers:
                raise ValueError(
                    f"{algorithm.name} can't lose workers: its state or its messages are sums over workers, or it "
                    "needs all of them; on_peer_loss must be 'raise', got 'heal'"
                )
            if self.options.gossip_every > 1 and not algorithm.can_skip_gossip:
                raise ValueError(
                    f"{algorithm.name} needs the other workers in every step, so gossip_every must be 1, "
                    f"got {self.options.gossip_every}"
                )

    def _broadcast(self, params: Sequence[Tensor]) -> None:
        exchange = self.exchange
        if exchange is None or exchange.size == 1:
            return
        source = exchange.global_rank(0)
        with torch.no_grad(), meeting(exchange.group):
            for p in params:
                if p.numel() == 0:
                    continue
                # As bytes: not every backend knows every dtype.
                value = p.detach().contiguous().clone().view(-1).view(torch.uint8).to(exchange.device)
                dist.broadcast(value, source, group=exchange.group)
                p.copy_(value.to(p.device).view(p.dtype).view(p.shape))

    def has_only_pass(self, algorithm: Algorithm) -> bool:
        """Whether a usual step (not the first) is one pass with neighbours, known before the gradients are."""
        x = torch.zeros(1, 0)  # the passes of a step don't depend on how many parameters there are
        vectors = Vectors(x, x, dict.fromkeys(self.state_names(algorithm), x), FlatLayout([]))
        clock = Clock(1, 1, algorithm.lr, algorithm.initial_scalars(self.num_workers))
        return self._engine.turn(algorithm, vectors, algorithm.lr, clock).only_pass() is not None

    def turns(self, works: Sequence[Work], gossip: bool) -> list[Turn]:
        """The next step of all buffers, one turn for each."""
        found, bucket = [], 0
        for work in works:
            due = (work.clock.number + 1) % self.options.gossip_every == 0
            numbers = (self._number, bucket)
            found.append(self._engine.turn(work.algorithm, work.vectors, work.lr, work.clock, gossip and due, *numbers))
            bucket += self._engine.num_buckets(work.vectors)
        return found

    def step(self, works: Sequence[Work], gossip: bool) -> None:
        """One step of all buffers; without ``gossip`` a local one."""
        for work in works:
            if work.fresh:
                self._engine.start_state(work.algorithm, work.vectors)
                work.clock.scalars = work.algorithm.initial_scalars(self.num_workers)
        self.finish(self.turns(works, gossip))

    @property
    def number(self) -> int:
        """Of the next step."""
        return self._number

    def cross_worker(self) -> CrossWorker:
        """The steps of algorithms that take gradients elsewhere."""
        return CrossWorker(self._engine)

    def finish(self, turns: Sequence[Turn | CrossWorker]) -> None:
        """Take what is left of a step."""
        for turn in turns:
            turn.finish()
        self._number += 1
        self.last_communication = self.communication - self._counted
        self._counted = self.communication

    def clip(self, works: Sequence[Work]) -> None:
        """Scale this worker's gradient, over all buffers, to the norm that the options allow."""
        if self.options.clip_grad_norm is None or not works:
            return
        squares = torch.stack([ops.squared_norms(work.vectors.g)[0] for work in works])
        total = squares[0]
        for square in squares[1:]:
            total = total + square
        factor = float((self.options.clip_grad_norm / (total.sqrt() + 1e-6)).clamp(max=1.0))
        if not factor >= 1.0:  # NaN scales too
            for work in works:
                work.vectors.g.mul_(factor)
                if math.isnan(factor):
                    work.vectors.layout.clear_gaps(work.vectors.g)

    def nonfinite(self, gradients: Sequence[Tensor]) -> list[int]:
        """The workers whose gradients hold an infinity or NaN, the same list on every worker; a collective."""
        finite = all(bool(ops.rows_are_finite(g).all()) for g in gradients)
        if self.exchange is None:
            return [] if finite else [0]
        mine = torch.tensor([int(not finite)], dtype=torch.int64, device=self.exchange.device)
        flags = [torch.empty_like(mine) for _ in range(self.num_workers)]
        with meeting(self.exchange.group):
            self.exchange.wait_together(dist.all_gather(flags, mine, group=self.exchange.group, async_op=True))
        return [rank for rank, flag in enumerate(flags) if int(flag)]
