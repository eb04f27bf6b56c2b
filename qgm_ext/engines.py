"""Gradient engines: how the gradients of n workers' models are computed into the rows of one flat buffer.

Holds three engines with one interface, and the measurement that picks one. They differ in speed and in the last bits of
the gradients, not in meaning:

- ``loop``: one worker after the other, the operators of one worker spread over torch's threads;
- ``threads``: as many workers side by side as torch has threads, each on one thread (CPU). The bits are those of
  ``loop`` under ``torch.set_num_threads(1)``;
- ``vmap``: all workers in one batched call (torch.func), for many small models.

A gradient is written once: autograd hands it over, and one copy puts it into its row while it is in cache. Zeroing
``.grad`` tensors and letting ``loss.backward()`` accumulate into them passes over the memory twice more. (Letting every
linear layer write its product straight into its row, through a TorchFunctionMode, was tried: the calls into Python cost
what the copy does.)

What is done with the gradients is the business of :mod:`qgm_ext.simulator`.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Barrier
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from qgm_ext.hints import did_you_mean

__all__ = [
    "NAMES",
    "BufferSnapshot",
    "Closure",
    "Engine",
    "EngineName",
    "LoopEngine",
    "ThreadsEngine",
    "VmapEngine",
    "Workers",
    "check_name",
    "choose",
    "make",
]

Closure = Callable[[nn.Module, Any], Tensor]
EngineName = Literal["loop", "threads", "vmap"]
NAMES: tuple[EngineName, ...] = ("loop", "threads", "vmap")

# Another engine must be this much faster than the loop to be chosen, so that noise does not decide.
_ADVANTAGE = 0.95
_MEASURED_STEPS = 3


@dataclass(frozen=True)
class Workers:
    """The n models and where their parameters and gradients lie.

    Args:
        models: one module per worker, all of one structure.
        names: of the trainable parameters, in the order of the lists below.
        parameters: per worker, its trainable parameters.
        gradients: per worker, where the gradient of each goes: views of the worker's row.
        stacked_parameters: the same memory as ``parameters``, each [n, *shape].
        stacked_gradients: the same memory as ``gradients``, each [n, *shape].
        device: where all of it is.
    """

    models: Sequence[nn.Module]
    names: Sequence[str]
    parameters: Sequence[Sequence[nn.Parameter]]
    gradients: Sequence[list[Tensor]]
    stacked_parameters: list[Tensor]
    stacked_gradients: list[Tensor]
    device: torch.device


class Engine:
    """Computes gradients; subclasses say how."""

    name: EngineName

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def gradients(
        self, closure: Closure, batches: Sequence[Any], stacked: Any = None, active: Sequence[int] | None = None
    ) -> Tensor:
        """Write the gradients of all workers at their parameters; parameters don't change, buffers of models may.

        Args:
            closure: called as ``closure(model, batch)``; returns the loss, a scalar.
            batches: one per worker, of any kind.
            stacked: the same batches as tensors with one more dimension in front, if there are such; else None.
            active: the workers to do this for, ascending; None: all. What the rows of the others hold is undefined
                afterwards ("vmap" computes them all the same).

        Returns:
            The losses of the active workers, [n] for all.

        Raises:
            TypeError, ValueError: if the loss is not a scalar that depends on the parameters, or the engine can't run
                this model.
        """
        raise NotImplementedError


class LoopEngine(Engine):
    """One worker after the other."""

    name: EngineName = "loop"

    def gradients(
        self, closure: Closure, batches: Sequence[Any], stacked: Any = None, active: Sequence[int] | None = None
    ) -> Tensor:
        forget_cast_parameters()
        with torch.enable_grad():
            losses = [self._one(worker, closure, batches[worker]) for worker in _all_or(active, batches)]
        return torch.stack(losses)

    def _one(self, worker: int, closure: Closure, batch: Any) -> Tensor:
        loss = closure(self.workers.models[worker], batch)
        _check_loss(loss)
        gradients = torch.autograd.grad(loss, self.workers.parameters[worker], materialize_grads=True)
        try:
            torch._foreach_copy_(self.workers.gradients[worker], gradients)
        except (RuntimeError, NotImplementedError) as error:
            self._explain_layout(gradients, error)
            raise
        return loss.detach()

    def _explain_layout(self, gradients: Sequence[Tensor], error: Exception) -> None:
        for name, gradient in zip(self.workers.names, gradients, strict=True):
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name} is {gradient.layout}; only dense gradients can be averaged "
                    "(for nn.Embedding: sparse=False)"
                ) from error


class ThreadsEngine(LoopEngine):
    """Workers side by side, each on one thread of the CPU; as many as ``torch.get_num_threads()``.

    Operators on small tensors gain little from a second thread, two workers on two cores gain much. The closure is
    called from several threads at once. A model or closure that draws random numbers from torch's global generator
    (dropout) is refused, because the order of the draws would depend on timing.
    """

    name: EngineName = "threads"

    def __init__(self, workers: Workers) -> None:
        if workers.device.type != "cpu":
            raise ValueError(f"engine='threads' is for models on the CPU, these are on {workers.device}")
        super().__init__(workers)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_size = 0

    def gradients(
        self, closure: Closure, batches: Sequence[Any], stacked: Any = None, active: Sequence[int] | None = None
    ) -> Tensor:
        workers = _all_or(active, batches)
        threads = min(torch.get_num_threads(), len(batches))
        pool = self._pool_of(threads)
        pending = deque(workers)
        losses: dict[int, Tensor] = {}
        # Autocast is a setting of the calling thread.
        autocast, autocast_dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def work() -> None:
            with torch.enable_grad(), torch.autocast("cpu", autocast_dtype, enabled=autocast):
                try:
                    while True:
                        try:
                            worker = pending.popleft()
                        except IndexError:
                            return
                        losses[worker] = self._one(worker, closure, batches[worker])
                except BaseException:
                    pending.clear()
                    raise

        drawn = torch.get_rng_state()
        futures: list[Future[None]] = []
        try:
            futures += [pool.submit(work) for _ in range(threads)]
            wait(futures)
        finally:  # an interrupt must not leave threads that still write
            pending.clear()
            wait(futures)
        for future in futures:
            future.result()
        if not torch.equal(drawn, torch.get_rng_state()):
            torch.set_rng_state(drawn)
            raise ValueError(
                "engine='threads' can't run a model or loss that draws random numbers (dropout?): their order would "
                "depend on timing; use engine='loop' or 'vmap'"
            )
        return torch.stack([losses[worker] for worker in workers])

    def _pool_of(self, size: int) -> ThreadPoolExecutor:
        if self._pool is None or self._pool_size != size:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool, self._pool_size = _single_threaded_pool(size), size
        return self._pool


class VmapEngine(Engine):
    """All workers in one call of torch.func.vmap. Batches must have one shape, and operators batching rules.

    Every worker draws its own random numbers. Buffers that the model changes in place (batch-norm statistics) are
    carried per worker; a model that replaces a buffer by another tensor is refused. The training mode must be the
    same for all workers.
    """

    name: EngineName = "vmap"

    def __init__(self, workers: Workers) -> None:
        super().__init__(workers)
        template = workers.models[0]
        self._call = _ClosureModule(template)
        self._parameters = {
            f"model.{name}": stacked for name, stacked in zip(workers.names, workers.stacked_parameters, strict=True)
        }
        self._modules = [list(model.modules()) for model in workers.models]
        self._buffer_names = [name for name, _ in template.named_buffers()]

    def gradients(
        self, closure: Closure, batches: Sequence[Any], stacked: Any = None, active: Sequence[int] | None = None
    ) -> Tensor:
        modes = [module.training for module in self._modules[0]]
        for worker, modules in enumerate(self._modules):
            if [module.training for module in modules] != modes:
                raise ValueError(
                    f"engine='vmap' needs one training mode for all workers, but worker {worker} differs from worker 0"
                )
        if stacked is None:
            stacked = _stack(batches, "batch")
        own = {name: [model.get_buffer(name) for model in self.workers.models] for name in self._buffer_names}
        buffers = {f"model.{name}": _stack(per_worker, f"buffer {name}") for name, per_worker in own.items()}
        forget_cast_parameters()

        def loss_of(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any) -> Tensor:
            loss: Tensor = functional_call(self._call, (parameters, buffers), (closure, batch))
            return loss

        batched = vmap(grad_and_value(loss_of), randomness="different")
        try:
            gradients, losses = batched(self._parameters, buffers, stacked)
        except RuntimeError as error:
            where = _innermost_module(self.workers.models[0], error.__traceback__)
            raise ValueError(
                f"engine='vmap' can't run {where}: {str(error).splitlines()[0]} (engine='loop' runs any model)"
            ) from error
        for name, per_worker in own.items():
            for buffer, values in zip(per_worker, buffers[f"model.{name}"], strict=True):
                buffer.detach().copy_(values)
        with torch.no_grad():
            torch._foreach_copy_(self.workers.stacked_gradients, [gradients[name] for name in self._parameters])
        return losses.detach() if active is None else losses.detach()[list(active)]  # type: ignore[no-any-return]


class _ClosureModule(nn.Module):
    """Makes ``closure(model, batch)`` something that functional_call can run with other parameters in the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, closure: Closure, batch: Any) -> Tensor:
        given = dict(self.model.named_buffers())
        loss: Tensor = closure(self.model, batch)
        _check_loss(loss)
        for name, buffer in self.model.named_buffers():
            if given.get(name) is not buffer:
                owner = self.model.get_submodule(name.rpartition(".")[0])
                raise ValueError(
                    f"engine='vmap' can't run {type(owner).__name__} ({name.rpartition('.')[0] or 'the model'}): it "
                    f"replaces its buffer {name!r} instead of changing it in place; use engine='loop'"
                )
        return loss


