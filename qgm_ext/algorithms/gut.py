"""Global update tracking: GUT and QG-GUTm."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from qgm_ext.algorithms.base import Algorithm, Pass, State, Step, StepResult, check_number, register
from qgm_ext.topology import Topology


def check_equal_start(algorithm: Algorithm, x: Tensor) -> None:
    """Refuse workers that start from different parameters."""
    if not bool((x == x[0]).all()):
        raise ValueError(f"{algorithm.name} needs all workers to start from the same parameters; rows of x differ")


@dataclass(frozen=True, kw_only=True)
class _Tracking(Algorithm):
    """What GUT and QG-GUTm have in common."""

    source: ClassVar[str] = "Aketi et al. 2023, arXiv 2305.04792"
    needs: ClassVar[str] = "doubly stochastic, equal starts"

    scaling: float = 0.9
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scaling", self.scaling, low=0.0, high=1.0, high_open=True)
        check_number("gamma", self.gamma, low=0.0, high=1.0)
        if self.gamma == 0.0:
            raise ValueError("gamma must be in (0, 1], got 0: nothing would be averaged")

    @property
    def _form(self) -> tuple[float, Literal["plain", "heavy ball", "nesterov"]]:
        """Beta, and which momentum."""
        raise NotImplementedError

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        check_equal_start(self, x)
        if topology.is_time_varying or not topology.is_symmetric:
            return
        growth, worst = max((self.gossip_growth(float(value)), float(value)) for value in topology.eigenvalues)
        if growth > 1.0 + 1e-6:
            warnings.warn(
                f"{self.name} with scaling {self.scaling:g} and gamma {self.gamma:g} diverges on topology "
                f"{topology.name!r}: gossip alone grows by {growth:.3f} a step at its eigenvalue {worst:.3f}; use a "
                "smaller scaling, or a topology with a larger smallest eigenvalue",
                UserWarning,
                stacklevel=4,
            )

    def gossip_growth(self, eigenvalue: float) -> float:
        """By how much gossip without gradients multiplies a mode of the mixing matrix in a step, in the long run.

        Args:
            eigenvalue: of W, in [-1, 1].

        Returns:
            The spectral radius of the step on (p, p_prev, eta M); above 1 the method diverges.
        """
        beta, form = self._form
        apart = 1.0 - eigenvalue  # eta delta = (1 - l) p
        b = 1.0 + beta + (beta * beta if form == "nesterov" else 0.0)
        y = np.array(
            [apart - self.scaling * eigenvalue, self.scaling * (eigenvalue + b * apart - apart), 0.0]
        )  # eta y, in terms of (p, p_prev, eta M)
        m = np.array([0.0, 0.0, beta]) + y
        direction = {"plain": y, "heavy ball": m, "nesterov": y + beta * m}[form]
        kept = np.array([1.0 - (self.gamma - self.gamma**2) * apart, 0.0, 0.0])
        step = np.array([kept - direction, [1.0, 0.0, 0.0], m])
        return float(np.abs(np.linalg.eigvals(step)).max())

    def passes(self, step: Step) -> Iterator[Pass]:
        hyper = [step.lr, step.previous_lr, self._form[0], self.scaling, self.weight_decay, self.gamma]
        yield Pass(self.rule, hyper, self.state_names, step.mixing)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        """GUT and QG-GUTm; x = p + gamma r with a worker's own model p; the state's correction is y - g."""
        beta, nesterov = getattr(self, "momentum", 0.0), getattr(self, "nesterov", False)
        b = 1 + beta + (beta * beta if nesterov else 0)
        lr_before = float(state["previous_lr"]) if step else lr
        g, r = g + self.weight_decay * x, state["mixing_displacement"]
        delta = g - r / lr_before
        y = g + state["correction"]
        own, m = x - self.gamma * r, None
        if "momentum_buffer" in state:
            m = beta * state["momentum_buffer"] + y
            y = y + beta * m if nesterov else m
        own_new = own - lr * y + (self.gamma - self.gamma**2) * r
        r_new = w @ own_new - own_new
        # The next y is g - r_new / lr - (mu / lr) [W (own_new - own) + B (W - I) own] - mu delta.
        correction = -r_new / lr - self.scaling / lr * (w @ own_new - (own + r) + b * r) - self.scaling * delta
        out = {"mixing_displacement": r_new, "correction": correction, "previous_lr": torch.tensor(lr, dtype=x.dtype)}
        x_new = own_new + self.gamma * r_new
        return x_new, out if m is None else {**out, "momentum_buffer": m}


@register
@dataclass(frozen=True, kw_only=True)
class Gut(_Tracking):
    r"""GUT: tracks the change of the whole model, gossip included, so that local updates follow the global one.

    .. math::
        \delta_i &= g_i - \frac{r_i}{\eta'}, \qquad r_i = \sum_j w_{ij} p_j - p_i, \qquad
        g_i = \nabla F_i(p_i + \gamma r_i) \\
        y_i &= \delta_i - \frac{\mu}{\eta'} \Bigl[ \sum_j w_{ij} (p_j - p_j^{\rm prev}) + B r_i^{\rm prev} \Bigr]
        - \mu \delta_i^{\rm prev}, \qquad B = 1 \\
        p_i^+ &= p_i - \eta y_i + (\gamma - \gamma^2) r_i

    p is a worker's own model; the gradient is taken at the mixed point p + gamma r, which is ``opt.x``. eta' is the
    step size of the step before. One vector a step (the change of p). With constant lr it stays biased, less for larger
    mu; with mu = 0 and gamma = 1 it is p+ = W p - eta g(W p). ``weight_decay`` acts at the mixed point; it is 0 in the
    source. With lr = 0 nothing moves.

    Args:
        scaling: mu in [0, 1), 0.9 in the authors' scripts.
        gamma: averaging rate in (0, 1]. The authors' scripts use 1 only, and smaller ones are less stable, not more:
            the whole r is in delta, and (gamma - gamma^2) r is added to it.

    Stability: pure gossip with mu = 0.9 needs eigenvalues of W above -0.357 (with gamma = 0.9 above -0.315); rings are
    fine with gamma = 1, the social network (-0.434) is not. A warning says so.
    Source: Aketi, Choudhary, Roy, "Global Update Tracking" (NeurIPS 2023, arXiv 2305.04792);
    aparna-aketi/global_update_tracking.
    """

    name: ClassVar[str] = "gut"

    @property
    def rule(self) -> str:
        return "gut"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("mixing_displacement", "correction")

    @property
    def _form(self) -> tuple[float, Literal["plain", "heavy ball", "nesterov"]]:
        return 0.0, "plain"


@register
@dataclass(frozen=True, kw_only=True)
class QgGutm(_Tracking):
    r"""QG-GUTm: GUT with momentum on the tracked update.

    .. math::
        M_i \leftarrow \beta M_i + y_i, \qquad
        p_i^+ = p_i - \eta M_i + (\gamma - \gamma^2) r_i \quad (\text{Nesterov: } y_i + \beta M_i)

    with y as in :class:`Gut` and B = 1 + beta (Nesterov: 1 + beta + beta^2).

    Args:
        momentum: beta in [0, 1).
        scaling: mu in [0, 1); 0.06 in the authors' scripts for a ring of 16 (0.005 to 0.08 elsewhere).
        gamma: averaging rate in (0, 1], as in :class:`Gut`.
        nesterov: use the Nesterov form.

    Stability of pure gossip with mu = 0.06: always; with Nesterov, eigenvalues above -0.452. A warning says so.
    Source: as :class:`Gut`.
    """

    name: ClassVar[str] = "qg_gutm"

    momentum: float = 0.9
    scaling: float = 0.06
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("momentum", self.momentum, low=0.0, high=1.0, high_open=True)

    @property
    def rule(self) -> str:
        return "qg_gutm_n" if self.nesterov else "qg_gutm"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("mixing_displacement", "correction", "momentum_buffer")

    @property
    def _form(self) -> tuple[float, Literal["plain", "heavy ball", "nesterov"]]:
        return self.momentum, "nesterov" if self.nesterov else "heavy ball"
