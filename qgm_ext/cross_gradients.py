"""What runs algorithms that take gradients elsewhere: at neighbours' models, at perturbed points.

Holds what such an algorithm works with (:class:`CrossSteps`), what it may ask for (:class:`Probes`: gradients and
features of a worker's own batch at other parameters), and who can ask whom (:class:`Links`). All of it is the same
where all workers are rows of one matrix (:mod:`qgm_ext.cross_optimizer`) and where each is in a process of its own
(:mod:`qgm_ext.distributed.cross_worker`). The algorithms are in :mod:`qgm_ext.algorithms`, their contract in
:mod:`qgm_ext.algorithms.cross_gradient`.

Other parameters are put into the workers' own modules for the moment, so any engine computes these gradients, and no
second set of modules is kept. Buffers (batch-norm statistics) are the worker's own: they take part, and only the
gradient at the worker's own parameters changes them.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qgm_ext import compressors, graphs, ops
from qgm_ext.algorithms import check_number, identity_mixing
from qgm_ext.algorithms.cross_gradient import CrossGradientAlgorithm
from qgm_ext.compressors import Compressed, Compressor
from qgm_ext.engines import BufferSnapshot, Closure, Engine
from qgm_ext.evaluate import evaluation_mode
from qgm_ext.flat import FlatLayout
from qgm_ext.mixing import Mixing
from qgm_ext.models.features import Features, Recorder
from qgm_ext.topology import Topology

__all__ = ["Answers", "CrossSteps", "Links", "Probes"]

_NORM_EPS = 1e-12  # a zero gradient gives no direction to go up in, and then the point stays


class Links:
    """Who receives whose parameters in one step, each ordered pair one link, numbered by receiver and then sender.

    Args:
        mixing: the mixing matrix of the step.
        workers: whose rows are here; None: those of all.

    Attributes:
        receivers, senders: worker numbers of each link.
        degrees: how many neighbours each worker has.
        rounds: numbers of the links whose receivers are here, such that each worker receives at most once in a round,
            its k-th neighbour in round k.
        first: the first of these numbers.
        workers: whose rows are here.

    Example:
        >>> from qgm_ext import topology
        >>> links = Links(topology.chain(3).mixing())
        >>> links.receivers, links.senders, links.rounds
        ([0, 1, 1, 2], [1, 0, 2, 1], [[0, 1, 3], [2]])
        >>> links.answers_to(1)
        [0, 3]
    """

    def __init__(self, mixing: Mixing, workers: range | None = None) -> None:
        to, frm = graphs.off_diagonal_edges(mixing)
        self.workers = range(mixing.num_workers) if workers is None else workers
        self.receivers: list[int] = to.tolist()
        self.senders: list[int] = frm.tolist()
        self.degrees = [0] * mixing.num_workers
        self.rounds: list[list[int]] = []
        self._order: list[int] = []  # of each link, the round it would be in if all rows were here
        for link, receiver in enumerate(self.receivers):
            k = self.degrees[receiver]
            self.degrees[receiver] += 1
            self._order.append(k)
            if receiver in self.workers:
                if k == len(self.rounds):
                    self.rounds.append([])
                self.rounds[k].append(link)
        self.first = min((link for one in self.rounds for link in one), default=0)

    def __len__(self) -> int:
        return len(self.receivers)

    def rows(self, links: Sequence[int]) -> list[int]:
        """The rows of the receivers of these links."""
        return [self.receivers[link] - self.workers.start for link in links]

    def answers_to(self, worker: int) -> list[int]:
        """The links that a worker is the sender of, in the order in which their answers are summed."""
        mine = [link for link, sender in enumerate(self.senders) if sender == worker]
        return sorted(mine, key=lambda link: (self._order[link], link))


class Answers(abc.ABC):
    """What goes back over links to the senders of parameters, and is summed there."""

    @abc.abstractmethod
    def add(self, links: Sequence[int], values: Compressed) -> None:
        """Answer over some links, one row for each."""

    @abc.abstractmethod
    def total(self) -> Tensor:
        """What the workers began with and the answers to them, one after the other; after the last :meth:`add`."""


class CrossSteps(abc.ABC):
    """The workers whose rows are here, as an algorithm steps them that takes gradients elsewhere.

    Attributes:
        x: parameters, [rows, D]. state: the state vectors by name, as x or with a row for each link.
        topology: who averages with whom. layout: where the parameter tensors lie in a row.
        compute: dtype of arithmetic and state. workers: those whose rows are here. num_steps: steps taken.
    """

    x: Tensor
    topology: Topology
    layout: FlatLayout
    compute: torch.dtype
    workers: range
    num_steps: int

    def __init__(self) -> None:
        self._links: tuple[Mixing, Links] | None = None
        self._point: Tensor | None = None  # x before the step, while it is not taken
        self._pending: dict[str, Tensor] = {}

    @property
    @abc.abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """The state vectors by name."""

    @property
    @abc.abstractmethod
    def method(self) -> CrossGradientAlgorithm:
        """The algorithm."""

    def links(self, step: int) -> Links:
        """Who receives from whom in a step."""
        mixing = self.topology.mixing(step)
        if self._links is None or self._links[0] is not mixing:
            self._links = (mixing, Links(mixing, self.workers))
        return self._links[1]

    @property
    def vector_bytes(self) -> int:
        """Size of a message that holds one number for each parameter."""
        return sum(shape.numel() for shape in self.layout.shapes) * self.compute.itemsize

    def compressed_bytes(self, compressor: Compressor) -> int:
        """Size of such a message when each parameter tensor is compressed."""
        return sum(compressor.message_bytes(shape.numel(), self.compute.itemsize) for shape in self.layout.shapes)

    # A step -----------------------------------------------------------------------------------------------------------

    def gradients(
        self, engine: Engine, g: Tensor, closure: Closure, batches: Sequence[Any], stacked: Any, lr: float
    ) -> Tensor:
        """Compute what the step takes for gradients.

        Args:
            engine: computes gradients at x into g.
            g: [rows, D], like x.
            closure, batches, stacked: as in :meth:`qgm_ext.engines.Engine.gradients`.
            lr: step size of the step.

        Returns:
            The losses at x, [rows].
        """
        check_number("lr", lr, low=0.0)
        self._point, self._pending = self.x.clone(), {}
        if self.num_steps == 0:
            with torch.no_grad():
                self.method.start(self, lr)
        probes = Probes(self, engine, g, closure, batches, stacked)
        try:
            self.method.gradients(probes)
        finally:
            probes.close()
        return probes.losses

    def advance(self, g: Tensor, lr: float) -> None:
        """Take the step, with what :meth:`gradients` left in g."""
        for name, values in self._pending.items():
            self.put(name, values)
        self.method.advance(self, g, lr)
        self._point, self._pending = None, {}

    def abandon(self) -> None:
        """Put the parameters back to what they were before a step that is not taken."""
        if self._point is None:
            return
        self.x.copy_(self._point)
        self._point, self._pending = None, {}
        if self.num_steps == 0:  # what the algorithm's start has set
            for vector in self.state.values():
                vector.zero_()

    # What algorithms ask for ------------------------------------------------------------------------------------------

    def pending(self, name: str) -> Tensor:
        """A state vector to be changed during :meth:`gradients`; it takes effect when, and if, the step is taken."""
        if name not in self._pending:
            self._pending[name] = self.get(name).clone()
        return self._pending[name]

    def get(self, name: str) -> Tensor:
        """A state vector, that of links in one piece."""
        return self.state[name]

    def put(self, name: str, values: Tensor) -> None:
        """Set what :meth:`get` gives."""
        self.state[name].copy_(values)

    def run_rule(self, rule: str, hyper: list[float], g: Tensor, state: list[Tensor]) -> None:
        """One fused pass over x with a compiled rule, every worker for itself."""
        alone = identity_mixing(len(self.x))
        ops.gossip_step_(self.x, g, state, alone.tensors(self.x.device, self.compute), alone.form, rule, hyper)

    def compress(self, compressor: Compressor, vectors: Tensor, streams: Sequence[int], seed: int) -> Compressed:
        """Compress each parameter tensor of each row; the row's random numbers depend on seed, step and its stream."""
        sources = []
        if compressor.is_random:
            sources = [compressors.generator(seed, self.num_steps, stream) for stream in streams]
        out = torch.zeros_like(vectors)
        for given, packed in zip(self.layout.views(vectors), self.layout.views(out), strict=True):
            if given.numel():
                packed.copy_(compressor(given.flatten(1), sources).view_as(packed))
        return Compressed(out)

    @abc.abstractmethod
    def start_alike(self) -> bool:
        """Whether all workers have the same parameters."""

    @abc.abstractmethod
    def send(self, step: int, message_bytes: int) -> None:
        """Count one message over each link of a step."""

    @abc.abstractmethod
    def gossip_rule(self, rule: str, hyper: list[float], g: Tensor, state: Sequence[str]) -> None:
        """One fused pass over x with a compiled rule and the mixing matrix of this step."""

    @abc.abstractmethod
    def mix_params(self, gamma: float, step: int) -> None:
        """Send ``sent_params``, which x equals, to the neighbours of a step; x <- x + gamma (W - I) x, in place."""

    @abc.abstractmethod
    def sent_over(self, links: Sequence[int]) -> Tensor:
        """The ``sent_params`` that came over some links of this step, [links, D]."""

    @abc.abstractmethod
    def mix_changes(
        self, name: str, change: Compressed, compressor: Compressor, streams: Sequence[int], seed: int
    ) -> Tensor:
        """Add a change to a state of which the neighbours keep copies, and to the copies.

        Args:
            name: of the state. change: what :meth:`compress` made with the other arguments.

        Returns:
            W s, of that state s, [rows, D].
        """

    @abc.abstractmethod
    def answers(self, own: Tensor, compressor: Compressor | None = None, seed: int = 0) -> Answers:
        """Answers to the senders of parameters in this step.

        Args:
            own: what each worker's sum begins with, [rows, ...]; not changed.
            compressor, seed: with which the answers are compressed, in stream 2 l over link l; None: they are not.
        """


