"""Overlap: with overlap=True the buckets of a step are made and sent during backward, and step() merges.

A hook on each parameter copies its gradient when backward has accumulated it; when a bucket has all of its gradients,
its local step is taken and its messages leave. What is not there when step() is called, because a parameter was not
used, is done then. Parameters change in step() alone, so backward sees the old ones. Messages are those of a step
without overlap, in another order, and so are all bits.

What follows from sending early:

- Gradients, parameters and hyper-parameters (lr) must not change between backward() and step(): that is a RuntimeError,
  and the run can't go on, because the messages have left. Set lr before backward(), or after step() as schedulers do.
- With several backward passes for one step all but the last belong in ``opt.no_sync()``; a gradient that comes after
  its bucket has left is a RuntimeError.
- A step that needs the whole gradient first can't be overlapped: the option clip_grad_norm, on_nonfinite="skip" and
  "raise", torch.amp.GradScaler, algorithms that take more than one pass over the vectors (relayed sums and exact means
  among them). Then nothing is sent early, a warning says so once, and ``opt.overlap_obstacle`` says why. With
  torch.nn.utils.clip_grad_norm_ use overlap=False: here it comes too late, which is an error.
- The first step is not overlapped: parameters and state get their places in it. Nor is a local step (no_gossip()), or
  a single one with more passes (slowmo).

Workers may differ in what they send early. It needs Gloo, which tells messages apart by tags; NCCL would want all
workers to send in the same order.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qgm_ext.algorithms import Algorithm
from qgm_ext.distributed.engine import Turn
from qgm_ext.distributed.gossip import Round
from qgm_ext.optim.peers import Peers, Work
from qgm_ext.optim.runtime import OneWorker
from qgm_ext.optim.together import collect_works

if TYPE_CHECKING:
    from qgm_ext.optim.base import DecentralizedOptimizer

__all__ = ["Overlap", "overlap_for"]


@dataclass
class _Begun:
    """A step that backward has begun.

    Args:
        works, turns, rounds: one for each flat buffer.
        places: (buffer, index in it) of each parameter, by id.
        buckets: of each buffer the buckets that each parameter lies in.
        missing: of each buffer how many gradients each bucket waits for.
        taken: the gradient of each parameter that has come, and the versions of both tensors.
    """

    works: list[Work]
    turns: list[Turn]
    rounds: list[Round]
    places: dict[int, tuple[int, int]]
    buckets: list[list[range]]
    missing: list[list[int]]
    taken: dict[tuple[int, int], tuple[Tensor, int, int]] = field(default_factory=dict)


class Overlap:
    """Begins the steps of one optimizer during backward.

    Args:
        optimizer: whose steps; only weakly referenced.
        peers: its runtime.

    Attributes:
        obstacle: why no step is begun early; None if steps are.
    """

    def __init__(self, optimizer: DecentralizedOptimizer, peers: Peers) -> None:
        self._optimizer, self._peers = weakref.ref(optimizer), peers
        self._watched: dict[int, tuple[Tensor, Any]] = {}
        self._begun: _Begun | None = None
        self._idle = self._paused = self._has_worked = False
        self.obstacle: str | None = None
        if peers.options.clip_grad_norm is not None:
            self._give_up("clip_grad_norm needs the whole gradient first")
        elif optimizer.on_nonfinite != "ignore":
            self._give_up(f"on_nonfinite={optimizer.on_nonfinite!r} needs the whole gradient first, 'ignore' does not")
        elif peers.exchange is None or peers.exchange.backend != "gloo":
            self._give_up("it needs a process group with the backend gloo")

    @property
    def has_begun(self) -> bool:
        """Whether a part of the next step has been taken."""
        return self._begun is not None

    def _give_up(self, reason: str) -> None:
        self.obstacle = reason
        warnings.warn(f"overlap=True has no effect: {reason}", stacklevel=2)

    def look_ahead(self, algorithms: Iterable[Algorithm]) -> None:
        """Give up if a usual step of one of these is not a single pass."""
        for algorithm in algorithms:
            if self.obstacle is None and not self._peers.has_only_pass(algorithm):
                self._give_up(_many_passes(algorithm))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which gradients only accumulate."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def watch(self, works: Sequence[Work]) -> None:
        """After a step: get the gradients of these parameters as they come."""
        self._idle = False
        optimizer = self._optimizer()
        if self.obstacle is None and optimizer is not None and hasattr(optimizer, "found_inf"):
            self._give_up("torch.amp.GradScaler needs the whole gradient first")
        if self.obstacle is not None:
            for _, handle in self._watched.values():
                handle.remove()
            self._watched = {}
            return
        for p in (p for work in works for p in work.flat.params):
            # A parameter that has no gradient of its own is stepped in step().
            if id(p) not in self._watched and p.requires_grad:
                self._watched[id(p)] = (p, p.register_post_accumulate_grad_hook(self._hook()))  # type: ignore[no-untyped-call]

    def _hook(self) -> Any:
        myself = weakref.ref(self)  # a model must not keep its old optimizers alive

        @torch.no_grad()
        def take(p: Tensor) -> None:
            overlap = myself()
            if overlap is not None:
                overlap._take(p)

        return take

    def _take(self, p: Tensor) -> None:
        """A gradient has come."""
        optimizer = self._optimizer()
        if optimizer is None or self._paused or self._idle or self.obstacle is not None or not optimizer._gossips:
            return
        if self._begun is None:
            self._begun = self._begin(optimizer)
        begun = self._begun
        if begun is None:
            self._idle = True  # until the next step
            return
        place = begun.places.get(id(p))
        if place is None:  # not in a buffer yet; step() will see to it
            return
        buffer, index = place
        rounds, missing = begun.rounds[buffer], begun.missing[buffer]
        again = place in begun.taken
        if again and any(rounds.has_sent(bucket) for bucket in begun.buckets[buffer][index]):
            raise RuntimeError(
                f"a parameter of shape {list(p.shape)} got another gradient after the step had begun with its first: "
                "with overlap=True all backward passes before a step but the last belong in `with opt.no_sync():`, and "
                "each of these groups of passes needs its step()"
            )
        work = begun.works[buffer]
        work.flat.gather((index,), work.maximize)
        assert p.grad is not None
        begun.taken[place] = (p.grad, p.grad._version, p._version)
        if again:
            return
        for bucket in begun.buckets[buffer][index]:
            missing[bucket] -= 1
            if missing[bucket] == 0:
                rounds.send(bucket)

    def _begin(self, optimizer: DecentralizedOptimizer) -> _Begun | None:
        works = collect_works(optimizer, self._peers)
        if any(work.fresh for work in works):
            return None
        turns, rounds = self._peers.turns(works, True), []
        for work, turn in zip(works, turns, strict=True):
            part = turn.only_pass()
            if part is None:
                if not self._has_worked:
                    self._give_up(_many_passes(work.algorithm))
                return None
            begun = turn.begin_early(part)
            if begun is None:
                return None
            rounds.append(begun)
        places, buckets, missing = {}, [], []
        for buffer, (work, sent) in enumerate(zip(works, rounds, strict=True)):
            width = sent.places[0].stop
            spans = [
                range(first // width, (first + length - 1) // width + 1) if length else range(0)
                for first, length in work.flat.segments
            ]
            counts = [0] * len(sent.places)
            for index, (p, span) in enumerate(zip(work.flat.params, spans, strict=True)):
                places[id(p)] = (buffer, index)
                for bucket in span:
                    counts[bucket] += 1
            buckets.append(spans)
            missing.append(counts)
        self._has_worked = True
        return _Begun(works, turns, rounds, places, buckets, missing)

    def finish(self, now: Sequence[Work]) -> list[Work]:
        """Take what is left of the step that has begun.

        Args:
            now: the works as :func:`qgm_ext.optim.together.collect_works` finds them in step().

        Returns:
            The works of the step.

        Raises:
            RuntimeError: if something has changed since their gradients came.
        """
        begun, optimizer = self._begun, self._optimizer()
        assert begun is not None
        assert optimizer is not None
        changed = self._what_changed(optimizer, begun, now)
        if changed is not None:
            raise RuntimeError(
                f"{changed} between backward() and step(), but with overlap=True a part of the step has been sent to "
                "the other workers by then; use overlap=False"
            )
        for buffer, work in enumerate(begun.works):
            rest = [index for index in range(len(work.flat.params)) if (buffer, index) not in begun.taken]
            work.flat.gather(rest, work.maximize)
        self._peers.finish(begun.turns)
        self._begun = None
        return begun.works

    @staticmethod
    def _what_changed(optimizer: DecentralizedOptimizer, begun: _Begun, now: Sequence[Work]) -> str | None:
        if not optimizer._gossips:
            return "no_gossip() was entered"
        if hasattr(optimizer, "found_inf"):
            return "torch.amp.GradScaler came in"
        if len(now) != len(begun.works):
            return f"the number of flat buffers became {len(now)} from {len(begun.works)}"
        for one, then in zip(now, begun.works, strict=True):
            if one.vectors is not then.vectors or one.clock.number != then.clock.number:
                return "parameters were moved or state was loaded"
            if one.lr != then.lr:
                return f"lr became {one.lr} from {then.lr}"
            if one.maximize != then.maximize:
                return f"maximize became {one.maximize}"
            if one.algorithm != then.algorithm:
                return f"hyper-parameters became {one.algorithm} from {then.algorithm}"
        for (buffer, index), (grad, grad_version, version) in begun.taken.items():
            p = begun.works[buffer].flat.params[index]
            if p.grad is not grad or grad._version != grad_version:
                return f"the gradient of a parameter of shape {list(p.shape)} was changed"
            if p._version != version:
                return f"a parameter of shape {list(p.shape)} was changed"
        return None


def _many_passes(algorithm: Algorithm) -> str:
    return f"{algorithm.name} takes more than one pass over its vectors in a step"


def overlap_for(optimizer: DecentralizedOptimizer, runtime: OneWorker | Peers) -> Overlap | None:
    """The Overlap of an optimizer with its runtime, if it wants one and has others to talk to."""
    if isinstance(runtime, Peers) and runtime.options.overlap and runtime.num_workers > 1:
        return Overlap(optimizer, runtime)
    return None
