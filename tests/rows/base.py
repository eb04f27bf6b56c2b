"""What the tests know of an algorithm and of a rule, and what the rows of several families share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qgm_ext import topology

F64 = torch.float64
Array = Any  # an ndarray of float32 or float64
Point = Callable[["Quadratics", torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Digits:
    """How it learns handwritten digits that are split unevenly over 16 workers.

    The step size is a good one for so short a run, not the best for a long one.
    """

    lr: float
    topology: str = "ring"
    epochs: int = 10


@dataclass(frozen=True)
class AlgorithmRow:
    """What is known of an algorithm.

    Attributes:
        hyper: hyper-parameters to test with.
        point: where it goes on heterogeneous quadratics with constant lr, given problem and W; None: Adam's direction
            has no fixed length, so it ends near a point, not at one.
        digits: how it learns digits.
        n: number of workers.
        graph: what they are on.
        variants: further hyper-parameters under which its trajectories are compared with the reference.
        bytes_sent: by all workers in a step on that graph, with the default hyper-parameters and 100 float32
            parameters; None: as many vectors as the algorithm has messages, over every link.
        slow: for an algorithm that needs the Simulator: the slow text of its steps (rows.slow).
        cases: hyper-parameters to compare with the slow text, by name.
    """

    hyper: dict[str, Any]
    point: Point | None
    digits: Digits
    n: int = 8
    graph: Callable[[int], topology.Topology] = topology.ring
    variants: tuple[dict[str, Any], ...] = ()
    bytes_sent: int | None = None
    slow: Callable[..., Any] | None = None
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RuleRow:
    """What is known of a compiled rule.

    Attributes:
        text: the rule once more, in numpy, operation by operation in the order of its header: the oracle for bits.
        hyper: numbers to test with, in the order of the header.
        not_negative: which states are under a square root.
    """

    text: Callable[[Any, list[float]], Any]
    hyper: tuple[float, ...]
    not_negative: tuple[int, ...] = ()


def scalars(dtype: Any, *values: float) -> list[Any]:
    return [dtype(value) for value in values]


class NumpyRule:
    """A rule that sends x - eta g' and takes what it receives: DSGD, and what others change of it.

    numpy rounds every float32 operation, as the kernels must: no contraction, no re-association. Messages and state
    are in the compute dtype (float32, or float64 for float64 parameters); state is changed in place.
    """

    messages = 1

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        self.eta, self.wd = scalars(dtype, *hyper)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x - self.eta * (g + self.wd * x)]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        return mixed[0]


class Quadratics:
    """f_i(x) = sum_d a_id x_d^2 / 2 - b_id x_d with a ~ U(0.5, 2), b ~ 2 N(0, 1): heterogeneous, optimum known."""

    def __init__(self, n: int = 8, dim: int = 3, seed: int = 0) -> None:
        rng = np.random.RandomState(seed)
        self.a = torch.tensor(rng.uniform(0.5, 2.0, (n, dim)))
        self.b = torch.tensor(2 * rng.randn(n, dim))

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * x - self.b

    def of_worker(self, i: int) -> Quadratics:
        """The data of one worker at every worker."""
        same = copy.copy(self)
        same.a, same.b = self.a[i].expand_as(self.a), self.b[i].expand_as(self.b)
        return same

    @property
    def optimum(self) -> torch.Tensor:
        return self.b.mean(0) / self.a.mean(0)

    def solve(self, column: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Put together the solutions of single coordinates, each given its a and b of all workers."""
        return torch.stack([column(self.a[:, d], self.b[:, d]) for d in range(self.a.shape[1])], 1)

    def dsgd_fixed_point(self, w: torch.Tensor, lr: float) -> torch.Tensor:
        """x = W (x - lr (a x - b)), solved coordinate by coordinate."""
        eye = torch.eye(len(w), dtype=F64)
        columns = [
            torch.linalg.solve(eye - w @ (eye - lr * torch.diag(self.a[:, d])), lr * w @ self.b[:, d])
            for d in range(self.a.shape[1])
        ]
        return torch.stack(columns, 1)

    def sharp_gradient(self, x: torch.Tensor, rho: float) -> torch.Tensor:
        """The gradients a little up the slope, x_i + rho g_i / ||g_i||."""
        g = self.gradient(x)
        return self.gradient(x + rho * g / g.norm(dim=1, keepdim=True))


def stand_still(step: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """The point that a contracting step leaves where it is."""
    x = start
    for _ in range(5000):
        x, before = step(x), x
        if (x - before).abs().max() < 1e-14:
            return x
    raise AssertionError("the step does not come to rest")


def optimum(problem: Quadratics, w: torch.Tensor) -> torch.Tensor:
    return problem.optimum.expand(len(w), -1)


def dsgd_point(lr: float) -> Point:
    return lambda problem, w: problem.dsgd_fixed_point(w, lr)
