"""SlowMo: slow momentum on exact averages, around DSGDm-N."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from qgm_ext.algorithms.base import (
    MomentumAlgorithm,
    Pass,
    State,
    Step,
    StepResult,
    check_number,
    mean_mixing,
    register,
)
from qgm_ext.algorithms.dsgd import DsgdmN


@register
@dataclass(frozen=True, kw_only=True)
class Slowmo(MomentumAlgorithm):
    r"""SlowMo: DSGDm-N in every step, and every tau steps an exact average with a slow momentum.

    .. math::
        u &\leftarrow \beta_s u + \frac{s - \bar x}{\eta}, \qquad \bar x = \frac 1 n \sum_i x_i \\
        s &\leftarrow s - \alpha \eta u, \qquad x_i \leftarrow s

    s starts at x^0, u at 0, and eta is the current lr. The outer step follows every step whose number (from 0) is a
    multiple of tau, the very first included, as in the authors' code; the inner momentum is kept. With alpha = 1 and
    beta_s = 0 it is plain exact averaging. With lr = 0 u stays.

    Args:
        momentum: beta in [0, 1) of the inner DSGDm-N.
        slowmo_period: tau >= 1, steps between exact averages.
        slowmo_momentum: beta_s in [0, 1). The code has no default for it and for tau; the ones here are [recalled]
            from the SlowMo paper, not verified.
        slowmo_lr: alpha >= 0.

    Source: Wang et al., "SlowMo" (ICLR 2020, arXiv 1910.00643); epfml/quasi-global-momentum, decentralized_sgd.
    """

    name: ClassVar[str] = "slowmo"
    source: ClassVar[str] = "Wang et al. 2020, arXiv 1910.00643"
    needs: ClassVar[str] = "doubly stochastic, and exact means"

    slowmo_period: int = 12
    slowmo_momentum: float = 0.7
    slowmo_lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.slowmo_period, int) or isinstance(self.slowmo_period, bool) or self.slowmo_period < 1:
            raise ValueError(f"slowmo_period must be an integer of at least 1, got {self.slowmo_period!r}")
        check_number("slowmo_momentum", self.slowmo_momentum, low=0.0, high=1.0, high_open=True)
        check_number("slowmo_lr", self.slowmo_lr, low=0.0)

    @property
    def can_skip_gossip(self) -> bool:
        return False

    @property
    def can_copy_workers(self) -> bool:
        return True

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer", "slow_params", "slow_momentum_buffer")

    def initial_value(self, name: str) -> float | Literal["params"]:
        return "params" if name == "slow_params" else 0.0

    def passes(self, step: Step) -> Iterator[Pass]:
        yield Pass("dsgdm_n", [step.lr, self.momentum, self.weight_decay], ("momentum_buffer",), step.mixing)
        if step.number % self.slowmo_period == 0:
            slow = [step.lr, self.slowmo_momentum, self.slowmo_lr]
            mean = mean_mixing(step.num_workers)
            yield Pass("slowmo_outer", slow, ("slow_params", "slow_momentum_buffer"), mean, exact_mean=True)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        inner_step = DsgdmN(lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)
        x, inner = inner_step.reference_step(x, g, state, w, step, lr)
        s, u = state["slow_params"], state["slow_momentum_buffer"]
        if step % self.slowmo_period == 0:
            u = self.slowmo_momentum * u + (s - x.mean(0)) / lr
            s = s - self.slowmo_lr * lr * u
            x = s.clone()
        return x, {**inner, "slow_params": s, "slow_momentum_buffer": u}
