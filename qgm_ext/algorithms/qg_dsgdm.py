"""Quasi-global momentum for SGD: the algorithms this package is named for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgm_ext.algorithms.base import Algorithm, State, StepResult, check_number, register


@register
@dataclass(frozen=True, kw_only=True)
class QgDsgdm(Algorithm):
    r"""QG-DSGDm: the momentum buffer follows the model difference after gossip instead of the local gradient.

    .. math::
        g_i' &= g_i + \lambda x_i, \qquad m_i = \beta \hat m_i + g_i' \\
        x_i^+ &= \sum_j w_{ij} (x_j - \eta m_j) \\
        \hat m_i &\leftarrow \mu \hat m_i + (1 - \mu) \frac{x_i - x_i^+}{\eta}

    ``m_hat`` is an average (weights mu and 1 - mu), where local momentum is a trace; it is never sent, so a step costs
    what DSGD costs: one vector to each neighbour. lambda is ``weight_decay``, beta ``momentum``, mu ``qg_momentum``.
    With lr = 0 the difference has no scale: gossip alone moves x, and m_hat stays.

    Args:
        momentum: beta in [0, 1).
        qg_momentum: mu in [0, 1], 0.9 by default whatever momentum is, as in the authors' code (``factor`` = 1 - mu).
        local_step: k >= 1. With k > 1 the differences of k steps are averaged before m_hat takes them, on every step
            whose number (from 0) is a multiple of k; gossip runs in every step. As the authors' ``local_step``.

    Example:
        >>> QgDsgdm(lr=0.1, local_step=4).state_names
        ('qg_momentum_buffer', 'difference_sum')

    Source: Lin, Karimireddy, Stich, Jaggi, "Quasi-Global Momentum" (ICML 2021, arXiv 2102.04761), Algorithm 1;
    epfml/quasi-global-momentum, decentralized_qg_sgd (there beta = 0 fails and complete graphs are refused; both work
    here).
    """

    name: ClassVar[str] = "qg_dsgdm"
    source: ClassVar[str] = "Lin et al. 2021, arXiv 2102.04761"

    momentum: float = 0.9
    qg_momentum: float = 0.9
    local_step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("momentum", self.momentum, low=0.0, high=1.0, high_open=True)
        check_number("qg_momentum", self.qg_momentum, low=0.0, high=1.0)
        if not isinstance(self.local_step, int) or isinstance(self.local_step, bool) or self.local_step < 1:
            raise ValueError(f"local_step must be an integer of at least 1, got {self.local_step!r}")

    @property
    def can_lose_workers(self) -> bool:
        return True

    @property
    def rule(self) -> str:
        return self.name if self.local_step == 1 else f"{self.name}_multistep"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("qg_momentum_buffer",) if self.local_step == 1 else ("qg_momentum_buffer", "difference_sum")

    def hyper(self, step: int, lr: float) -> list[float]:
        common = [lr, self.momentum, self.qg_momentum, self.weight_decay]
        if self.local_step == 1:
            return common
        return [*common, float(self.local_step), float(step % self.local_step == 0)]

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        m = self.momentum * state["qg_momentum_buffer"] + g
        x_new = w @ (x - lr * m)
        return x_new, self._quasi_global(x, x_new, state, step, lr)

    def _quasi_global(self, x: Tensor, x_new: Tensor, state: State, step: int, lr: float) -> State:
        """m_hat after a step: it takes the model difference, or every k-th step the mean of k of them."""
        m_hat = state["qg_momentum_buffer"]
        if lr == 0:
            return dict(state)
        difference = (x - x_new) / lr
        if self.local_step == 1:
            return {"qg_momentum_buffer": self.qg_momentum * m_hat + (1 - self.qg_momentum) * difference}
        total = state["difference_sum"] + difference
        if step % self.local_step != 0:
            return {"qg_momentum_buffer": m_hat, "difference_sum": total}
        m_hat = self.qg_momentum * m_hat + (1 - self.qg_momentum) * total / self.local_step
        return {"qg_momentum_buffer": m_hat, "difference_sum": torch.zeros_like(total)}


@register
@dataclass(frozen=True, kw_only=True)
class QgDsgdmN(QgDsgdm):
    r"""QG-DSGDm-N: QG-DSGDm with a Nesterov step.

    .. math::
        x_i^+ = \sum_j w_{ij} \bigl( x_j - \eta (g_j' + \beta m_j) \bigr), \qquad m_j = \beta \hat m_j + g_j'

    and ``m_hat`` as in :class:`QgDsgdm`.

    Source: as :class:`QgDsgdm`.
    """

    name: ClassVar[str] = "qg_dsgdm_n"

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        m = self.momentum * state["qg_momentum_buffer"] + g
        x_new = w @ (x - lr * (g + self.momentum * m))
        return x_new, self._quasi_global(x, x_new, state, step, lr)
