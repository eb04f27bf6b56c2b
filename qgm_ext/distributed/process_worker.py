"""ProcessWorker: one worker of a training run in a process of its own, where the Simulator holds all n of them.

It has those methods of :class:`qgm_ext.Simulator` that a training run uses, so that
:mod:`qgm_ext.experiments.train` runs on either, to the same bits. Models of all workers meet on rank 0 for an
evaluation and nowhere else.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from qgm_ext import algorithms, ops
from qgm_ext.distributed.options import OnPeerLoss, RuntimeOptions
from qgm_ext.distributed.peer_loss import meeting
from qgm_ext.engines import BufferSnapshot
from qgm_ext.evaluate import Evaluation, Samples, accuracy_and_loss, evaluation_mode
from qgm_ext.flat import FlatLayout
from qgm_ext.optim import CrossGradient, Decentralized
from qgm_ext.optim.peers import Peers
from qgm_ext.stacked import OnNonfinite
from qgm_ext.timing import Timer, Timings
from qgm_ext.topology import Topology

__all__ = ["ProcessWorker"]


class ProcessWorker:
    """This process's worker: a model, its optimizer, and evaluations together with the others.

    Building it, :meth:`step`, :meth:`evaluate`, :meth:`gather` and :meth:`average_model` are collectives of the default
    process group.

    Args:
        model: with trainable parameters of one dtype on the CPU; trained in place, from the values on rank 0.
        topology: of as many workers as there are processes.
        algorithm: a name from :func:`qgm_ext.algorithms.names`.
        clip_grad_norm, on_nonfinite, message: as in :class:`qgm_ext.Simulator`.
        on_peer_loss: as in :class:`qgm_ext.distributed.RuntimeOptions`; with "heal" those that are left meet without
            the lost ones.
        overlap, bucket_mb: as there, but overlap=True is refused where it would have no effect.
        staleness: as there; above 0 all workers call :meth:`drain` after their last step.
        **hyper: hyper-parameters of the algorithm.

    Attributes:
        model, opt: the module and its optimizer. worker: the number of this worker.
        left: the workers that took part in the last meeting, ascending: all but those that were lost.

    Raises:
        TypeError, ValueError: if an argument does not fit, or processes were started with different ones.
        PeerLostError: by every method that is a collective, if a worker is gone, unless on_peer_loss="heal".
    """

    engine = "loop"

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        algorithm: str,
        *,
        clip_grad_norm: float | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        message: str = "float32",
        on_peer_loss: OnPeerLoss = "raise",
        overlap: bool = False,
        staleness: int = 0,
        bucket_mb: float = RuntimeOptions.bucket_mb,
        **hyper: Any,
    ) -> None:
        self.model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._layout = FlatLayout(p.shape for p in self._parameters)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "overlap=True has no effect")  # which is an error here
            options: dict[str, Any] = {
                "topology": topology,
                "clip_grad_norm": clip_grad_norm,
                "on_nonfinite": on_nonfinite,
                "message": message,
                "on_peer_loss": on_peer_loss,
                "overlap": overlap,
                "staleness": staleness,
                "bucket_mb": bucket_mb,
                **hyper,
            }
            self.opt: Decentralized
            if algorithms.get_class(algorithm).needs_model:
                self.opt = CrossGradient(model, algorithm, **options)
            else:
                self.opt = Decentralized(self._parameters, algorithm, **options)
        if overlap and self.opt.overlap_obstacle is not None:
            obstacle = self.opt.overlap_obstacle
            raise ValueError(f"overlap must be False where nothing can be sent during backward, got True: {obstacle}")
        self.worker, self.num_workers = self.opt.worker, self.opt.num_workers
        self.left = list(range(self.num_workers))
        self._staleness = staleness
        runtime = self.opt._runtime
        self._survivors = runtime.survivors() if isinstance(runtime, Peers) else None
        self._exchange = runtime.exchange if isinstance(runtime, Peers) else None
        self._timer = Timer(torch.device("cpu"))

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self._parameters)

    @property
    def timings(self) -> Timings:
        """Seconds that this process has spent so far."""
        return self._timer.seconds()

    def step(self, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, lr: float) -> Tensor:
        """One step of this worker on its own batch; returns its loss before the step, a scalar.

        Raises:
            NonFiniteGradientError: as in :class:`qgm_ext.Simulator`, on all workers.
        """
        self.opt.param_groups[0]["lr"] = lr  # before backward, in which the step may begin
        if isinstance(self.opt, CrossGradient):
            with self._timer.phase("gradient"):
                return self.opt.step(lambda model, batch: loss_fn(model(batch[0]), batch[1]), (x, y))
        before = BufferSnapshot([self.model])
        skipped = self.opt.skipped_steps
        with self._timer.phase("gradient"):
            self.opt.zero_grad()
            loss = loss_fn(self.model(x), y)
            with record_function("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
        taken = False
        try:
            with self._timer.phase("optimizer"):
                self.opt.step()
            taken = self.opt.skipped_steps == skipped
        finally:
            if not taken:
                before.restore()
        return loss.detach()

    @property
    def message_ages(self) -> Tensor:
        """How many of the messages that this worker merged were 0, 1, ..., k steps old, [k + 1] int64; 0 if k is."""
        total = torch.zeros(self._staleness + 1, dtype=torch.int64)
        for ages in self.opt.message_ages.values():
            total += torch.tensor(ages)
        return total

    def drain(self) -> None:
        """Wait until no message is under way (:meth:`qgm_ext.optim.DecentralizedOptimizer.drain`)."""
        self.opt.drain()

    def gather(self, values: Tensor) -> Tensor:
        """The same tensor of all workers that are ``left``, [n, ...]."""
        if self._survivors is not None:
            said = self._survivors.gather(values)
            self.left = list(said)
            return torch.stack(list(said.values()))
        found = [torch.empty_like(values) for _ in range(self.num_workers)]
        with self._meeting():
            dist.all_gather(found, values.contiguous())
        return torch.stack(found)

    def maximum(self, values: Tensor) -> Tensor:
        """The largest of all workers, element by element."""
        if self._survivors is not None:
            return self.gather(values).amax(0)
        found = values.clone()
        with self._meeting():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found

    def _meeting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._exchange is None else meeting(self._exchange.group)

    def average_model(self) -> nn.Module | None:
        """On the lowest rank that is left a new module with the mean of the workers' parameters and that worker's
        buffers, else None.
        """
        found: list[nn.Module] = []

        def keep(rows: Tensor) -> Tensor:
            found[:] = [self._average(rows)]
            return torch.zeros(0, dtype=torch.float64)

        self._of_rows(keep, 0)
        return found[0] if found else None

    def evaluate(
        self,
        x: Samples,
        y: Tensor,
        batch_size: int = 256,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> Evaluation:
        """Accuracy and loss of every local model and of the average model, the same on all workers.

        Args, Raises: as :meth:`qgm_ext.Simulator.evaluate`.
        """
        with self._timer.phase("evaluation"):
            with evaluation_mode([self.model]):
                own = accuracy_and_loss(self.model, x, y, batch_size, loss_fn)
            local = self.gather(torch.tensor(own, dtype=torch.float64))

            def judge(rows: Tensor) -> Tensor:
                average = self._average(rows)
                with evaluation_mode([average]):
                    accuracy, loss = accuracy_and_loss(average, x, y, batch_size, loss_fn)
                return torch.tensor([accuracy, loss, float(ops.consensus_distance(rows))], dtype=torch.float64)

            shared = self._of_rows(judge, 3)
            accuracies, losses = (tuple(column.tolist()) for column in local.unbind(1))
            average_accuracy, average_loss, distance = shared.tolist()
            return Evaluation(accuracies, losses, average_accuracy, average_loss, distance, len(x))

    def _average(self, rows: Tensor) -> nn.Module:
        average = copy.deepcopy(self.model)
        trainable = [p for p in average.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, stacked in zip(trainable, self._layout.views(rows), strict=True):
                parameter.copy_(stacked.mean(0))
        return average

    def _of_rows(self, make: Callable[[Tensor], Tensor], size: int) -> Tensor:
        """What ``make`` gives for the parameters of all workers, [n, D] as in the Simulator: [size] float64 on all of
        them; called on the lowest rank that is left.
        """
        first = self._parameters[0]
        row = self._layout.allocate(dtype=first.dtype, device="cpu")
        for view, parameter in zip(self._layout.views(row), self._parameters, strict=True):
            view.copy_(parameter.detach())
        if self._survivors is not None:
            made = self._survivors.decide(row, lambda said: make(self._stacked(list(said.values()))))
            return made.view(torch.float64)
        rows = self._layout.allocate(self.num_workers, dtype=first.dtype, device="cpu") if self.worker == 0 else None
        # As bytes: Gloo does not know every dtype.
        into = None if rows is None else [one.view(torch.uint8) for one in rows]
        with self._meeting():
            dist.gather(row.view(torch.uint8), into, dst=0)
        shared = torch.zeros(size, dtype=torch.float64) if rows is None else make(rows)
        with self._meeting():
            dist.broadcast(shared, 0)
        return shared

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        found = self._layout.allocate(len(rows), dtype=rows[0].dtype, device="cpu")
        for place, row in zip(found, rows, strict=True):
            place.copy_(row.view(place.shape))
        return found
