"""Steps of a Simulator as CUDA graphs: recorded once, then replayed by one call instead of launched one by one.

n small models are bound by launches: a step of 16 networks of 20 layers is some thousand kernels of a few microseconds
each, and Python takes longer to start one than the GPU to run it. This file holds what a replayed step needs: fixed
places for batches, the first steps on a side stream, the choice of what is recorded, and the bounded store of graphs.
It knows no model (:mod:`qgm_ext.engines`) and no algorithm (:mod:`qgm_ext.stacked` says what a step will launch).

A kernel's numbers are part of a recording. So a graph is used for exactly those numbers that it was recorded with:

- The **gradients** of all workers, clipping included, are one graph for each *program*: loss function, shapes of the
  batches, training mode, addresses of buffers and frozen parameters, ``clip_grad_norm``, autocast.
- The **update** joins it, so that the whole step is one graph, as soon as its numbers (step size, momentum, bias
  corrections, mixing matrix) come a second time: at once with a constant step size, after one period of a time-varying
  topology. Numbers of each worker (push-sum weights, relayed counts) are no obstacle: they are copied to a fixed place.
- Otherwise the update, one to three launches, is launched as always after the gradients have been replayed: with
  numbers that are new in every step, with on_nonfinite="raise" or "skip", which ask the host, and with an algorithm
  that looks at tensors between its passes.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from qgm_ext.engines import Closure, forget_cast_parameters
from qgm_ext.stacked import Plan, StackedOptimizer

__all__ = ["CudaRuntime", "Recording", "Runtime", "StepGraphs", "runtime_of"]

# Steps that run before anything is recorded: libraries choose algorithms and allocate workspaces in them.
WARM_UP_STEPS = 3
# Programs, and recorded updates of one program, that are kept; beyond that the one used longest ago is dropped.
MOST_PROGRAMS = 4
MOST_UPDATES = 16

_T = TypeVar("_T")


@dataclass(frozen=True)
class Recording:
    """Work that can be repeated on the same memory.

    Args:
        replay: does it once more.
        losses: where every replay leaves the losses, [n].
        kept: what lies behind the addresses that the recording holds.
    """

    replay: Callable[[], None]
    losses: Tensor
    kept: Any = None


class Runtime(Protocol):
    """What is asked of torch.cuda. Tests put something in its place that records and replays on the CPU."""

    def on_side_stream(self, run: Callable[[], Tensor]) -> Tensor:
        """Run on another stream than the caller's, each waiting for the other."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record what ``run`` launches, without doing it; returns what does it, and run's result."""


class CudaRuntime:
    """torch.cuda: one side stream, and one pool of memory for all graphs, which never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def on_side_stream(self, run: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                result = run()
        finally:
            current.wait_stream(self._stream)
        return result.clone()  # in memory of the caller's stream

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a loader's that pins memory, may go on meanwhile.
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            result = run()
        return graph.replay, result


def runtime_of(device: torch.device) -> Runtime:
    """The runtime for models on a device.

    Raises:
        ValueError: if it is not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True is for models on a CUDA device, these are on {device}")
    return CudaRuntime(device)


@dataclass(eq=False)
class _Program:
    """One way to compute gradients, and its recordings.

    Args:
        signature: what must be equal for a step to be this program.
        kept: objects whose identities are in the signature.
        leaves: the fixed tensors that batches are copied to.
        batches, stacked: the same tensors in the shape in which the engine takes batches.
    """

    signature: tuple[Any, ...]
    kept: tuple[Any, ...]
    leaves: list[Tensor]
    batches: Sequence[Any]
    stacked: Any
    warmed_up: int = 0
    gradients: Recording | None = None
    updates: OrderedDict[tuple[Any, ...], Recording] = field(default_factory=OrderedDict)
    # Updates that were launched once: by key, with the objects that the key names by identity.
    met: OrderedDict[tuple[Any, ...], Plan] = field(default_factory=OrderedDict)


class StepGraphs:
    """Runs a Simulator's steps, replaying what it can.

    Args:
        runtime: see :func:`runtime_of`.
        opt: the optimizer; g: where gradients are written, [n, D].
        models: the workers' modules. Their structure must stay.
        gradients: called as ``gradients(closure, batches, stacked)``: computes and clips the gradients of all workers.
        step: called as ``step(compute, lr)``: a whole step that is not replayed, with ``compute()`` for its gradients.
        timed: a context that takes the time of a step that is replayed.
    """

    def __init__(
        self,
        runtime: Runtime,
        opt: StackedOptimizer,
        g: Tensor,
        models: Sequence[nn.Module],
        gradients: Callable[[Closure, Sequence[Any], Any], Tensor],
        step: Callable[[Callable[[], Tensor], float | None], Tensor],
        timed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._runtime, self._opt, self._g = runtime, opt, g
        self._gradients, self._step, self._timed = gradients, step, timed
        self._modules = [module for model in models for module in model.modules()]
        # What replays read besides trainable parameters, by the dictionary that holds it.
        self._fixed = [
            (owner, name)
            for module in self._modules
            for owner in (module._buffers, module._parameters)
            for name, tensor in owner.items()
            if tensor is not None and not tensor.requires_grad
        ]
        self._device = g.device
        self._programs: list[_Program] = []

    @property
    def recordings(self) -> tuple[int, int]:
        """How many graphs of gradients, and of whole steps, are kept."""
        return (
            sum(program.gradients is not None for program in self._programs),
            sum(len(program.updates) for program in self._programs),
        )

    def step(
        self,
        function: Callable[..., Any],
        closure: Closure,
        batches: Sequence[Any],
        stacked: Any,
        settings: tuple[Any, ...],
        lr: float | None,
    ) -> Tensor:
        """One step of all workers.

        Args:
            function: the loss function or closure that the caller was given; another object is another program.
            closure, batches, stacked: as in :meth:`qgm_ext.engines.Engine.gradients`.
            settings: what else a recording depends on, compared with ``==``.
            lr: as in :meth:`StackedOptimizer.step`.

        Returns:
            The losses, [n].
        """
        given = batches if stacked is None else stacked
        leaves, structure = tree_flatten(given)
        program = self._program_of(function, leaves, structure, stacked is not None, settings)
        plan = self._opt.plan(lr)
        if program.warmed_up < WARM_UP_STEPS:
            losses = self._runtime.on_side_stream(
                lambda: self._step(lambda: self._gradients(closure, batches, stacked), lr)
            )
            program.warmed_up += 1
            _remember(program.met, plan)
            return losses
        for place, leaf in zip(program.leaves, (leaf for leaf in leaves if isinstance(leaf, Tensor)), strict=True):
            place.copy_(leaf, non_blocking=True)

        def compute() -> Tensor:
            return self._gradients(closure, program.batches, program.stacked)

        if plan is None or (plan.key not in program.updates and plan.key not in program.met):
            if program.gradients is None:
                program.gradients = self._record(compute)
            recording = program.gradients
            losses = self._step(lambda: _replay(recording), lr)
            _remember(program.met, plan)
            return losses
        if plan.key not in program.updates:
            program.updates[plan.key] = self._record_step(compute, plan)
            program.met.pop(plan.key, None)
            if len(program.updates) > MOST_UPDATES:  # recording has waited for the device, so it is not running
                program.updates.popitem(last=False)
        program.updates.move_to_end(plan.key)
        recording = program.updates[plan.key]
        with self._timed():
            plan.copy_numbers(recording.kept)
            losses = _replay(recording)
        self._opt.commit(plan)
        return losses

    def _program_of(
        self,
        function: Callable[..., Any],
        leaves: list[Any],
        structure: Any,
        is_stacked: bool,
        settings: tuple[Any, ...],
    ) -> _Program:
        inputs: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device != self._device:
                    raise ValueError(
                        f"cuda_graph=True needs batches on the models' device, {self._device}, got a tensor on "
                        f"{leaf.device}"
                    )
                inputs.append((leaf.shape, leaf.dtype, leaf.stride()))
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                inputs.append((type(leaf), leaf))
            else:
                raise TypeError(
                    "cuda_graph=True takes batches of tensors, numbers, strings, and tuples, lists and dicts of them, "
                    f"got {type(leaf).__name__}"
                )
        modes = bytes(module.training for module in self._modules)
        fixed = [None if (tensor := owner[name]) is None else tensor.data_ptr() for owner, name in self._fixed]
        autocast = (torch.is_autocast_enabled(self._device.type), torch.get_autocast_dtype(self._device.type))
        signature = (id(function), is_stacked, structure, inputs, modes, fixed, autocast, settings)
        for program in self._programs:
            if program.signature == signature:
                break
        else:
            places = [torch.empty_like(leaf).copy_(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            places = [place.detach() if isinstance(place, Tensor) else place for place in places]
            given = tree_unflatten(places, structure)
            batches = list(zip(*(part.unbind() for part in given), strict=True)) if is_stacked else given
            program = _Program(
                signature,
                (function,),
                [place for place in places if isinstance(place, Tensor)],
                batches,
                given if is_stacked else None,
            )
            if len(self._programs) == MOST_PROGRAMS:
                dropped = self._programs.pop(0)
                if dropped.gradients is None and not dropped.updates:
                    warnings.warn(
                        "cuda_graph=True gains nothing here: the loss function (another object?), the shapes of the "
                        f"batches or modes have changed {MOST_PROGRAMS} times before a step could be replayed",
                        stacklevel=5,
                    )
        if program in self._programs:
            self._programs.remove(program)
        self._programs.append(program)
        return program

    def _record_step(self, compute: Callable[[], Tensor], plan: Plan) -> Recording:
        fixed = self._opt.prepare(plan)

        def run() -> Tensor:
            losses = compute()
            with torch.no_grad():
                for part in fixed:
                    self._opt.launch(part, self._g)
            return losses

        return self._record(run, kept=fixed)

    def _record(self, run: Callable[[], Tensor], kept: Any = None) -> Recording:
        try:
            replay, losses = self._runtime.record(run)
        except Exception as error:
            raise RuntimeError(
                "cuda_graph=True can't record this step; model and loss must not read values on the host (.item(), "
                f"printing, copies to the CPU) nor make tensors from host data. CUDA says: {error}"
            ) from error
        finally:
            forget_cast_parameters()  # those of the recording hold nothing before it is replayed
        return Recording(replay, losses, kept)


def _replay(recording: Recording) -> Tensor:
    recording.replay()
    return recording.losses.clone()


def _remember(met: OrderedDict[tuple[Any, ...], Plan], plan: Plan | None) -> None:
    if plan is None:
        return
    met[plan.key] = plan
    met.move_to_end(plan.key)
    if len(met) > MOST_UPDATES:
        met.popitem(last=False)
