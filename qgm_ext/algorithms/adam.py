"""Adam on every worker with gossip averaging: D-Adam and DAMSGrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qgm_ext.algorithms.base import AdamAlgorithm, State, StepResult, register


@register
@dataclass(frozen=True, kw_only=True)
class DAdam(AdamAlgorithm):
    r"""D-Adam: a local Adam step, then gossip averaging; the moments are never sent.

    .. math::
        m_i &\leftarrow \beta_1 m_i + (1 - \beta_1) g_i', \qquad
        v_i \leftarrow \beta_2 v_i + (1 - \beta_2) g_i'^2, \qquad g_i' = g_i + \lambda x_i \\
        x_i &\leftarrow \sum_j w_{ij} \Bigl( x_j - \frac{\eta}{1 - \beta_1^t}
        \frac{m_j}{\sqrt{v_j} / \sqrt{1 - \beta_2^t} + \epsilon} \Bigr)

    t counts from 1. lambda (``weight_decay``) is added to the gradient: this is Adam, not AdamW. One vector a step.

    Args:
        betas: (beta_1, beta_2), each in [0, 1).
        eps: epsilon >= 0.

    Source: epfml/quasi-global-momentum, decentralized_adam.
    """

    name: ClassVar[str] = "d_adam"
    source: ClassVar[str] = "Lin et al. 2021, arXiv 2102.04761 (baseline)"

    @property
    def can_lose_workers(self) -> bool:
        return True

    @property
    def rule(self) -> str:
        return "d_adam"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def hyper(self, step: int, lr: float) -> list[float]:
        return self.adam_hyper(step, lr)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        (b1, b2), g = self.betas, g + self.weight_decay * x
        m = b1 * state["exp_avg"] + (1 - b1) * g
        v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        return w @ (x - lr * self.reference_direction(m, v, step)), {"exp_avg": m, "exp_avg_sq": v}


@register
@dataclass(frozen=True, kw_only=True)
class DAmsgrad(AdamAlgorithm):
    r"""DAMSGrad: AMSGrad whose step sizes are tracked over the network, so that all workers scale alike.

    .. math::
        m_i &\leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \qquad v_i \leftarrow \beta_2 v_i + (1 - \beta_2) g_i^2, \qquad
        \hat v_i^+ = \max(\hat v_i, v_i) \\
        x_i^+ &= \sum_j w_{ij} x_j - \eta \, m_i / \sqrt{\max(u_i^{1/2}, \epsilon)}, \qquad
        u_i^{1/2} = \sum_j w_{ij} u_j \\
        u_i^+ &= u_i^{1/2} - \hat v_i + \hat v_i^+

    Combine, then adapt; no bias correction; v, v_hat and u start at epsilon. Two vectors a step (x and u). The mean of
    u over the workers is the mean of v_hat at every step. ``weight_decay``, coupled, is not in the source; 0 there.

    Source: Chen, Karimi, Zhao, Li, "On the Convergence of Decentralized Adaptive Gradient Methods" (arXiv 2109.03194).
    The paper's body could not be read: this follows a third party's code, defaults included [paper not verified].
    """

    name: ClassVar[str] = "damsgrad"
    messages: ClassVar[int] = 2
    source: ClassVar[str] = "Chen et al. 2021, arXiv 2109.03194 (third-party code)"

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-6

    @property
    def can_lose_workers(self) -> bool:
        return True

    @property
    def rule(self) -> str:
        return "damsgrad"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "tracked_sq")

    def initial_value(self, name: str) -> float | Literal["params"]:
        return 0.0 if name == "exp_avg" else self.eps

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, *self.betas, self.eps, self.weight_decay]

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        (b1, b2), g = self.betas, g + self.weight_decay * x
        m = b1 * state["exp_avg"] + (1 - b1) * g
        v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        v_max = torch.maximum(state["max_exp_avg_sq"], v)
        u_half = w @ state["tracked_sq"]
        x_new = w @ x - lr * m / u_half.clamp(min=self.eps).sqrt()
        u = u_half - state["max_exp_avg_sq"] + v_max
        return x_new, {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v_max, "tracked_sq": u}
