"""Momentum tracking and DecentLaM: momentum whose bias does not grow with the heterogeneity of the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from qgm_ext.algorithms.base import MomentumAlgorithm, Pass, RelayPass, State, Step, StepResult, mean_mixing, register

Init = Literal["allreduce", "zero"]


@register
@dataclass(frozen=True, kw_only=True)
class MomentumTracking(MomentumAlgorithm):
    r"""Momentum tracking: gradient tracking for the momentum, exact for any beta.

    .. math::
        u_i &\leftarrow \beta u_i + g_i + \lambda x_i \\
        x_i^+ &= \sum_j w_{ij} x_j - \eta (u_i - c_i) \\
        c_i^+ &= \sum_j w_{ij} (c_j - u_j) + u_i

    (new u, old c in the second line). Two vectors a step: x and c - u. sum_i c_i = 0 at every step, so the mean moves
    as centralised heavy ball on the mean gradient. With beta = 0 and init "zero" it is :class:`GradientTracking`. As
    there, without a worker the c of the others would not cancel any more, so none may be lost.

    Args:
        momentum: beta in [0, 1).
        init: "allreduce" as in the paper: before the first step one exact mean of the first gradients, and
            u_i = c_i = (g_i - gbar) / (1 - beta), without weight decay; "zero": u = c = 0. Both reach the optimum;
            only the transient differs.

    Source: Takezawa et al., "Momentum Tracking" (TMLR 2023, arXiv 2209.15505); yukiTakezawa/MomentumTracking.
    """

    name: ClassVar[str] = "momentum_tracking"
    messages: ClassVar[int] = 2
    source: ClassVar[str] = "Takezawa et al. 2023, arXiv 2209.15505"

    init: Init = "allreduce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {self.init!r}")

    @property
    def can_skip_gossip(self) -> bool:
        return self.init == "zero"

    @property
    def rule(self) -> str:
        return "momentum_tracking"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer", "correction")

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.momentum, self.weight_decay]

    def passes(self, step: Step) -> Iterator[Pass | RelayPass]:
        if step.number == 0 and self.init == "allreduce":
            mean = mean_mixing(step.num_workers)
            yield Pass("momentum_tracking_start", [self.momentum], self.state_names, mean, exact_mean=True)
        yield from super().passes(step)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        u, c = state["momentum_buffer"], state["correction"]
        if step == 0 and self.init == "allreduce":
            u = c = (g - g.mean(0)) / (1 - self.momentum)
        u = self.momentum * u + g + self.weight_decay * x
        return w @ x - lr * (u - c), {"momentum_buffer": u, "correction": w @ (c - u) + u}


@register
@dataclass(frozen=True, kw_only=True)
class DecentLam(MomentumAlgorithm):
    r"""DecentLaM: heavy-ball momentum on the displacement that gossip and gradient make together.

    .. math::
        d_i = \frac 1 \eta \Bigl( x_i - \sum_j w_{ij} (x_j - \eta g_j') \Bigr), \qquad
        m_i \leftarrow \beta m_i + d_i, \qquad x_i^+ = x_i - \eta m_i

    with g' = g + lambda x. One vector a step. Its fixed point is that of DSGD with the same lr: momentum does not
    amplify the bias. With lr = 0 d has no scale: m stays.

    Args:
        momentum: beta in [0, 1).

    Source: Yuan et al., "DecentLaM" (ICCV 2021, arXiv 2104.11981); yukiTakezawa/MomentumTracking.
    """

    name: ClassVar[str] = "decentlam"
    source: ClassVar[str] = "Yuan et al. 2021, arXiv 2104.11981"

    @property
    def rule(self) -> str:
        return "decentlam"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.momentum, self.weight_decay]

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        m = self.momentum * state["momentum_buffer"] + (x - w @ (x - lr * g)) / lr
        return x - lr * m, {"momentum_buffer": m}
