"""Push-sum on directed and time-varying graphs: SGP and quasi-global momentum with push-sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgm_ext.algorithms.base import MomentumAlgorithm, Pass, State, Step, StepResult, check_number, register


@register
@dataclass(frozen=True, kw_only=True)
class Sgp(MomentumAlgorithm):
    r"""SGP: SGD with push-sum, for directed graphs on which a sender splits its mass.

    .. math::
        z_i &\leftarrow \sum_j M_{ij} (z_j - \eta m_j), \qquad w_i \leftarrow \sum_j M_{ij} w_j, \qquad
        M = I + \gamma (P - I) \\
        x_i &= z_i / w_i, \qquad m_i \leftarrow \beta m_i + g_i(x_i) + \lambda z_i

    P is column-stochastic: a sender splits z and w over itself and its receivers. x, the model, is ``opt.x``, where the
    gradient is taken; the biased z and the weights w (1 at the start, in ``opt.scalars``) are inside. sum w = n always;
    where P is doubly stochastic w = 1 and this is DSGD with heavy ball. Weight decay acts on z, as in the code. One
    vector and one number a step.

    Args:
        momentum: beta in [0, 1), local. (Default: 0, the canonical SGP.)
        gamma: averaging rate in (0, 1].

    Source: Assran et al., "Stochastic Gradient Push" (ICML 2019, arXiv 1811.10792); aparna-aketi/qgm-sgp.
    """

    name: ClassVar[str] = "sgp"
    source: ClassVar[str] = "Assran et al. 2019, arXiv 1811.10792"
    needs: ClassVar[str] = "column-stochastic"
    any_columns: ClassVar[bool] = True

    momentum: float = 0.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, low=0.0, high=1.0)
        if self.gamma == 0.0:
            raise ValueError("gamma must be in (0, 1], got 0: nothing would be averaged")

    @property
    def rule(self) -> str:
        return self.name

    @property
    def can_copy_workers(self) -> bool:
        return True  # x is copied, and every worker knows the weights of all

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def initial_scalars(self, n: int) -> dict[str, Tensor]:
        return {"push_sum_weight": torch.ones(n, dtype=torch.float64)}

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.momentum, self.weight_decay]

    def passes(self, step: Step) -> Iterator[Pass]:
        mixing = step.mixing.relaxed(self.gamma)
        old = step.scalars["push_sum_weight"]
        new = torch.from_numpy(mixing.apply(old.numpy()))
        hyper = self.hyper(step.number, step.lr)
        yield Pass(self.rule, hyper, self.state_names, mixing, step.row_scalars(step.own(old), step.own(new)))
        step.scalars["push_sum_weight"] = new

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        mass = state["push_sum_weight"][:, None]
        z = mass * x
        m = self.momentum * state["momentum_buffer"] + g + self.weight_decay * z
        z = z - lr * m
        z = z + self.gamma * (w @ z - z)
        mass = mass + self.gamma * (w @ mass - mass)
        return z / mass, {"momentum_buffer": m, "push_sum_weight": mass[:, 0]}


@register
@dataclass(frozen=True, kw_only=True)
class QgSgp(Sgp):
    r"""QG-SGP: quasi-global momentum with push-sum, always in Nesterov's form.

    .. math::
        b_i &= \beta \hat m_i + g_i', \qquad D_i = g_i' + \beta b_i, \qquad g_i' = g_i(x_i) + \lambda z_i \\
        z_i^{1/2} &= z_i - \eta D_i, \qquad z_i^+ = \sum_j M_{ij} z_j^{1/2}, \qquad w_i^+ = \sum_j M_{ij} w_j \\
        \hat m_i &\leftarrow \beta \hat m_i + (1 - \beta) D_i
        - (1 - \beta) \frac{z_i^+ - z_i^{1/2}}{\eta w_i^+}

    with M, w and x = z / w as in :class:`Sgp`. Where w = 1 it is QG-DSGDm-N with mu = beta. With lr = 0 m_hat stays.

    Args:
        momentum: beta in [0, 1).
        gamma: averaging rate in (0, 1].

    Source: aparna-aketi/qgm-sgp (whose validation pass changes the iterates where w is not 1; not reproduced).
    """

    name: ClassVar[str] = "qg_sgp"
    source: ClassVar[str] = "Lin et al. 2021, arXiv 2102.04761; aparna-aketi/qgm-sgp"

    momentum: float = 0.9

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("qg_momentum_buffer",)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        beta, m_hat, mass = self.momentum, state["qg_momentum_buffer"], state["push_sum_weight"][:, None]
        z = mass * x
        g = g + self.weight_decay * z
        d = g + beta * (beta * m_hat + g)
        m_hat = beta * m_hat + (1 - beta) * d
        z = z - lr * d
        r = self.gamma * (w @ z - z)
        mass = mass + self.gamma * (w @ mass - mass)
        m_hat = m_hat - (1 - beta) * r / (lr * mass)
        return (z + r) / mass, {"qg_momentum_buffer": m_hat, "push_sum_weight": mass[:, 0]}