class BufferSnapshot:
    """The buffers of some models as they are now, to be put back if the step fails."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._saved = [
            (module._buffers, name, buffer, None if buffer is None else buffer.clone())
            for model in models
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]

    def restore(self) -> None:
        """Put the values back, and the tensors themselves where they have been replaced."""
        for owner, name, buffer, values in self._saved:
            if buffer is not None and values is not None:
                buffer.detach().copy_(values)
            owner[name] = buffer


def check_name(name: Any, names: Sequence[str] = NAMES) -> None:
    """Raise ValueError unless ``name`` is one of ``names``; suggest the nearest."""
    if name in names:
        return
    hint = did_you_mean(name, names, f"there are {', '.join(names)}")
    raise ValueError(f"engine {name!r} is not known, {hint}")


def make(name: EngineName, workers: Workers) -> Engine:
    """Build an engine by name."""
    check_name(name)
    engines: dict[str, type[Engine]] = {"loop": LoopEngine, "threads": ThreadsEngine, "vmap": VmapEngine}
    return engines[name](workers)


def choose(
    workers: Workers, closure: Closure, batches: Sequence[Any], stacked: Any = None
) -> tuple[Engine, dict[str, float]]:
    """Measure the engines that can run this model on these batches.

    Parameters, buffers and the states of random generators (torch's, numpy's global one and Python's) are afterwards as
    before; other traces that a closure leaves, such as its own counters, stay.

    Returns:
        The fastest engine (the loop, unless another is clearly faster), and the least seconds per call of each.

    Raises:
        Exception: what the loop engine raises, if it can't run the model either.
    """
    candidates: list[EngineName] = ["loop", "vmap"]
    if workers.device.type == "cpu" and torch.get_num_threads() > 1 and len(batches) > 1:
        candidates.append("threads")
    seconds: dict[str, float] = {}
    buffers = BufferSnapshot(workers.models)
    engines: dict[EngineName, Engine] = {}
    with _random_states_kept(workers.device):
        try:
            for name in candidates:
                engine = make(name, workers)
                try:
                    engine.gradients(closure, batches, stacked)  # the first call allocates, and may not be possible
                except (TypeError, ValueError, RuntimeError):
                    if name == "loop":
                        raise
                    continue
                engines[name] = engine
            for _ in range(_MEASURED_STEPS):
                for name, engine in engines.items():
                    _synchronize(workers.device)
                    start = time.perf_counter()
                    engine.gradients(closure, batches, stacked)
                    _synchronize(workers.device)
                    seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
        finally:
            buffers.restore()
    fastest = min(engines, key=lambda name: seconds[name] * (_ADVANTAGE if name == "loop" else 1.0))
    return engines[fastest], seconds


def _all_or(active: Sequence[int] | None, batches: Sequence[Any]) -> Sequence[int]:
    return range(len(batches)) if active is None else active


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a torch.Tensor, got {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"the loss must be a scalar, got shape {list(loss.shape)}; use the mean over the batch")
    if not loss.is_floating_point():
        raise ValueError(f"the loss must be a floating-point number, got {loss.dtype}")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on the trainable parameters (was it computed under no_grad?)")


def forget_cast_parameters() -> None:
    """Autocast keeps casts of parameters until its context ends; steps inside one context would see old values."""
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


def _single_threaded_pool(size: int) -> ThreadPoolExecutor:
    """A pool of ``size`` threads in which torch's operators use one thread; the caller's setting is as before.

    ``torch.set_num_threads`` sets OpenMP and MKL for the calling thread, and a number that threads take over when they
    first ask. So each thread must ask first, then set its own, and then the common number is put back.
    """
    common = torch.get_num_threads()
    everyone = Barrier(size)

    def initialize() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(size, "qgm_ext-gradients", initializer=initialize)
    try:
        wait([pool.submit(everyone.wait) for _ in range(size)])
    finally:
        torch.set_num_threads(common)
    return pool


def _stack(values: Sequence[Any], what: str) -> Any:
    """One nested structure of tensors [n, ...] from n nested structures of tensors [...]."""
    first = values[0]
    if isinstance(first, Tensor):
        for worker, value in enumerate(values):
            if not isinstance(value, Tensor) or value.shape != first.shape or value.dtype != first.dtype:
                got = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"engine='vmap' needs the same shapes for all workers: {what} of worker {worker} is {got}, of "
                    f"worker 0 {list(first.shape)} {first.dtype}; use engine='loop'"
                )
        return torch.stack(list(values))
    if isinstance(first, dict):
        if any(not isinstance(value, dict) or value.keys() != first.keys() for value in values):
            raise ValueError(f"engine='vmap' needs the same keys in the {what} of every worker")
        return {key: _stack([value[key] for value in values], f"{what}[{key!r}]") for key in first}
    if isinstance(first, (tuple, list)):
        if any(type(value) is not type(first) or len(value) != len(first) for value in values):
            raise ValueError(f"engine='vmap' needs as many entries in the {what} of every worker")
        parts = [_stack([value[k] for value in values], f"{what}[{k}]") for k in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    raise TypeError(f"engine='vmap' takes batches of tensors, tuples, lists and dicts, got {type(first).__name__}")


def _innermost_module(model: nn.Module, traceback: TracebackType | None) -> str:
    """The module whose forward an exception came from, as 'Type (its name)'."""
    names = {id(module): name for name, module in model.named_modules()}
    found = f"{type(model).__name__} or the loss"
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if id(owner) in names and isinstance(owner, nn.Module):
            found = f"{type(owner).__name__} ({names[id(owner)] or 'the model'})"
        traceback = traceback.tb_next
    return found


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what a closure may draw from
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
