"""How the Simulator runs algorithms that take gradients elsewhere: at neighbours' models, at perturbed points.

Holds what such an algorithm may ask for (:class:`Probes`: gradients and features of a worker's own batch at other
parameters), who can ask whom (:class:`Links`), the optimizer that steps them and counts what is sent
(:class:`CrossOptimizer`). The algorithms themselves are in :mod:`qgm_ext.algorithms`, their contract in
:mod:`qgm_ext.algorithms.cross_gradient`.

Other parameters are put into the workers' own modules for the moment, so any engine computes these gradients, and no
second set of modules is kept. Buffers (batch-norm statistics) are the worker's own: they take part, and only the
gradient at the worker's own parameters changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qgm_ext import algorithms, compressors, graphs, ops
from qgm_ext.algorithms import Algorithm, check_number
from qgm_ext.algorithms.cross_gradient import CrossGradientAlgorithm
from qgm_ext.compressors import Compressor
from qgm_ext.engines import BufferSnapshot, Closure, Engine
from qgm_ext.evaluate import evaluation_mode
from qgm_ext.flat import FlatLayout
from qgm_ext.mixing import Mixing
from qgm_ext.models.features import Features, Recorder
from qgm_ext.stacked import OnNonfinite, StackedOptimizer
from qgm_ext.topology import Topology

__all__ = ["CrossOptimizer", "Links", "Probes", "make_optimizer"]

_NORM_EPS = 1e-12  # a zero gradient gives no direction to go up in, and then the point stays


class Links:
    """Who receives whose parameters in one step, each ordered pair one link, numbered by receiver and then sender.

    Args:
        mixing: the mixing matrix of the step.

    Attributes:
        receivers, senders: worker numbers of each link.
        rounds: link numbers such that each worker receives at most once in a round, its k-th neighbour in round k.
        degrees: how many neighbours each worker has.

    Example:
        >>> from qgm_ext import topology
        >>> links = Links(topology.chain(3).mixing())
        >>> links.receivers, links.senders, links.rounds
        ([0, 1, 1, 2], [1, 0, 2, 1], [[0, 1, 3], [2]])
    """

    def __init__(self, mixing: Mixing) -> None:
        to, frm = graphs.off_diagonal_edges(mixing)
        self.receivers: list[int] = to.tolist()
        self.senders: list[int] = frm.tolist()
        self.degrees = [0] * mixing.num_workers
        self.rounds: list[list[int]] = []
        for link, receiver in enumerate(self.receivers):
            k = self.degrees[receiver]
            self.degrees[receiver] += 1
            if k == len(self.rounds):
                self.rounds.append([])
            self.rounds[k].append(link)

    def __len__(self) -> int:
        return len(self.receivers)


class CrossOptimizer(StackedOptimizer):
    """A StackedOptimizer of an algorithm that needs the models; made and driven by the Simulator.

    Args:
        layout: where the parameter tensors lie in a row of x.
        x, topology, algorithm, on_nonfinite: as in :class:`StackedOptimizer`.
    """

    _takes_models = True

    def __init__(
        self,
        x: Tensor,
        topology: Topology,
        algorithm: CrossGradientAlgorithm,
        *,
        layout: FlatLayout,
        on_nonfinite: OnNonfinite = "ignore",
        **hyper: Any,
    ) -> None:
        super().__init__(x, topology, algorithm, layout=layout, on_nonfinite=on_nonfinite, **hyper)
        self.layout = layout
        self.compute = ops.compute_dtype(x.dtype)
        self._method = algorithm
        self._sent_now = 0
        self._point: Tensor | None = None  # x before the step, while it is not taken
        self._pending: dict[str, Tensor] = {}
        self._alone = Mixing.from_matrix(np.eye(len(x)))
        self._links: tuple[Mixing, Links] | None = None

    def links(self, step: int) -> Links:
        """Who receives from whom in a step."""
        mixing = self.topology.mixing(step)
        if self._links is None or self._links[0] is not mixing:
            self._links = (mixing, Links(mixing))
        return self._links[1]

    @property
    def vector_bytes(self) -> int:
        """Size of a message that holds one number for each parameter."""
        return self._num_sent * self.compute.itemsize

    def compressed_bytes(self, compressor: Compressor) -> int:
        """Size of such a message when each parameter tensor is compressed."""
        return sum(compressor.message_bytes(shape.numel(), self.compute.itemsize) for shape in self.layout.shapes)

    def send(self, step: int, message_bytes: int) -> None:
        """Count one message over each link of a step."""
        self._sent_now += len(self.links(step)) * message_bytes

    def gradients(
        self, engine: Engine, g: Tensor, closure: Closure, batches: Sequence[Any], stacked: Any, lr: float
    ) -> Tensor:
        """Compute what the step takes for gradients.

        Args:
            engine: computes gradients at x into g.
            g: [n, D], like x.
            closure, batches, stacked: as in :meth:`qgm_ext.engines.Engine.gradients`.
            lr: step size of the step.

        Returns:
            The losses at x, [n].
        """
        check_number("lr", lr, low=0.0)
        self._point = self.x.clone()
        self._sent_now, self._pending = 0, {}
        if self.num_steps == 0:
            with torch.no_grad():
                self._method.start(self, lr)
        probes = Probes(self, engine, g, closure, batches, stacked)
        try:
            self._method.gradients(probes)
        finally:
            probes.close()
        return probes.losses

    def pending(self, name: str) -> Tensor:
        """A state vector to be changed during :meth:`gradients`; it takes effect when, and if, the step is taken."""
        if name not in self._pending:
            self._pending[name] = self._state[name].clone()
        return self._pending[name]

    def abandon(self) -> None:
        """Put the parameters back to what they were before a step that is not taken."""
        if self._point is None:
            return
        self.x.copy_(self._point)
        self._point, self._pending = None, {}
        if self.num_steps == 0:  # what the algorithm's start has set
            for vector in self._state.values():
                vector.zero_()

    def _advance(self, g: Tensor, eta: float) -> None:
        for name, values in self._pending.items():
            self._state[name].copy_(values)
        self._method.advance(self, g, eta)
        self._point, self._pending = None, {}
        self.bytes_sent_per_step = self._sent_now
        self.bytes_sent += self._sent_now

    def run_rule(
        self, rule: str, hyper: list[float], g: Tensor, state: list[Tensor], mixing: Mixing | None = None
    ) -> None:
        """One fused pass over x with a compiled rule; without ``mixing`` nothing is averaged."""
        mixing = self._alone if mixing is None else mixing
        tensors = mixing.tensors(self.x.device, self.compute)
        ops.gossip_step_(self.x, g, state, tensors, mixing.form, rule, hyper)

    def mix(self, vectors: Tensor, gamma: float, step: int) -> None:
        """vectors <- vectors + gamma (W - I) vectors, in place, [n, D]."""
        mixing = self.topology.mixing(step).relaxed(gamma)
        tensors = mixing.tensors(vectors.device, self.compute)
        # The rule of DSGD without a gradient step is gossip averaging.
        ops.gossip_step_(vectors, torch.zeros_like(vectors), [], tensors, mixing.form, "dsgd", [0.0, 0.0])

    def compress(self, compressor: Compressor, vectors: Tensor, streams: Sequence[int], seed: int) -> Tensor:
        """Compress each parameter tensor of each row; the row's random numbers depend on seed, step and its stream."""
        sources = []
        if compressor.is_random:
            sources = [compressors.generator(seed, self.num_steps, stream) for stream in streams]
        out = torch.zeros_like(vectors)
        for given, packed in zip(self.layout.views(vectors), self.layout.views(out), strict=True):
            if given.numel():
                packed.copy_(compressor(given.flatten(1), sources).view_as(packed))
        return out


