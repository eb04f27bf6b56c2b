"""Gradient tracking: a second gossiped vector that follows the mean gradient, with and without momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qgm_ext.algorithms.base import Algorithm, MomentumAlgorithm, State, StepResult, register


@register
@dataclass(frozen=True, kw_only=True)
class GradientTracking(Algorithm):
    r"""Gradient tracking (DSGT, DIGing): combine, then adapt.

    .. math::
        x_i^{t+1} = \sum_j w_{ij} x_j^t - \eta y_i^t, \qquad
        y_i^t = \sum_j w_{ij} y_j^{t-1} + g_i'^t - g_i'^{t-1}, \qquad y_i^0 = g_i'^0

    with g' = g + lambda x. The mean of y over the workers is the mean of g' at every step, so the method is exact. Two
    vectors a step (x and y). State: sum_j w_ij y_j^{t-1} - g_i'^{t-1}, which is all that the next step needs.

    The states cancel: their sum over the workers is zero. A lost worker takes its own along, which nobody else knows,
    and every later step of the others would go wrong by its share; so none may be lost, and none replaced by a copy.

    Source: Nedic, Olshevsky, Shi (2017) for DIGing; epfml/quasi-global-momentum and Bluefog.
    """

    name: ClassVar[str] = "gradient_tracking"
    messages: ClassVar[int] = 2
    source: ClassVar[str] = "Nedic et al. 2017, arXiv 1607.03218"

    @property
    def rule(self) -> str:
        return self.name

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("correction",)

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.weight_decay]

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        y = state["correction"] + g
        return w @ x - lr * y, {"correction": w @ y - g}


@register
@dataclass(frozen=True, kw_only=True)
class GradientTrackingAtc(GradientTracking):
    r"""Gradient tracking in the adapt-then-combine order: it tracks displacements, changes of lr included.

    .. math::
        x_i^+ = \sum_j w_{ij} (x_j + u_j + c_j), \qquad c_i^+ = \sum_j w_{ij} (c_j + u_j) - u_i, \qquad
        u_i = -\eta g_i'

    with c = 0 at the start. Two vectors a step.

    Source: epfml/relaysgd, gradient tracking.
    """

    name: ClassVar[str] = "gradient_tracking_atc"
    source: ClassVar[str] = "Vogels et al. 2021, arXiv 2110.04175 (baseline)"

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        u, c = -lr * (g + self.weight_decay * x), state["correction"]
        return w @ (x + u + c), {"correction": w @ (c + u) - u}


@register
@dataclass(frozen=True, kw_only=True)
class GradientTrackingM(MomentumAlgorithm):
    r"""Gradient tracking with heavy-ball momentum on the tracked gradient, before it is mixed.

    .. math::
        M_i \leftarrow \beta M_i + y_i, \qquad x_i^+ = \sum_j w_{ij} x_j - \eta M_i

    and y as in :class:`GradientTracking`; M is never sent.

    Args:
        momentum: beta in [0, 1).

    Source: epfml/quasi-global-momentum (its docstring says that y is mixed before the momentum; its code does not).
    """

    name: ClassVar[str] = "gradient_tracking_m"
    messages: ClassVar[int] = 2
    source: ClassVar[str] = "Lin et al. 2021, arXiv 2102.04761 (baseline)"

    @property
    def rule(self) -> str:
        return self.name

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("correction", "momentum_buffer")

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.momentum, self.weight_decay]

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        y = state["correction"] + g
        m = self.momentum * state["momentum_buffer"] + y
        return w @ x - lr * m, {"correction": w @ y - g, "momentum_buffer": m}


@register
@dataclass(frozen=True, kw_only=True)
class GradientTrackingMN(GradientTrackingM):
    r"""Gradient tracking with Nesterov momentum in PyTorch's form.

    .. math::
        M_i \leftarrow \beta M_i + y_i, \qquad x_i^+ = \sum_j w_{ij} x_j - \eta (y_i + \beta M_i)

    Source: as :class:`GradientTrackingM`.
    """

    name: ClassVar[str] = "gradient_tracking_m_n"

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        y = state["correction"] + g
        m = self.momentum * state["momentum_buffer"] + y
        x_new = w @ x - lr * (y + self.momentum * m)
        return x_new, {"correction": w @ y - g, "momentum_buffer": m}
