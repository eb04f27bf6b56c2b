"""CrossOptimizer: the optimizer of n workers on one device for algorithms that take gradients elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgm_ext import algorithms, ops
from qgm_ext.algorithms import Algorithm
from qgm_ext.algorithms.cross_gradient import CrossGradientAlgorithm
from qgm_ext.compressors import Compressed, Compressor
from qgm_ext.cross_gradients import Answers, CrossSteps, Links
from qgm_ext.engines import Closure, Engine
from qgm_ext.flat import FlatLayout
from qgm_ext.mixing import Mixing
from qgm_ext.stacked import OnNonfinite, StackedOptimizer
from qgm_ext.topology import Topology

__all__ = ["CrossOptimizer", "make_optimizer"]


class CrossOptimizer(StackedOptimizer, CrossSteps):
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
        StackedOptimizer.__init__(self, x, topology, algorithm, layout=layout, on_nonfinite=on_nonfinite, **hyper)
        CrossSteps.__init__(self)
        self.layout = layout
        self.compute = ops.compute_dtype(x.dtype)
        self.workers = range(len(x))
        self._method = algorithm
        self._sent_now = 0

    @property
    def method(self) -> CrossGradientAlgorithm:
        return self._method

    def gradients(
        self, engine: Engine, g: Tensor, closure: Closure, batches: Sequence[Any], stacked: Any, lr: float
    ) -> Tensor:
        self._sent_now = 0
        return super().gradients(engine, g, closure, batches, stacked, lr)

    def _advance(self, g: Tensor, eta: float) -> None:
        self.advance(g, eta)
        self.bytes_sent_per_step = self._sent_now
        self.bytes_sent += self._sent_now

    def start_alike(self) -> bool:
        return torch.equal(self.x, self.x[:1].expand_as(self.x))

    def send(self, step: int, message_bytes: int) -> None:
        self._sent_now += len(self.links(step)) * message_bytes

    def gossip_rule(self, rule: str, hyper: list[float], g: Tensor, state: Sequence[str]) -> None:
        mixing = self.topology.mixing(self.num_steps)
        tensors = mixing.tensors(self.x.device, self.compute)
        ops.gossip_step_(self.x, g, [self._state[name] for name in state], tensors, mixing.form, rule, hyper)

    def mix_params(self, gamma: float, step: int) -> None:
        self._mix(self.x, self.topology.mixing(step).relaxed(gamma))

    def sent_over(self, links: Sequence[int]) -> Tensor:
        senders = self.links(self.num_steps).senders
        return self._state["sent_params"][[senders[link] for link in links]]

    def mix_changes(
        self, name: str, change: Compressed, compressor: Compressor, streams: Sequence[int], seed: int
    ) -> Tensor:
        self._state[name] += change.values
        mixed = self._state[name].clone()
        self._mix(mixed, self.topology.mixing(self.num_steps))
        return mixed

    def answers(self, own: Tensor, compressor: Compressor | None = None, seed: int = 0) -> Answers:
        return _Here(self.links(self.num_steps), own)

    def _mix(self, vectors: Tensor, mixing: Mixing) -> None:
        tensors = mixing.tensors(vectors.device, self.compute)
        # The rule of DSGD without a gradient step is gossip averaging.
        ops.gossip_step_(vectors, torch.zeros_like(vectors), [], tensors, mixing.form, "dsgd", [0.0, 0.0])


class _Here(Answers):
    """Answers among workers that are all here."""

    def __init__(self, links: Links, own: Tensor) -> None:
        self._links, self._total = links, own.clone()

    def add(self, links: Sequence[int], values: Compressed) -> None:
        for link, row in zip(links, values.values, strict=True):
            self._total[self._links.senders[link]] += row

    def total(self) -> Tensor:
        return self._total


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
