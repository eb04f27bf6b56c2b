"""QG-DAdam: Adam with quasi-global moments, in the three variants that exist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from qgm_ext import ops
from qgm_ext.algorithms.base import AdamAlgorithm, Pass, State, Step, StepResult, check_number, register

Variant = Literal["v0", "v1", "v2"]


@register
@dataclass(frozen=True, kw_only=True)
class QgDadam(AdamAlgorithm):
    r"""QG-DAdam: the moments follow the normalised model difference after gossip instead of the local gradient.

    .. math::
        m_i &= \beta_1 \hat m_i + g_i', \qquad v_i = \beta_2 \hat v_i + (1 - \beta_2) g_i'^2, \qquad
        g_i' = g_i + \lambda x_i \\
        x_i^+ &= \sum_j w_{ij} \Bigl( x_j - \frac{\eta}{1 - \beta_1^t}
        \frac{m_j}{\sqrt{v_j} / \sqrt{1 - \beta_2^t} + \epsilon} \Bigr) \\
        d_i &= \frac{x_i - x_i^+}{\|x_i - x_i^+\|_2 + \epsilon_n}, \qquad
        \hat m_i \leftarrow \beta_1 \hat m_i + (1 - \beta_1) d_i, \qquad
        \hat v_i \leftarrow \beta_2 \hat v_i + (1 - \beta_2) d_i^2

    The norm is that of a worker's whole model, and d is not divided by eta. t counts from 1. One vector a step. The
    norm is known only when a step is over: the state is the difference itself, whose squares the pass sums as it writes
    it, and the next step folds d into the moments as it reads them.

    Args:
        variant: "v0", the formulas above, with g' and not (1 - beta_1) g' in m: the authors said (issue 1 of their
            repository, 2021) that this is no mistake and what their experiments ran. "v1": the gradient is normalised
            first, g / (||g|| + eps_n), and enters m with 1 - beta_1. That is not quite theirs: their code normalises
            filter by filter (a convolution's output channels, a linear weight along its first dimension, any other
            tensor as a whole), here a worker's row is one vector. "v2": m is the ordinary local moment,
            m <- beta_1 m + (1 - beta_1) g', kept, and only v_hat is quasi-global (what their code builds at HEAD).
        betas: (beta_1, beta_2), each in [0, 1).
        eps: epsilon >= 0.
        normalization_eps: epsilon_n > 0.

    Source: Lin, Karimireddy, Stich, Jaggi, "Quasi-Global Momentum" (ICML 2021); epfml/quasi-global-momentum. That the
    paper's tables used v0 rests on the authors' reply [paper not verified]. The equations of v0 reproduce runs of the
    authors' code; v1 and v2 were read there and not compared with a run.
    """

    name: ClassVar[str] = "qg_dadam"
    source: ClassVar[str] = "Lin et al. 2021, arXiv 2102.04761"

    variant: Variant = "v0"
    normalization_eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}")
        check_number("normalization_eps", self.normalization_eps, low=0.0)
        if self.normalization_eps == 0.0:
            raise ValueError("normalization_eps must be above 0, got 0: a worker that stands still has no direction")

    @property
    def can_lose_workers(self) -> bool:
        return True

    @property
    def rule(self) -> str:
        return "qg_dadam_v2" if self.variant == "v2" else "qg_dadam"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg" if self.variant == "v2" else "qg_exp_avg", "qg_exp_avg_sq", "difference")

    def initial_scalars(self, n: int) -> dict[str, Tensor]:
        return {"difference_norm": torch.zeros(n, dtype=torch.float64)}

    def hyper(self, step: int, lr: float) -> list[float]:
        return [*self.adam_hyper(step, lr), 1.0 if self.variant == "v0" else 1.0 - self.betas[0]]

    def passes(self, step: Step) -> Iterator[Pass]:
        norms = step.scalars["difference_norm"]
        norm = step.own(norms)
        per_norm = 1.0 / (norm + self.normalization_eps)
        scale = torch.ones_like(per_norm)
        if self.variant == "v1":
            scale = 1.0 / (ops.squared_norms(step.g).sqrt() + self.normalization_eps)
        scalars = step.row_scalars(per_norm.to(step.x.device), scale.to(step.x.device))
        sums = ops.new_block_sums(step.x)
        yield Pass(self.rule, self.hyper(step.number, step.lr), self.state_names, step.mixing, scalars, sums)
        step.scalars["difference_norm"] = step.with_own(norms, ops.sum_blocks(sums).sqrt())

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        """The moments in the state are those before the last difference went in: they take it here, at the start."""
        b1, b2 = self.betas
        d = state["difference"] / (state["difference"].norm(dim=1, keepdim=True) + self.normalization_eps)
        v_hat = b2 * state["qg_exp_avg_sq"] + (1 - b2) * d * d
        if self.variant == "v1":
            g = g / (g.norm(dim=1, keepdim=True) + self.normalization_eps)
        g = g + self.weight_decay * x
        if self.variant == "v2":
            m = kept = b1 * state["exp_avg"] + (1 - b1) * g
        else:
            kept = b1 * state["qg_exp_avg"] + (1 - b1) * d
            m = b1 * kept + (g if self.variant == "v0" else (1 - b1) * g)
        v = b2 * v_hat + (1 - b2) * g * g
        x_new = w @ (x - lr * self.reference_direction(m, v, step))
        delta = x - x_new
        name = "exp_avg" if self.variant == "v2" else "qg_exp_avg"
        return x_new, {name: kept, "qg_exp_avg_sq": v_hat, "difference": delta, "difference_norm": delta.norm(dim=1)}
