"""Simulator: decentralized training of n models on one device, as if each were on a machine of its own.

Holds the binding of n modules to the rows of flat buffers and the training step. The gradients are computed by
:mod:`qgm_ext.engines`, the step by :class:`qgm_ext.stacked.StackedOptimizer`; data, schedules and logs are the
caller's. For one worker per process see :mod:`qgm_ext.optim`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgm_ext import cuda_graph as graphs
from qgm_ext import engines, ops
from qgm_ext.algorithms import Algorithm
from qgm_ext.cross_optimizer import CrossOptimizer, make_optimizer
from qgm_ext.engines import BufferSnapshot, Closure, Engine, Workers
from qgm_ext.evaluate import Evaluation, Samples, accuracies_and_losses, evaluation_mode
from qgm_ext.flat import FlatLayout
from qgm_ext.simulator_inputs import check_alike, check_tensors, checked_norm, checked_pairs, private_copy
from qgm_ext.stacked import OnNonfinite
from qgm_ext.timing import Timer, Timings
from qgm_ext.topology import Topology

__all__ = ["EngineChoice", "Simulator", "Timings"]

EngineChoice = Literal["loop", "threads", "vmap", "auto"]


class Simulator:
    """n copies of a model that train on their own batches and average with their neighbours.

    All workers start from the given model's parameters. Trainable parameters are stepped and averaged; buffers
    (batch-norm statistics) stay with their worker and are never averaged; frozen parameters are kept once and shared.
    Which parameters are trainable is settled here, not later. The given model itself is not changed.

    Args:
        model: any module that copy.deepcopy can copy, with trainable parameters of one dtype on one device.
        topology: who averages with whom, of n workers (:mod:`qgm_ext.topology`).
        algorithm: a name from :func:`qgm_ext.algorithms.names`, or an Algorithm.
        engine: how gradients are computed (:mod:`qgm_ext.engines`): "loop", one worker after the other, runs any model;
            "threads", workers side by side on the CPU's cores; "vmap", all in one batched call; "auto" measures them in
            the first step and keeps the fastest, so that runs may differ in the last bits from machine to machine.
        clip_grad_norm: if given, each worker's gradient is scaled to at most this 2-norm before the step, by
            min(1, clip_grad_norm / (norm + 1e-6)) as :func:`torch.nn.utils.clip_grad_norm_` does.
        on_nonfinite: as in :class:`StackedOptimizer`; a step that is left out leaves buffers as they were, too.
        message: as in :class:`StackedOptimizer`: "float32", "bfloat16" or "int8".
        cuda_graph: replay steps as CUDA graphs instead of launching their kernels one by one, which takes longer than
            running them where models are small. For models on a CUDA device. The bits are those of a step that is not
            replayed, of batches in memory of their own (a library may sum unaligned ones otherwise). The first 3 steps
            of each program (loss function, shapes of the batches, training mode, clip_grad_norm, autocast) run as
            always, the fourth is recorded, which takes as long as some steps: so pass the same ``loss_fn`` or
            ``closure`` object every time; the last 4 programs are kept. Model and loss must not read values on the
            host, and what they do in Python happens only while recording. The update is in the graph whenever its
            numbers have come before: always with a constant lr, once for each stretch of a piecewise constant schedule
            (the last 16 are kept), in every period of a time-varying topology. With numbers that are new in every step
            (another lr each, bias corrections of Adam), with on_nonfinite other than "ignore", and for algorithms that
            look at tensors on the way (choco_sgd), it follows the replay. Algorithms that take several gradients a
            step are refused. A replayed step counts as gradient in ``timings``. (Default: False)
        device, dtype: where and in which floating-point type the copies are kept; None keeps the model's.
        **hyper: hyper-parameters of the algorithm, if it is given by name: lr, momentum, ...

    Attributes:
        models: the workers' modules. Their parameters are views of rows of ``opt.x``, and ``.grad`` (until zero_grad
            drops it) of the gradient of the last step; values written into them are what the next step starts from.
            Saving one saves the memory of all: save ``average_model()`` or a ``copy.deepcopy`` instead.
        opt: the :class:`StackedOptimizer`. ``opt.lr`` may be assigned.
        g: gradients of the last step, after clipping, [n, D]; what the algorithm made of them, where it takes several.
        clip_grad_norm: may be assigned.
        engine_seconds: what engine="auto" measured: seconds per engine; else empty.

    Raises:
        TypeError, ValueError: if an argument does not fit; it is named with what was expected and what came.

    Example:
        >>> import qgm_ext as qgm
        >>> from qgm_ext.simulator import Simulator
        >>> _ = torch.manual_seed(0)
        >>> sim = Simulator(nn.Linear(3, 2), qgm.topology.ring(4), "qg_dsgdm_n", lr=0.1)
        >>> x, y = torch.randn(4, 8, 3), torch.randint(0, 2, (4, 8))
        >>> sim.step(F.cross_entropy, (x, y)).shape
        torch.Size([4])
        >>> sim.num_steps
        1
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        algorithm: str | Algorithm,
        *,
        engine: EngineChoice = "loop",
        clip_grad_norm: float | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        message: str = "float32",
        cuda_graph: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hyper: Any,
    ) -> None:
        if not isinstance(cuda_graph, bool):
            raise TypeError(f"cuda_graph must be True or False, got {cuda_graph!r}")
        if not isinstance(topology, Topology):
            raise TypeError(f"topology must be a qgm_ext.topology.Topology, got {type(topology).__name__}")
        engines.check_name(engine, get_args(EngineChoice))
        self.clip_grad_norm = checked_norm(clip_grad_norm)
        base = private_copy(model, device, dtype)
        trainable = {name: p for name, p in base.named_parameters() if p.requires_grad}
        first = check_alike(trainable)
        runtime = graphs.runtime_of(first.device) if cuda_graph else None
        self._names = tuple(trainable)
        self._frozen = {name: p for name, p in base.named_parameters() if not p.requires_grad}
        n = topology.num_workers

        self._layout = layout = FlatLayout(p.shape for p in trainable.values())
        x = layout.allocate(n, dtype=first.dtype, device=first.device)
        self.g = torch.zeros_like(x)
        stacked = layout.views(x)
        for parameter, view in zip(trainable.values(), stacked, strict=True):
            view.copy_(parameter.detach())
        self.opt = make_optimizer(
            x, topology, algorithm, model=base, layout=layout, on_nonfinite=on_nonfinite, message=message, **hyper
        )
        if cuda_graph and isinstance(self.opt, CrossOptimizer):
            raise ValueError(
                f"cuda_graph=True can't replay {self.opt.algorithm.name}, which takes several gradients a step"
            )

        shared = {id(p): p for p in self._frozen.values()}
        self.models: tuple[nn.Module, ...] = (base, *(copy.deepcopy(base, dict(shared)) for _ in range(n - 1)))
        self._workers = Workers(
            models=self.models,
            names=self._names,
            parameters=[[p for p in worker.parameters() if p.requires_grad] for worker in self.models],
            gradients=[layout.views(row) for row in self.g],
            stacked_parameters=stacked,
            stacked_gradients=layout.views(self.g),
            device=x.device,
        )
        # What _bind compares: where each parameter is registered, the parameter, its row and where the row lies.
        self._bindings: list[tuple[int, str, dict[str, Any], str, nn.Parameter, Tensor, int]] = []
        for worker, (module, parameters) in enumerate(zip(self.models, self._workers.parameters, strict=True)):
            rows, gradients = layout.views(x[worker]), self._workers.gradients[worker]
            for name, parameter, row, gradient in zip(self._names, parameters, rows, gradients, strict=True):
                parameter.data, parameter.grad = row, gradient
                path, _, leaf = name.rpartition(".")
                owner: dict[str, Any] = module.get_submodule(path)._parameters
                self._bindings.append((worker, name, owner, leaf, parameter, row, row.data_ptr()))
        self._has_buffers = any(module._buffers for module in base.modules())
        self._engine: Engine | None = None if engine == "auto" else engines.make(engine, self._workers)
        self._timer = Timer(x.device)
        self.engine_seconds: dict[str, float] = {}
        self._graphs: graphs.StepGraphs | None = None
        if runtime is not None:
            self._graphs = graphs.StepGraphs(
                runtime,
                self.opt,
                self.g,
                self.models,
                self._clipped_gradients,
                self._run_step,
                lambda: self._timer.phase("gradient"),
            )

    @property
    def num_workers(self) -> int:
        """n."""
        return len(self.models)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of one worker, the padding of ``opt.x`` not counted."""
        return sum(p.numel() for p in self._workers.parameters[0])

    @property
    def num_steps(self) -> int:
        """Steps so far, those left out because of on_nonfinite="skip" included: the number of the next batch."""
        return self.opt.num_steps + self.opt.skipped_steps

    @property
    def engine(self) -> str:
        """The gradient engine; "auto" until the first step has chosen."""
        return "auto" if self._engine is None else self._engine.name

    @property
    def device(self) -> torch.device:
        """Where parameters and state are."""
        return self.g.device

    @property
    def timings(self) -> Timings:
        """Seconds spent so far; reading them waits for a CUDA device."""
        return self._timer.seconds()

    def step(
        self,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        batches: Sequence[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor],
        lr: float | None = None,
    ) -> Tensor:
        """One step of all workers on batches of inputs and targets: gradients, clipping, local step, gossip averaging.

        Args:
            loss_fn: called as ``loss_fn(model(inputs), targets)`` for each worker, such as
                :func:`torch.nn.functional.cross_entropy`; returns a scalar. For other models and losses use
                :meth:`step_closure`.
            batches: n pairs (inputs [B_i, ...], targets [B_i, ...]), or one pair of tensors with the workers in front,
                (inputs [n, B, ...], targets [n, B, ...]).
            lr: step size of this step alone; None takes ``opt.lr``.

        Returns:
            The loss of each worker before the step, [n], on the device.

        Raises:
            TypeError, ValueError: if batches, the loss or lr don't fit.
            NonFiniteGradientError: with on_nonfinite="raise". In every case parameters, buffers and state are
                untouched.
        """
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
        pairs, stacked = checked_pairs(batches, self.num_workers, self.device)

        def closure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss_fn(model(batch[0]), batch[1])

        return self._step(loss_fn, closure, pairs, stacked, lr)

    def step_closure(self, closure: Closure, batches: Sequence[Any], lr: float | None = None) -> Tensor:
        """One step of all workers whose loss is computed by ``closure(model, batch)``, for models that :meth:`step`
        does not fit: several inputs, auxiliary losses, dictionaries.

        Args:
            closure: returns a scalar. It must not call backward; gradients are taken afterwards.
            batches: n batches of any kind, one per worker; the engine "vmap" needs tensors or tuples, lists and
                dicts of tensors, of one shape for all workers.
            lr: as in :meth:`step`.

        Returns, Raises: as :meth:`step`.
        """
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        if not isinstance(batches, (Sequence, Tensor)) or isinstance(batches, str):
            raise TypeError(f"batches must be a sequence with one batch per worker, got {type(batches).__name__}")
        if len(batches) != self.num_workers:
            raise ValueError(f"batches must hold one batch per worker, {self.num_workers}, got {len(batches)}")
        return self._step(closure, closure, batches, None, lr)

    def consensus_distance(self) -> float:
        """How far the workers are apart: sqrt((1/n) sum_i ||x_i - mean||^2)."""
        self._bind()
        return self.opt.consensus_distance()

    def average_model(self, buffers_of: int = 0) -> nn.Module:
        """A new module with the mean of the workers' parameters, in its own memory.

        Buffers are not averaged: they are a copy of one worker's, as are the training mode and frozen parameters.

        Args:
            buffers_of: that worker.
        """
        if not isinstance(buffers_of, int) or not 0 <= buffers_of < self.num_workers:
            raise ValueError(f"buffers_of must be a worker from 0 to {self.num_workers - 1}, got {buffers_of!r}")
        self._bind()
        average = copy.deepcopy(self.models[buffers_of])
        with torch.no_grad():
            parameters = dict(average.named_parameters())
            for name, stacked in zip(self._names, self._workers.stacked_parameters, strict=True):
                parameters[name].copy_(stacked.mean(0))
        return average

    def evaluate(
        self,
        x: Samples,
        y: Tensor,
        batch_size: int = 256,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> Evaluation:
        """Accuracy and loss of every local model and of the average model, in evaluation mode.

        The average model has averaged parameters and, of batch-norm statistics, those of worker 0.

        Args:
            x: samples, [N, ...], N >= 1.
            y: class numbers, [N, ...].
            batch_size: samples at a time.
            loss_fn: mean loss of (scores, classes), a scalar.

        Raises:
            TypeError, ValueError: if x and y don't fit each other, the device or the models' output.
        """
        for name, tensor in (("x", x), ("y", y)):
            if not isinstance(tensor, Samples if name == "x" else Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device}, the models on {self.device}")
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y) or y.numel() == 0:
            raise ValueError(
                f"x and y must hold equally many samples, at least 1, got {list(x.shape)} and {list(y.shape)}"
            )
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        self._bind()
        with self._timer.phase("evaluation"):
            models = [*self.models, self.average_model()]
            with evaluation_mode(models):
                results = accuracies_and_losses(models, x, y, batch_size, loss_fn)
            accuracies, losses = zip(*results, strict=True)
            return Evaluation(
                accuracies[:-1], losses[:-1], accuracies[-1], losses[-1], self.opt.consensus_distance(), len(x)
            )

    def train(self, mode: bool = True) -> None:
        """Put the modules of all workers into training mode, or into evaluation mode."""
        for model in self.models:
            model.train(mode)

    def eval(self) -> None:
        """Put the modules of all workers into evaluation mode."""
        self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, not copied: parameters, buffers, optimizer, engine.

        Survives ``torch.save`` and ``torch.load(weights_only=True)``. States of random generators (dropout draws from
        torch's) are the caller's to save.
        """
        self._bind()
        return {
            "parameters": dict(zip(self._names, self._workers.stacked_parameters, strict=True)),
            "frozen": {name: p.detach() for name, p in self._frozen.items()},
            "buffers": [dict(model.named_buffers()) for model in self.models],
            "optimizer": self.opt.state_dict(),
            "engine": self.engine,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of a simulator of the same model, topology and algorithm, copying its tensors.

        An explicit engine stays; "auto" takes the engine that the saved run had chosen, and so continues to its bits.

        Raises:
            ValueError: if it does not fit or is incomplete; nothing has been changed then.
        """
        self._bind()
        mine = self.state_dict()
        missing = mine.keys() - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict lacks {', '.join(sorted(missing))}")
        if len(state_dict["buffers"]) != self.num_workers:
            raise ValueError(
                f"state_dict is of {len(state_dict['buffers'])} workers, this simulator has {self.num_workers}"
            )
        pairs = [("parameter", mine["parameters"], state_dict["parameters"])]
        pairs += [("frozen parameter", mine["frozen"], state_dict["frozen"])]
        pairs += [
            (f"worker {worker}'s buffer", own, state_dict["buffers"][worker])
            for worker, own in enumerate(mine["buffers"])
        ]
        for what, own, given in pairs:
            check_tensors(what, own, given)
        if state_dict["engine"] != "auto":
            engines.check_name(state_dict["engine"])
        self.opt.load_state_dict(state_dict["optimizer"])
        with torch.no_grad():
            for _, own, given in pairs:
                for name, tensor in own.items():
                    tensor.copy_(given[name])
        if self._engine is None and state_dict["engine"] != "auto":
            self._engine = engines.make(state_dict["engine"], self._workers)

    def __repr__(self) -> str:
        return f"Simulator({type(self.models[0]).__name__}, {self.opt!r}, engine={self.engine!r})"

    def _step(
        self, function: Callable[..., Any], closure: Closure, batches: Sequence[Any], stacked: Any, lr: float | None
    ) -> Tensor:
        """A step; ``function`` is what the caller gave, from which ``closure`` may have been made anew."""
        self._bind()
        if self._engine is None:
            self._engine, self.engine_seconds = engines.choose(self._workers, closure, batches, stacked)
        if self._graphs is not None:
            settings = (self._engine.name, self.clip_grad_norm)
            return self._graphs.step(function, closure, batches, stacked, settings, lr)
        return self._run_step(lambda: self._clipped_gradients(closure, batches, stacked, lr), lr)

    def _run_step(self, compute: Callable[[], Tensor], lr: float | None) -> Tensor:
        """A step whose gradients are written by ``compute()``, which returns the losses. All or nothing."""
        before = BufferSnapshot(self.models) if self._has_buffers else None
        taken = self.opt.num_steps
        try:
            with self._timer.phase("gradient"):
                losses = compute()
            with self._timer.phase("optimizer"):
                self.opt.step(self.g, lr)
        finally:
            if self.opt.num_steps == taken:
                if before is not None:
                    before.restore()
                if isinstance(self.opt, CrossOptimizer):
                    self.opt.abandon()
        return losses

    def _clipped_gradients(
        self, closure: Closure, batches: Sequence[Any], stacked: Any, lr: float | None = None
    ) -> Tensor:
        """Write the gradients, clipped, into g; ``lr`` is for algorithms that take several."""
        assert self._engine is not None
        if isinstance(self.opt, CrossOptimizer):
            eta = self.opt.lr if lr is None else lr
            losses = self.opt.gradients(self._engine, self.g, closure, batches, stacked, eta)
        else:
            losses = self._engine.gradients(closure, batches, stacked)
        if self.clip_grad_norm is not None:
            self._clip(self.clip_grad_norm)
        return losses

    def _clip(self, max_norm: float) -> None:
        scale = (max_norm / (ops.squared_norms(self.g).sqrt() + 1e-6)).clamp(max=1.0)
        if self.g.device.type == "cpu" and self._graphs is None:
            # Row by row, and only those too long: a pass over all of g costs as much as the step.
            for row, factor in zip(self.g, scale.tolist(), strict=True):
                if not factor >= 1.0:  # NaN scales too
                    row.mul_(factor)
                    if math.isnan(factor):
                        self._layout.clear_gaps(row)
        else:
            self.g.mul_(scale.to(ops.compute_dtype(self.g.dtype))[:, None])
            self._layout.clear_gaps(self.g)

    def _bind(self) -> None:
        """Take over values of parameters that lie elsewhere by now (``p.data = ...``), and make them views again."""
        for worker, name, owner, leaf, parameter, row, address in self._bindings:
            current = owner.get(leaf)
            if current is parameter and (parameter.data_ptr() == address or not parameter.numel()):
                continue
            if current is None:
                raise ValueError(f"worker {worker} has lost its parameter {name}; the modules' structure must stay")
            if current.shape != row.shape or current.dtype != row.dtype or current.device != row.device:
                raise ValueError(
                    f"parameter {name} of worker {worker} must be {list(row.shape)} {row.dtype} on {row.device}, got "
                    f"{list(current.shape)} {current.dtype} on {current.device}"
                )
            row.copy_(current.detach())
            parameter.data = row
            owner[leaf] = parameter
