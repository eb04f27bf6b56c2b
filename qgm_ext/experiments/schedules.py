"""Learning-rate schedules: the step size as a pure function of the step number, so that nothing has to be resumed.

Warm-up is linear per iteration and starts above zero, as in the runs of Lin et al., "Quasi-Global Momentum" (ICML
2021); "step" is a decay by 10, theirs at one half and three quarters of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qgm_ext.algorithms import check_number

__all__ = ["Schedule", "check_milestones", "names"]

Milestones = tuple[float, ...]


def _constant(progress: float, milestones: Milestones) -> float:
    return 1.0


def _step(progress: float, milestones: Milestones) -> float:
    return 1.0 / float(10 ** sum(progress >= milestone for milestone in milestones))


def _cosine(progress: float, milestones: Milestones) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


_SHAPES: dict[str, Callable[[float, Milestones], float]] = {"constant": _constant, "cosine": _cosine, "step": _step}


def names() -> list[str]:
    """The names of the schedules, sorted.

    Example:
        >>> names()
        ['constant', 'cosine', 'step']
    """
    return sorted(_SHAPES)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The step size of every step.

    - "constant": lr;
    - "step": lr, divided by 10 at each of the milestones;
    - "cosine": lr (1 + cos(pi t / num_steps)) / 2, warm-up included in t.

    In the first ``warmup_steps`` steps the factor is multiplied by a line from warmup_from / lr, in step 0, to 1.

    Args:
        name: one of :func:`names`.
        lr: the peak, >= 0.
        num_steps: steps of the whole run, >= 0.
        warmup_steps: in [0, num_steps].
        warmup_from: step size of step 0 if there is a warm-up, in [0, lr].
        milestones: of "step", shares of the run in (0, 1), ascending.

    Example:
        >>> schedule = Schedule(name="step", lr=1.0, num_steps=8, warmup_steps=2, warmup_from=0.5)
        >>> [schedule.at(step) for step in range(8)]
        [0.5, 0.75, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """

    name: str
    lr: float
    num_steps: int
    warmup_steps: int = 0
    warmup_from: float = 0.0
    milestones: Milestones = (0.5, 0.75)

    def __post_init__(self) -> None:
        if self.name not in _SHAPES:
            raise ValueError(f"schedule must be one of {', '.join(names())}, got {self.name!r}")
        check_number("lr", self.lr, low=0.0)
        check_number("num_steps", self.num_steps, low=0)
        check_number("warmup_steps", self.warmup_steps, low=0, high=self.num_steps)
        check_number("warmup_from", self.warmup_from, low=0.0, high=self.lr)
        object.__setattr__(self, "milestones", check_milestones(self.milestones))

    def at(self, step: int) -> float:
        """The step size of step number ``step``, from 0."""
        lr = self.lr
        if step < self.warmup_steps:
            lr = self.warmup_from + (self.lr - self.warmup_from) * step / self.warmup_steps
        return lr * _SHAPES[self.name](step / self.num_steps if self.num_steps else 0.0, self.milestones)


def check_milestones(milestones: Sequence[float]) -> Milestones:
    """Milestones as a tuple.

    Raises:
        TypeError, ValueError: if they are not ascending numbers in (0, 1).
    """
    if isinstance(milestones, str) or not isinstance(milestones, Sequence):
        raise TypeError(f"milestones must be a list of numbers, got {milestones!r}")
    for milestone in milestones:
        check_number("milestones", milestone, low=0.0, high=1.0)
    found = tuple(map(float, milestones))
    if sorted(set(found)) != list(found) or not all(0 < milestone < 1 for milestone in found):
        raise ValueError(f"milestones must be ascending shares of the run in (0, 1), got {list(milestones)}")
    return found
