"""FlatParameters: the parameters of one group, dtype and device in one buffer, so that one pass steps them all.

A model goes on using its parameters: each ``parameter.data`` becomes a view of the buffer, and so does its state. Code
that knows nothing of it throws such views away (``model.to()``, ``parameter.data = ...``, ``load_state_dict``,
``copy.deepcopy``); every step compares what it finds with the views and, where they differ, takes the value over and
binds the view again.

Gradients are taken as backward leaves them. Small ones are gathered into one vector; a large parameter (see LARGE) is
stepped by a call of its own that reads ``.grad`` in place. Permanent views for ``.grad`` would cost more: zeroing
(write), then backward accumulating into them (read, read, write) is four times the traffic of the gradient, gathering
is two, reading in place none; and ``grad is None`` keeps its meaning, "leave this parameter alone".

Groups, hyper-parameters and checkpoints are the business of :mod:`qgm_ext.optim.base`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from qgm_ext.algorithms import Algorithm
from qgm_ext.distributed.engine import Vectors
from qgm_ext.flat import FlatLayout
from qgm_ext.ops import compute_dtype
from qgm_ext.optim.runtime import Update

__all__ = ["LARGE", "FlatParameters", "check_memory", "check_parameter"]

# Elements from which a parameter is stepped by a call of its own. On a CPU the call (about 25 us) then costs less than
# gathering the gradient (about 25 us from cache at this size, several times that from memory). A GPU copies so fast
# that the call always costs more: there the bound keeps the gathered vector, which is memory, to the small parameters.
LARGE = {"cpu": 1 << 18, "cuda": 1 << 22}

State = MutableMapping[Tensor, dict[str, Any]]
Run = tuple[int, int]  # parameters first to last - 1, neighbours in the buffer


class FlatParameters:
    """A buffer that holds some parameters, and buffers for their state.

    Args:
        params: parameters of one dtype and device, checked by :func:`check_parameter`. Their values move into the
            buffer: from now on each ``parameter.data`` is a view of it.
        strides: to be given to them, without gaps or overlap.
        whole: they are always stepped together, as :meth:`vectors`: in the given order, gradients gathered. Other
            workers count on that order and on the strides, which then stay the same.

    Attributes:
        params: in the order of the buffer: small ones (fewer than LARGE elements) first, unless ``whole``.
        x: the buffer, [size].
        steps: how many steps each parameter has taken, [len(params)] int64 on the CPU.
    """

    def __init__(self, params: Sequence[Tensor], strides: Sequence[tuple[int, ...]], *, whole: bool = False) -> None:
        self.dtype, self.device = params[0].dtype, params[0].device
        large = sys.maxsize if whole else LARGE[self.device.type]
        order = sorted(range(len(params)), key=lambda i: params[i].numel() >= large)  # sorted is stable
        self.params = [params[i] for i in order]
        self._num_small = sum(p.numel() < large for p in params)
        self._strides = [strides[i] for i in order]
        self._whole = whole
        self._layout = FlatLayout([p.shape for p in self.params], self._strides)
        self.x = self._layout.allocate(dtype=self.dtype, device=self.device)
        self._views = self._view(self.x)
        self.steps = torch.zeros(len(self.params), dtype=torch.int64)
        self._buffers: dict[str, Tensor] = {}
        self._bound: list[dict[str, Tensor]] = [{"step": step} for step in self.steps]
        small_end = self._layout.offsets[self._num_small] if self._num_small < len(self.params) else self._layout.size
        self._gathered = torch.zeros(small_end, dtype=self.dtype, device=self.device)
        self._gather_views = self._view(self._gathered, self._num_small)
        self._all = self._runs([True] * len(self.params), [0] * len(self.params))
        self._slices: dict[Run, tuple[Tensor, Tensor | None, list[Tensor]]] = {}
        self._vectors: Vectors | None = None
        for p, view in zip(self.params, self._views, strict=True):
            view.copy_(p)
        for p, view in zip(self.params, self._views, strict=True):
            p.data = view

    def _view(self, buffer: Tensor, count: int | None = None) -> list[Tensor]:
        places = zip(self._layout.shapes[:count], self._strides[:count], self._layout.offsets[:count], strict=True)
        return [buffer.as_strided(shape, stride, offset) for shape, stride, offset in places]

    def holds_parameters(self, everything: Callable[[], Sequence[Tensor]]) -> bool:
        """Whether every parameter still is its view; parameters that only moved elsewhere in memory are taken back.

        Args:
            everything: gives all parameters of the optimizer, for :func:`check_memory` if one has moved.

        Returns:
            False if a parameter has another shape, dtype, device or (unless ``whole``) memory format than before. The
            caller then makes new FlatParameters, which adopt the state.
        """
        try:
            if all(map(torch.Tensor.is_set_to, self.params, self._views)):
                return True
        except (NotImplementedError, RuntimeError):  # on another device; found below
            pass
        moved = []
        for p, view, stride in zip(self.params, self._views, self._strides, strict=True):
            if p.dtype != self.dtype or p.device != self.device or p.shape != view.shape:
                return False
            if not self._whole and dense_strides(p) != stride:
                return False
            if not p.is_set_to(view):
                moved.append((p, view))
        check_memory(everything())
        # Cloned, because the new memory may be a piece of this very buffer, as after exchanging two parameters.
        values = [p.detach().clone() if self._shares_memory(p) else p.detach() for p, _ in moved]
        for (p, view), value in zip(moved, values, strict=True):
            view.copy_(value)
            p.data = view
        return True

    def _shares_memory(self, tensor: Tensor) -> bool:
        pointer = tensor.untyped_storage().data_ptr()
        return any(pointer == own.untyped_storage().data_ptr() for own in (self.x, *self._buffers.values()))

    def _use_state(self, names: Sequence[str], state: State) -> None:
        """Keep exactly the state vectors ``names``; new ones start at zero."""
        dropped = self._buffers.keys() - set(names)
        compute = compute_dtype(self.dtype)
        self._buffers = {
            name: self._buffers[name]
            if name in self._buffers
            else self._layout.allocate(dtype=compute, device=self.device)
            for name in names
        }
        views = {name: self._view(buffer) for name, buffer in self._buffers.items()}
        for i, p in enumerate(self.params):
            old = self._bound[i]
            self._bound[i] = {name: old.get(name, views[name][i]) for name in names} | {"step": old["step"]}
            for name in dropped & state.get(p, {}).keys():
                del state[p][name]
        self._slices.clear()
        self._vectors = None

    def _bind_state(self, indices: Sequence[int], state: State) -> None:
        """Make the state of these parameters views of the buffers, with the values found in ``state``, else zero."""
        found: list[tuple[Tensor, Tensor | None]] = []
        for i in indices:
            entry = state.get(self.params[i], {})
            for name, view in self._bound[i].items():
                value = entry.get(name)
                if value is view:
                    continue
                if value is not None:
                    value = torch.as_tensor(value)
                    if value.shape != view.shape:
                        raise ValueError(
                            f"state {name!r} of a parameter must have its shape {list(view.shape)}, got "
                            f"{list(value.shape)}; was the parameter replaced by one of another shape?"
                        )
                    # Cloned, because it may be the view of another parameter that is bound here too.
                    value = value.clone() if name == "step" or self._shares_memory(value) else value
                found.append((view, value))
        for view, value in found:
            view.zero_() if value is None else view.copy_(value)
        for i in indices:
            p = self.params[i]
            state[p] = {**state.get(p, {}), **self._bound[i]}

    def prepare(self, state: State, algorithm: Algorithm, lr: float, maximize: bool) -> tuple[list[Update], list[int]]:
        """Bind state and gather gradients for one step; no parameter and no state value changes.

        Args:
            state: the optimizer's state, brought in line with the buffers.
            algorithm: what to do; it makes the numbers of each update from its step count.
            lr: step size.
            maximize: step along the gradient instead of against it.

        Returns:
            The updates, and the indices of the parameters that take part: those whose ``.grad`` is not None.

        Raises:
            TypeError: if a gradient is sparse.
            ValueError: if a state vector does not have the parameter's shape.
        """
        rule, state_names = algorithm.rule, algorithm.state_names
        if tuple(self._buffers) != state_names:
            self._use_state(state_names, state)
        grads: list[Any] = []
        active, unbound = [], []
        names = (*state_names, "step")
        for i, p in enumerate(self.params):  # the hot loop: about 1 us for each parameter
            grad = p.grad
            grads.append(grad)
            if grad is None:
                continue
            active.append(i)
            if grad.is_sparse:
                raise _sparse_gradient(p)
            entry = state.get(p)
            if entry is None or not all(map(is_, map(entry.get, names), self._bound[i].values())):
                unbound.append(i)
        if unbound:
            self._bind_state(unbound, state)
        counts = self.steps.tolist()
        if len(active) == len(grads) and counts.count(counts[0]) == len(counts):
            runs = self._all
        else:
            runs = self._runs([grad is not None for grad in grads], counts)
        self._gather([i for i in active if i < self._num_small] if len(active) < len(grads) else None, grads)
        updates = []
        for run in runs:
            x, grad, vectors = self._slice(run)
            if grad is None:
                grad = self._large_gradient(self._views[run[0]], grads[run[0]], maximize)
            elif maximize:
                grad.neg_()
            updates.append(Update(x, grad, vectors, rule, algorithm.hyper(counts[run[0]], lr)))
        return updates, active

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(first, length) of each parameter in the buffer."""
        return self._layout.segments

    def vectors(self, state: State, names: Sequence[str]) -> tuple[Vectors, bool]:
        """Bind the state of all parameters; nothing changes, and gradients are not gathered yet.

        Args:
            state: the optimizer's state, brought in line with the buffers.
            names: of the state vectors.

        Returns:
            The vectors, and whether the state is new, that is, zero.

        Raises:
            ValueError: as :meth:`prepare`, or if parameters have taken different numbers of steps.
        """
        if tuple(self._buffers) != tuple(names):
            self._use_state(names, state)
        fresh = not any(state.get(p) for p in self.params)
        keys = (*names, "step")
        unbound = [
            i
            for i, p in enumerate(self.params)
            if not all(map(is_, map(state.get(p, {}).get, keys), self._bound[i].values()))
        ]
        if unbound:
            self._bind_state(unbound, state)
        counts = self.steps.tolist()
        if counts.count(counts[0]) < len(counts):
            raise ValueError(
                "parameters that are averaged with other workers step together, but those of one group have taken "
                f"{min(counts)} to {max(counts)} steps; was the state of some of them loaded or deleted?"
            )
        if self._vectors is None:
            found = {name: buffer[None] for name, buffer in self._buffers.items()}
            self._vectors = Vectors(self.x[None], self._gathered[None], found, self._layout)
        return self._vectors, fresh

    def gather(self, indices: Iterable[int], maximize: bool) -> None:
        """Gather the gradients of some parameters, zero where there is none.

        Args:
            indices: of the parameters.
            maximize: step along the gradient instead of against it.

        Raises:
            TypeError: if a gradient is sparse.
        """
        targets, grads = [], []
        for i in indices:
            p = self.params[i]
            if p.grad is None:
                self._gather_views[i].zero_()
                continue
            if p.grad.is_sparse:
                raise _sparse_gradient(p)
            targets.append(self._gather_views[i])
            grads.append(p.grad)
        if targets:
            torch._foreach_copy_(targets, grads)
            if maximize:
                torch._foreach_neg_(targets)

    def advance(self, active: Sequence[int]) -> list[Tensor]:
        """Count a step of the parameters ``active``, and return them."""
        if len(active) == len(self.params):
            self.steps.add_(1)
            return self.params
        self.steps[torch.tensor(active, dtype=torch.int64)] += 1
        return [self.params[i] for i in active]

    def _runs(self, present: Sequence[bool], counts: Sequence[int]) -> list[Run]:
        """Runs of neighbours that have a gradient and the same step count; a large parameter is alone."""
        runs: list[Run] = []
        for i, here in enumerate(present):
            if not here or self._layout.shapes[i].numel() == 0:
                continue
            if runs and runs[-1][1] == i and i < self._num_small and counts[i] == counts[i - 1]:
                runs[-1] = (runs[-1][0], i + 1)
            else:
                runs.append((i, i + 1))
        return runs

    def _slice(self, run: Run) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """x, the gathered gradient (None for a large parameter) and the state vectors of a run, each [1, L]."""
        found = self._slices.get(run)
        if found is None:
            first, last = run
            begin = self._layout.offsets[first]
            end = self._layout.offsets[last - 1] + self._layout.shapes[last - 1].numel()
            grad = self._gathered[None, begin:end] if last <= self._num_small else None
            found = (self.x[None, begin:end], grad, [vector[None, begin:end] for vector in self._buffers.values()])
            if len(self._slices) > 4 * len(self.params):  # gradients that come and go at random: don't pile up views
                self._slices.clear()
            self._slices[run] = found
        return found

    def _gather(self, active: Sequence[int] | None, grads: list[Any]) -> None:
        """Copy the gradients of small parameters into their vector; None for all of them."""
        if active is None:
            targets, sources = self._gather_views, grads[: self._num_small]
        else:
            targets, sources = [self._gather_views[i] for i in active], [grads[i] for i in active]
        if targets:
            torch._foreach_copy_(targets, sources)

    def _large_gradient(self, view: Tensor, grad: Any, maximize: bool) -> Tensor:
        """The gradient of a large parameter in the order of the buffer, [1, L]: itself if it can be read in place."""
        in_place = (
            not maximize
            and grad.dtype == view.dtype
            and grad.stride() == view.stride()
            and not grad.is_neg()
            and not self._shares_memory(grad)
        )
        if not in_place:
            grad = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=view.device).copy_(grad)
            if maximize:
                grad.neg_()
        flat: Tensor = grad.detach().as_strided((1, view.numel()), (view.numel(), 1))
        return flat