class Probes:
    """What the workers can compute in one step: gradients and features of their own batches, wherever.

    Attributes:
        opt: the optimizer: state, topology, compression, counting of bytes.
        g: where gradients are written, [n, D]; every call overwrites it.
        links: who receives from whom in this step.
        losses: of the gradients at the workers' own parameters, [n]; set by :meth:`own_gradients`.
        batches: one for each worker.
    """

    losses: Tensor

    def __init__(
        self, opt: CrossOptimizer, engine: Engine, g: Tensor, closure: Closure, batches: Sequence[Any], stacked: Any
    ) -> None:
        self.opt = opt
        self.g = g
        self.links = opt.links(opt.num_steps)
        self.batches = batches
        self._engine, self._closure, self._stacked = engine, closure, stacked
        self._models = engine.workers.models
        self._has_buffers = any(module._buffers for module in self._models[0].modules())
        self._own = opt.x.clone()

    @property
    def num_workers(self) -> int:
        """n."""
        return len(self._models)

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

    def cross_gradients(self, models: Tensor, links: Sequence[int], rho: float = 0.0) -> Tensor:
        r"""The gradients of each link's receiver, on its own batch, at its sender's parameters.

        With rho > 0 they are taken at :math:`p + \rho\, g / (\|g\|_2 + 10^{-12})`, where g is the gradient at p on the
        same batch and the norm is over the whole model: two evaluations.

        Args:
            models: parameters as the neighbours have received them, [n, D].
            links: numbers of links, such that no receiver is there twice.

        Returns:
            One row for each link, [links, D], in the dtype of arithmetic; new memory.
        """
        active = self._put(models, links)
        points = self.opt.x.clone()
        with self._buffers_kept():
            self._run(self._closure, self.batches, self._stacked, active)
        if rho > 0:
            self._climb(points, rho, active)
        return self.g[active].to(self.opt.compute)

    def features(self, models: Tensor | None, links: Sequence[int], layer: str) -> list[Features]:
        """What the model of each link's sender makes of the receiver's batch, in evaluation mode and without gradient.

        Args:
            models: parameters as the neighbours have received them, [n, D]; None: ``links`` are workers with their own.
            links: numbers of links, such that no receiver is there twice.
            layer: name of the submodule whose output is asked for.
        """
        if models is None:
            self.opt.x.copy_(self._own)
            active = list(links)
        else:
            active = self._put(models, links)
        found = []
        with torch.no_grad(), evaluation_mode([self._models[worker] for worker in active]), self._buffers_kept():
            for worker in active:
                model = self._models[worker]
                with Recorder(model, layer) as recorder:
                    self._closure(model, self.batches[worker])
                found.append(recorder.result())
        return found

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

    def _put(self, models: Tensor, links: Sequence[int]) -> list[int]:
        """Give each receiver the sender's parameters; the receivers."""
        active = [self.links.receivers[link] for link in links]
        self.opt.x[active] = models[[self.links.senders[link] for link in links]].to(self.opt.x.dtype)
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


def make_optimizer(
    x: Tensor,
    topology: Topology,
    algorithm: str | Algorithm,
    *,
    model: nn.Module,
    layout: FlatLayout,
    on_nonfinite: OnNonfinite,
    message: str,
    **hyper: Any,
) -> StackedOptimizer:
    """The optimizer for n models: a CrossOptimizer if the algorithm needs them, else a StackedOptimizer.

    Args:
        model: one of the models. The others are arguments of those classes.
    """
    if isinstance(algorithm, str):
        algorithm, hyper = algorithms.get(algorithm, **hyper), {}
    cls: type[StackedOptimizer] = StackedOptimizer
    if isinstance(algorithm, CrossGradientAlgorithm):
        algorithm.check_model(model)
        cls = CrossOptimizer
    return cls(x, topology, algorithm, layout=layout, on_nonfinite=on_nonfinite, message=message, **hyper)
