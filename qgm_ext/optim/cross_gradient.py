"""CrossGradient: algorithms that take gradients elsewhere than at a worker's own parameters, one process a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from qgm_ext.algorithms import Algorithm
from qgm_ext.algorithms.cross_gradient import CrossGradientAlgorithm
from qgm_ext.distributed.cross_worker import CrossWorker
from qgm_ext.engines import BufferSnapshot, Closure, LoopEngine, Workers
from qgm_ext.optim.decentralized import Decentralized
from qgm_ext.optim.peers import Peers, Work
from qgm_ext.optim.together import collect_works, count_step, is_left_out
from qgm_ext.stacked import OnNonfinite
from qgm_ext.topology import Topology

__all__ = ["CrossGradient"]


class CrossGradient(Decentralized):
    """The optimizer of algorithms that compute gradients themselves: at neighbours' models, or up the slope.

    It takes the model, and :meth:`step` takes the loss and the batch, as :meth:`qgm_ext.Simulator.step_closure` does;
    the bits are those of the worker's row there. ``.grad`` of the parameters is not used. For everything else it is as
    :class:`Decentralized`, and so are its ``state_dict`` and its errors.

    Args:
        model: whose trainable parameters, of one dtype and device, are stepped; trained in place.
        algorithm: "ngc", "ccl", "q_saddle", ...: one whose class is a
            :class:`qgm_ext.algorithms.cross_gradient.CrossGradientAlgorithm`.
        topology, group, on_nonfinite: see :class:`DecentralizedOptimizer`.
        **more: hyper-parameters of the algorithm (lr, ...) and options of the runtime
            (:class:`qgm_ext.distributed.RuntimeOptions`), but for overlap: nothing is sent during backward.

    Raises:
        TypeError, ValueError: if an argument does not fit; it is named with what was expected and what came.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> model = nn.Linear(3, 2)
        >>> opt = CrossGradient(model, "q_saddle", lr=0.1)
        >>> batch = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
        >>> opt.step(lambda model, batch: cross_entropy(model(batch[0]), batch[1]), batch).shape
        torch.Size([])
    """

    takes_model: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        algorithm: str,
        *,
        topology: Topology | None = None,
        group: dist.ProcessGroup | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        **more: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        kinds = sorted({f"{p.dtype} on {p.device}" for _, p in named})
        if len(kinds) > 1:
            raise ValueError(f"trainable parameters must be of one dtype and device, got {', '.join(kinds)}")
        if more.get("overlap"):
            raise ValueError(
                f"overlap must be False: {algorithm} takes several gradients a step, so nothing is sent during backward"
            )
        self.model = model
        self._names = [name for name, _ in named]
        self._steps: tuple[Work, CrossWorker, LoopEngine] | None = None
        super().__init__(
            [p for _, p in named], algorithm, topology=topology, group=group, on_nonfinite=on_nonfinite, **more
        )

    def make_algorithm(self, group: Mapping[str, Any]) -> Algorithm:
        algorithm = super().make_algorithm(group)
        assert isinstance(algorithm, CrossGradientAlgorithm)
        algorithm.check_model(self.model)
        return algorithm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only those of the model; raises ValueError when the optimizer has been built."""
        if self._started:
            raise ValueError("CrossGradient steps the parameters of its model alone; build it when all are trainable")
        super().add_param_group(param_group)

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Closure, batch: Any) -> Tensor:  # type: ignore[override]
        """One step of this worker on its batch; all workers take it together.

        Args:
            closure: called as ``closure(model, batch)``; returns the loss, a scalar, and does not call backward.
            batch: of any kind.

        Returns:
            The loss before the step, a scalar; with what the algorithm has added to it (ccl).

        Raises:
            TypeError, ValueError: if the loss, a parameter or a hyper-parameter does not fit.
            NonFiniteGradientError: with on_nonfinite="raise". In every case parameters, buffers and state keep their
                values.
        """
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        peers = self._runtime
        assert isinstance(peers, Peers)
        del self._bindings[len(self.param_groups) :]
        work, worker, engine = self._prepare(peers)
        assert isinstance(work.algorithm, CrossGradientAlgorithm)
        g = work.vectors.g
        worker.begin(work.algorithm, work.vectors, work.lr, work.clock, peers.number)
        before, taken = BufferSnapshot([self.model]), False
        try:
            losses = worker.gradients(engine, g, closure, [batch], None, work.lr)
            peers.clip([work])
            if not is_left_out(self, peers, [g]):
                peers.finish([worker])
                count_step([work])
                taken = True
        finally:
            if not taken:
                worker.abandon()
                before.restore()
        return losses[0]

    def _prepare(self, peers: Peers) -> tuple[Work, CrossWorker, LoopEngine]:
        (work,) = collect_works(self, peers)
        if work.maximize:
            raise ValueError("maximize must be False: the algorithm descends on the loss that it is given")
        known = self._steps
        if known is None or known[0].vectors is not work.vectors:  # parameters are in other memory
            flat = work.flat
            workers = Workers(
                models=[self.model],
                names=self._names,
                parameters=[[p for p in flat.params if isinstance(p, nn.Parameter)]],
                gradients=[work.vectors.layout.views(work.vectors.g[0])],
                stacked_parameters=[],
                stacked_gradients=[],
                device=work.vectors.x.device,
            )
            # What neighbours have sent stays: they don't send it again, for theirs are where they were.
            known = (work, peers.cross_worker() if known is None else known[1], LoopEngine(workers))
        self._steps = (work, *known[1:])
        return self._steps

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`DecentralizedOptimizer.load_state_dict`; what is known of the neighbours is asked for again."""
        super().load_state_dict(state_dict)
        self._steps = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"model": self.model, "_names": self._names, "_steps": None}