def _sparse_gradient(p: Tensor) -> TypeError:
    return TypeError(
        f"gradients must be dense, but that of a parameter of shape {list(p.shape)} is sparse: build its "
        "layer with sparse=False"
    )


def dense_strides(p: Tensor) -> tuple[int, ...]:
    """The strides of p without gaps or overlap, in the order of its dimensions in memory (channels_last stays)."""
    return torch.empty_like(p, device="meta").stride()


def check_parameter(p: Tensor) -> None:
    """Refuse a parameter that can't live in a flat buffer.

    Raises:
        TypeError: if its dtype, device or type is not supported.
        ValueError: if its gradient does not fit it, or it is in memory shared with other processes.
    """
    what = f"a parameter of shape {list(p.shape)}"
    if type(p.data) is not torch.Tensor:
        raise TypeError(f"parameters must be plain tensors, got {what} of type {type(p.data).__name__}")
    if p.layout != torch.strided:
        raise TypeError(f"parameters must be dense, got {what} with layout {p.layout}")
    compute_dtype(p.dtype)
    if p.device.type not in ("cpu", "cuda"):
        raise TypeError(f"parameters must be on cpu or cuda, got {what} on {p.device}")
    if p.device.type == "cpu" and p.is_shared():  # type: ignore[no-untyped-call]
        raise ValueError(
            f"{what} is in memory shared with other processes, and would leave it: the optimizer moves parameters "
            "into its own buffer. Share the memory after the first step, or not at all"
        )
    if p.grad is not None and (p.grad.shape != p.shape or p.grad.device != p.device):
        raise ValueError(
            f"the gradient of {what} on {p.device} must have its shape and device, "
            f"got {list(p.grad.shape)} on {p.grad.device}"
        )


def check_memory(params: Sequence[Tensor]) -> None:
    """Refuse different parameters that share memory: moved into a buffer, they would come apart.

    Raises:
        ValueError: if two overlap, or one overlaps itself (as an expanded tensor does).
    """
    spans = sorted(_spans(params), key=lambda span: span[:2])
    for ((device, _), stop, p), ((other, begin), _, q) in itertools.pairwise(spans):
        if device == other and begin < stop:
            raise ValueError(
                f"parameters of shapes {list(p.shape)} and {list(q.shape)} share memory: pass one of them, or use "
                "the same Parameter object in both places"
            )


def _spans(params: Sequence[Tensor]) -> Iterator[tuple[tuple[str, int], int, Tensor]]:
    for p in params:
        if p.numel() == 0 or p.device.type not in ("cpu", "cuda"):
            continue
        extent = 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
        if extent < p.numel():
            raise ValueError(
                f"a parameter of shape {list(p.shape)} with strides {p.stride()} overlaps itself in memory: pass a "
                "contiguous copy"
            )
        begin = p.data_ptr()
        yield (str(p.device), begin), begin + extent * p.element_size(), p
