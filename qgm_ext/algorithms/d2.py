"""D2, D2+ and exact diffusion: DSGD without its bias, at one vector a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgm_ext.algorithms.base import Algorithm, Pass, State, Step, StepResult, register
from qgm_ext.topology import Topology

# At -1/3 (a ring with an even number of workers) mixing no longer shrinks the error of D2; rounding may be either side.
_UNSTABLE = -1.0 / 3.0 + 1e-9


@register
@dataclass(frozen=True, kw_only=True)
class D2(Algorithm):
    r"""D2: each worker corrects its step by the difference to its last one, which cancels the heterogeneity.

    .. math::
        x_i^{t+1} = \sum_j w_{ij} \bigl( 2 x_j^t - x_j^{t-1} - \eta (g_j'^t - g_j'^{t-1}) \bigr), \qquad
        x_i^1 = \sum_j w_{ij} (x_j^0 - \eta g_j'^0)

    with g' = g + lambda x. One vector a step; state: x^t - x^{t-1} and the last gradient. Exact on heterogeneous data.
    It needs the smallest eigenvalue of W to be above -1/3 and warns if it is not; :class:`ExactDiffusion` always works.
    After a change of lr the last displacement still has the old one in it: :class:`D2Plus` rescales it.

    Source: Tang et al., "D2: Decentralized Training over Decentralized Data" (ICML 2018);
    epfml/quasi-global-momentum, decentralized_d2.
    """

    name: ClassVar[str] = "d2"
    source: ClassVar[str] = "Tang et al. 2018, arXiv 1803.07068"
    needs: ClassVar[str] = "symmetric, lambda_n > -1/3"

    @property
    def rule(self) -> str:
        return "d2"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("difference", "previous_grad")

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.weight_decay]

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        if topology.is_time_varying or not topology.is_symmetric:
            return
        if topology.lambda_n <= _UNSTABLE:
            warnings.warn(
                f"{self.name} needs a mixing matrix whose smallest eigenvalue is above -1/3, but that of topology "
                f"{topology.name!r} is {topology.lambda_n:.4f}: it may diverge; exact_diffusion is stable there",
                UserWarning,
                stacklevel=4,
            )

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        x_before = x - state["difference"]
        x_new = w @ (x - lr * g if step == 0 else 2 * x - x_before - lr * (g - state["previous_grad"]))
        return x_new, {"difference": x_new - x, "previous_grad": g}


@register
@dataclass(frozen=True, kw_only=True)
class D2Plus(D2):
    r"""D2+: D2 that divides the last displacement by the step size it was made with.

    .. math::
        x_i^{t+1} = \sum_j w_{ij} \Bigl( x_j^t - \eta_t \Bigl[ \frac{x_j^{t-1} - x_j^t}{\eta_{t-1}}
        + g_j'^t - g_j'^{t-1} \Bigr] \Bigr)

    Equal to :class:`D2` while lr is constant. State: the bracket without g^t. With lr = 0 the state stays.

    Source: epfml/quasi-global-momentum, decentralized_d2_v1.
    """

    name: ClassVar[str] = "d2_plus"
    source: ClassVar[str] = "Lin et al. 2021, arXiv 2102.04761 (baseline)"

    @property
    def rule(self) -> str:
        return "d2_plus"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("correction",)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        x_new = w @ (x - lr * (state["correction"] + g))
        return x_new, {"correction": (x - x_new) / lr - g}


@register
@dataclass(frozen=True, kw_only=True)
class ExactDiffusion(Algorithm):
    r"""Exact diffusion: D2's correction with lazy mixing, stable on every connected undirected graph.

    .. math::
        \psi_i = x_i - \eta g_i', \qquad
        x_i^+ = \sum_j \bar w_{ij} (\psi_j + x_j - \psi_j^{\rm prev}), \qquad \bar W = (I + W) / 2

    with psi^prev = x^0 in the first step. State: x - psi^prev. It is D2 with W replaced by (I + W) / 2, whose
    eigenvalues are not negative.

    Source: Yuan, Ying, Zhao, Sayed, "Exact Diffusion for Distributed Optimization and Learning" (2018); Bluefog.
    """

    name: ClassVar[str] = "exact_diffusion"
    source: ClassVar[str] = "Yuan et al. 2018, arXiv 1702.05122"
    needs: ClassVar[str] = "symmetric"

    @property
    def rule(self) -> str:
        return "exact_diffusion"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("correction",)

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.weight_decay]

    def passes(self, step: Step) -> Iterator[Pass]:
        yield Pass(self.rule, self.hyper(step.number, step.lr), self.state_names, step.mixing.relaxed(0.5))

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        psi = x - lr * (g + self.weight_decay * x)
        psi_before = x - state["correction"]
        lazy = (torch.eye(len(w), dtype=w.dtype) + w) / 2
        x_new = lazy @ (psi + x - psi_before)
        return x_new, {"correction": x_new - psi}
