"""SADDLe on quasi-global momentum: the gradient is taken a little up the slope, for flat minima."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from qgm_ext import compressors
from qgm_ext.algorithms.base import check_number, register
from qgm_ext.algorithms.cross_gradient import CrossGradientAlgorithm

if TYPE_CHECKING:
    from qgm_ext.cross_gradients import CrossSteps, Probes
    from qgm_ext.topology import Topology


@register
@dataclass(frozen=True, kw_only=True)
class QSaddle(CrossGradientAlgorithm):
    r"""Q-SADDLe: QG-DSGDm (or -N) with the gradients of sharpness-aware minimisation.

    .. math::
        g_i = \nabla F_i(x_i; B_i), \qquad
        \tilde g_i = \nabla F_i \Bigl( x_i + \rho \frac{g_i}{\|g_i\|_2 + 10^{-12}};\; B_i \Bigr)

    and then :class:`QgDsgdm`, or with ``nesterov`` :class:`QgDsgdmN`, with :math:`\tilde g_i` for the gradient. Both
    gradients are of the same batch; the norm is over the whole model of a worker. Two gradient evaluations a step, one
    vector to each neighbour, and with rho = 0 exactly quasi-global momentum, at its cost.

    **Recalled, not verified:** there is no public code and the paper's body could not be read. What its abstract does
    not settle is as in sharpness-aware minimisation (Foret et al. 2021): the value of rho (0.05 here), weight decay,
    which here enters at x_i as in QG-DSGDm and not into the direction of the perturbation, and where the perturbation
    is made.

    Args:
        rho: how far up the slope the gradient is taken, >= 0, in units of the parameters.
        qg_momentum: mu in [0, 1].
        nesterov: the step of QG-DSGDm-N.

    Example:
        >>> QSaddle(lr=0.1, rho=0.1).rho
        0.1

    Source: Choudhary et al., "SADDLe: Sharpness-Aware Decentralized Deep Learning with Heterogeneous Data" (WACV 2025,
    arXiv 2405.13961).
    """

    name: ClassVar[str] = "q_saddle"
    source: ClassVar[str] = "Choudhary et al. 2025, arXiv 2405.13961 (recalled)"

    rho: float = 0.05
    qg_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho, low=0.0)
        check_number("qg_momentum", self.qg_momentum, low=0.0, high=1.0)

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("qg_momentum_buffer",)

    def gradients(self, probes: Probes) -> None:
        probes.own_gradients(self.rho)

    def advance(self, opt: CrossSteps, g: Tensor, lr: float) -> None:
        hyper = [lr, self.momentum, self.qg_momentum, self.weight_decay]
        opt.send(opt.num_steps, opt.vector_bytes)
        opt.gossip_rule("qg_dsgdm_n" if self.nesterov else "qg_dsgdm", hyper, g, self.state_names)


@register
@dataclass(frozen=True, kw_only=True)
class CompQSaddle(QSaddle):
    r"""Q-SADDLe with compressed gossip: workers send the compressed change of their parameters.

    With the gradients of :class:`QSaddle` and the direction d_i of QG-DSGDm (or -N),

    .. math::
        x_i^{1/2} &= x_i - \eta d_i, \qquad q_i = Q(x_i^{1/2} - \hat x_i), \qquad
        \hat x_j \leftarrow \hat x_j + q_j \text{ for all } j \\
        x_i^+ &= x_i^{1/2} + \gamma \Bigl( \sum_j w_{ij} \hat x_j - \hat x_i \Bigr), \qquad
        \hat m_i \leftarrow \mu \hat m_i + (1 - \mu) \frac{x_i - x_i^+}{\eta}

    where the public copies :math:`\hat x` start as the common initial parameters (as zero, if the workers start apart).
    Without compression and with gamma = 1 this is :class:`QSaddle`. The default is QSGD with 8 bits a number, a quarter
    of float32. With lr = 0 ``m_hat`` stays. The neighbours must be the same in every step.

    **Recalled, not verified:** the abstract tells of up to 4x compression and about 1 % loss, not of how; this is
    CHOCO-Gossip (Koloskova et al. 2019, arXiv 1902.00340) in the adapt-then-combine order.

    Args:
        compressor: "qsgd", "top_k", "random_k", "sign" or "none" (:mod:`qgm_ext.compressors`), per parameter tensor.
        bits: of qsgd, without the sign. ratio: share that top_k and random_k leave out.
        gamma: consensus step size in (0, 1]; the stronger the compression, the smaller it must be.
        seed: of the random compressors.

    Source: as :class:`QSaddle`.
    """

    name: ClassVar[str] = "comp_q_saddle"
    needs: ClassVar[str] = "doubly stochastic, static"

    compressor: str = "qsgd"
    bits: int = 7
    ratio: float = 0.75
    gamma: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        compressors.make(self.compressor, ratio=self.ratio, bits=self.bits)
        check_number("gamma", self.gamma, low=0.0, high=1.0)
        if self.gamma == 0:
            raise ValueError("gamma must be in (0, 1], got 0")
        compressors.check_seed(self.seed)

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("qg_momentum_buffer", "public_params")

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        self.needs_same_neighbours(topology, "a copy of what each neighbour has made public")

    def start(self, opt: CrossSteps, lr: float) -> None:
        if opt.start_alike():
            opt.state["public_params"].copy_(opt.x)

    def advance(self, opt: CrossSteps, g: Tensor, lr: float) -> None:
        compressor = compressors.make(self.compressor, ratio=self.ratio, bits=self.bits)
        m_hat, public = opt.state["qg_momentum_buffer"], opt.state["public_params"]
        before = opt.x.clone()
        self.descend(opt, g, lr, m_hat.clone())
        change = opt.compress(compressor, opt.x - public, opt.workers, self.seed)
        opt.send(opt.num_steps, opt.compressed_bytes(compressor))
        mixed = opt.mix_changes("public_params", change, compressor, opt.workers, self.seed)
        opt.x.copy_(opt.x + self.gamma * (mixed - public))
        if lr > 0:
            m_hat.mul_(self.qg_momentum).add_((before - opt.x).to(m_hat.dtype), alpha=(1 - self.qg_momentum) / lr)
