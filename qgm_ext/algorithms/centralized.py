"""The centralised methods: what the workers could do with an exact mean of their gradients in every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qgm_ext.algorithms.base import (
    AdamAlgorithm,
    Algorithm,
    MomentumAlgorithm,
    Pass,
    State,
    Step,
    StepResult,
    mean_mixing,
    register,
)


def mean_pass(algorithm: Algorithm, step: Step) -> Iterator[Pass]:
    """One pass whose messages are averaged exactly, whatever the topology."""
    hyper = algorithm.hyper(step.number, step.lr)
    yield Pass(algorithm.rule, hyper, algorithm.state_names, mean_mixing(step.num_workers), exact_mean=True)


@register
@dataclass(frozen=True, kw_only=True)
class Csgd(Algorithm):
    r"""Centralised SGD: every worker steps by the mean gradient, whatever the topology.

    .. math::
        x \leftarrow x - \eta (\bar g + \lambda x), \qquad \bar g = \frac 1 n \sum_i g_i

    One all-reduce of a gradient a step. Workers that start from different points stay apart: nothing averages x.

    Source: epfml/quasi-global-momentum, centralized_sgd.
    """

    name: ClassVar[str] = "csgd"
    source: ClassVar[str] = "SGD with all-reduce"
    needs: ClassVar[str] = "none: exact mean"
    rounding_obstacle: ClassVar[str | None] = "it averages exactly"
    any_columns: ClassVar[bool] = True

    @property
    def can_skip_gossip(self) -> bool:
        return False

    @property
    def can_copy_workers(self) -> bool:
        return True

    @property
    def rule(self) -> str:
        return "csgd"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ()

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, 0.0, self.weight_decay]

    def passes(self, step: Step) -> Iterator[Pass]:
        return mean_pass(self, step)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        return x - lr * (g.mean(0) + self.weight_decay * x), {}


@register
@dataclass(frozen=True, kw_only=True)
class Csgdm(MomentumAlgorithm):
    r"""Centralised SGD with heavy-ball momentum.

    .. math::
        m \leftarrow \beta m + \bar g + \lambda x, \qquad x \leftarrow x - \eta m

    Args:
        momentum: beta in [0, 1).

    Source: epfml/quasi-global-momentum, centralized_sgd.
    """

    name: ClassVar[str] = "csgdm"
    source: ClassVar[str] = "SGD with all-reduce"
    needs: ClassVar[str] = "none: exact mean"
    rounding_obstacle: ClassVar[str | None] = "it averages exactly"
    any_columns: ClassVar[bool] = True

    @property
    def can_skip_gossip(self) -> bool:
        return False

    @property
    def can_copy_workers(self) -> bool:
        return True

    @property
    def rule(self) -> str:
        return self.name

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.momentum, self.weight_decay]

    def passes(self, step: Step) -> Iterator[Pass]:
        return mean_pass(self, step)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        m = self.momentum * state["momentum_buffer"] + g.mean(0) + self.weight_decay * x
        return x - lr * m, {"momentum_buffer": m}


@register
@dataclass(frozen=True, kw_only=True)
class CsgdmN(Csgdm):
    r"""Centralised SGD with Nesterov momentum in PyTorch's form.

    .. math::
        m \leftarrow \beta m + g', \qquad x \leftarrow x - \eta (g' + \beta m), \qquad g' = \bar g + \lambda x

    Source: as :class:`Csgdm`.
    """

    name: ClassVar[str] = "csgdm_n"

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g.mean(0) + self.weight_decay * x
        m = self.momentum * state["momentum_buffer"] + g
        return x - lr * (g + self.momentum * m), {"momentum_buffer": m}


@register
@dataclass(frozen=True, kw_only=True)
class Cadam(AdamAlgorithm):
    r"""Centralised Adam: Adam on the mean gradient.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g', \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g'^2, \qquad
        g' = \bar g + \lambda x \\
        x &\leftarrow x - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt v / \sqrt{1 - \beta_2^t} + \epsilon}

    t counts from 1; lambda is added to the gradient (Adam, not AdamW).

    Args:
        betas: (beta_1, beta_2), each in [0, 1).
        eps: epsilon >= 0.

    Source: Kingma, Ba (ICLR 2015); epfml/quasi-global-momentum, centralized_adam.
    """

    name: ClassVar[str] = "cadam"
    source: ClassVar[str] = "Kingma, Ba 2015, with all-reduce"
    needs: ClassVar[str] = "none: exact mean"
    rounding_obstacle: ClassVar[str | None] = "it averages exactly"
    any_columns: ClassVar[bool] = True

    @property
    def can_skip_gossip(self) -> bool:
        return False

    @property
    def can_copy_workers(self) -> bool:
        return True

    @property
    def rule(self) -> str:
        return "cadam"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def hyper(self, step: int, lr: float) -> list[float]:
        return self.adam_hyper(step, lr)

    def passes(self, step: Step) -> Iterator[Pass]:
        return mean_pass(self, step)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        (b1, b2), g = self.betas, g.mean(0) + self.weight_decay * x
        m = b1 * state["exp_avg"] + (1 - b1) * g
        v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        return x - lr * self.reference_direction(m, v, step), {"exp_avg": m, "exp_avg_sq": v}
