"""Decentralized SGD with and without local momentum: the baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qgm_ext.algorithms.base import Algorithm, MomentumAlgorithm, State, StepResult, register


@register
@dataclass(frozen=True, kw_only=True)
class Dsgd(Algorithm):
    r"""DSGD (D-PSGD): a local SGD step, then gossip averaging.

    .. math::
        g_i' = g_i + \lambda x_i, \qquad x_i \leftarrow \sum_j w_{ij} (x_j - \eta g_j')

    One vector a step to each neighbour, no state. This is the adapt-then-combine order, as in the codes of
    Quasi-Global Momentum, RelaySum and Momentum Tracking; the original D-PSGD combines first.

    Example:
        >>> Dsgd(lr=0.1).hyper(step=0, lr=0.1)
        [0.1, 0.0]

    Source: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?" (NeurIPS 2017,
    arXiv 1705.09056).
    """

    name: ClassVar[str] = "dsgd"
    source: ClassVar[str] = "Lian et al. 2017, arXiv 1705.09056"

    @property
    def can_lose_workers(self) -> bool:
        return True

    @property
    def rule(self) -> str:
        return "dsgd"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ()

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.weight_decay]

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        return w @ (x - lr * g), {}


@register
@dataclass(frozen=True, kw_only=True)
class DsgdCta(Dsgd):
    r"""DSGD in the original order: combine, then adapt.

    .. math::
        x_i \leftarrow \sum_j w_{ij} x_j - \eta g_i', \qquad g_i' = g_i(x_i) + \lambda x_i

    The gradient is taken before the averaging, so the two can overlap. Its biased fixed point is another one than that
    of :class:`Dsgd`.

    Source: Lian et al. (NeurIPS 2017), Algorithm 1; epfml/relaysgd with overlapped communication.
    """

    name: ClassVar[str] = "dsgd_cta"

    @property
    def rule(self) -> str:
        return "dsgd_cta"

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        return w @ x - lr * (g + self.weight_decay * x), {}


@register
@dataclass(frozen=True, kw_only=True)
class Dsgdm(MomentumAlgorithm):
    r"""DSGDm: DSGD with heavy-ball momentum that each worker keeps for itself.

    .. math::
        g_i' = g_i + \lambda x_i, \qquad m_i \leftarrow \beta m_i + g_i', \qquad
        x_i \leftarrow \sum_j w_{ij} (x_j - \eta m_j)

    ``m`` is a trace, as in torch.optim.SGD (m = beta m + g), not an average. It is never sent: with heterogeneous
    data it follows the worker's own gradients and drives the workers apart.

    Args:
        momentum: beta in [0, 1).

    Source: epfml/quasi-global-momentum, decentralized_sgd.
    """

    name: ClassVar[str] = "dsgdm"
    source: ClassVar[str] = "Lin et al. 2021, arXiv 2102.04761 (baseline)"

    @property
    def can_lose_workers(self) -> bool:
        return True

    @property
    def rule(self) -> str:
        return self.name

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.momentum, self.weight_decay]

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        m = self.momentum * state["momentum_buffer"] + g
        return w @ (x - lr * m), {"momentum_buffer": m}


@register
@dataclass(frozen=True, kw_only=True)
class DsgdmN(Dsgdm):
    r"""DSGDm-N: DSGDm with Nesterov momentum in PyTorch's form.

    .. math::
        m_i \leftarrow \beta m_i + g_i', \qquad x_i \leftarrow \sum_j w_{ij} (x_j - \eta (g_j' + \beta m_j))

    Source: as :class:`Dsgdm`.
    """

    name: ClassVar[str] = "dsgdm_n"

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        g = g + self.weight_decay * x
        m = self.momentum * state["momentum_buffer"] + g
        return w @ (x - lr * (g + self.momentum * m)), {"momentum_buffer": m}