class Probes:
    """What the workers that are here can compute in one step: gradients and features of their own batches, wherever.

    Attributes:
        opt: state, topology, and the way to the neighbours.
        g: where gradients are written, [rows, D]; every call overwrites it.
        links: who receives from whom in this step.
        losses: of the gradients at the workers' own parameters, [rows]; set by :meth:`own_gradients`.
        batches: one for each worker that is here.
    """

    losses: Tensor

    def __init__(
        self, opt: CrossSteps, engine: Engine, g: Tensor, closure: Closure, batches: Sequence[Any], stacked: Any
    ) -> None:
        self.opt = opt
        self.g = g
        self.links = opt.links(opt.num_steps)
        self.batches = batches
        self._engine, self._closure, self._stacked = engine, closure, stacked
        self._models = engine.workers.models
        self._has_buffers = any(module._buffers for module in self._models[0].modules())
        self._own = opt.x.clone()

    def own_gradients(
        self, rho: float = 0.0, closure: Closure | None = None, batches: Sequence[Any] | None = None
    ) -> Tensor:
        """Gradients at the workers' own parameters, or by ``rho`` up the slope from there (:meth:`cross_gradients`).

        Args:
            rho: length of the way up.
            closure, batches: another loss than the user's, and what it is called with.

        Returns:
            ``g``.
        """
        if closure is None:
            self.losses = self._run(self._closure, self.batches, self._stacked, None)
        else:
            self.losses = self._run(closure, self.batches if batches is None else batches, None, None)
        if rho > 0:
            self._climb(self._own, rho, None)
        return self.g

    def cross_gradients(self, links: Sequence[int], rho: float = 0.0) -> Tensor:
        r"""The gradients of each link's receiver, on its own batch, at the parameters that its sender has sent.

        With rho > 0 they are taken at :math:`p + \rho\, g / (\|g\|_2 + 10^{-12})`, where g is the gradient at p on the
        same batch and the norm is over the whole model: two evaluations.

        Args:
            links: numbers of links, such that no receiver is there twice.

        Returns:
            One row for each link, [links, D], in the dtype of arithmetic; new memory.
        """
        active = self._put(links)
        points = self.opt.x.clone()
        with self._buffers_kept():
            self._run(self._closure, self.batches, self._stacked, active)
        if rho > 0:
            self._climb(points, rho, active)
        return self.g[active].to(self.opt.compute)

    def cross_features(self, links: Sequence[int], layer: str) -> list[Features]:
        """What the parameters that each link's sender has sent make of the receiver's batch, in evaluation mode and
        without gradient.

        Args:
            links: numbers of links, such that no receiver is there twice.
            layer: name of the submodule whose output is asked for.
        """
        return self._features(self._put(links), layer)

    def own_features(self, row: int, layer: str) -> Features:
        """The same at a worker's own parameters."""
        self.opt.x.copy_(self._own)
        return self._features([row], layer)[0]

    @property
    def model(self) -> nn.Module:
        """One of the models, for what they have in common."""
        return self._models[0]

    @property
    def closure(self) -> Closure:
        """The user's loss."""
        return self._closure

    def close(self) -> None:
        """Put the workers' own parameters back."""
        self.opt.x.copy_(self._own)

    def _features(self, rows: Sequence[int], layer: str) -> list[Features]:
        found = []
        with torch.no_grad(), evaluation_mode([self._models[row] for row in rows]), self._buffers_kept():
            for row in rows:
                model = self._models[row]
                with Recorder(model, layer) as recorder:
                    self._closure(model, self.batches[row])
                found.append(recorder.result())
        return found

    def _put(self, links: Sequence[int]) -> list[int]:
        """Give each receiver the sender's parameters; the rows of the receivers."""
        active = self.links.rows(links)
        self.opt.x[active] = self.opt.sent_over(links).to(self.opt.x.dtype)
        return active

    def _run(self, closure: Closure, batches: Sequence[Any], stacked: Any, active: Sequence[int] | None) -> Tensor:
        if active is None:
            self.opt.x.copy_(self._own)
        return self._engine.gradients(closure, batches, stacked, active)

    def _climb(self, points: Tensor, rho: float, active: Sequence[int] | None) -> None:
        """Replace the gradients at ``points`` by those at ``points`` + rho g / ||g||."""
        compute = self.opt.compute
        scale = (rho / (ops.squared_norms(self.g).sqrt() + _NORM_EPS)).to(compute)
        climbed = points.to(compute) + scale[:, None] * self.g.to(compute)
        if active is None:
            self.opt.x.copy_(climbed)
        else:
            self.opt.x[active] = climbed[active].to(self.opt.x.dtype)
        with self._buffers_kept():
            self._engine.gradients(self._closure, self.batches, self._stacked, active)

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        before = BufferSnapshot(self._models) if self._has_buffers else None
        try:
            yield
        finally:
            if before is not None:
                before.restore()
