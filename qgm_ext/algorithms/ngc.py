"""Neighborhood Gradient Clustering (NGC), compressed (CompNGC), and with sharpness-aware gradients (N-SADDLe)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from qgm_ext import compressors
from qgm_ext.algorithms.base import check_number, register
from qgm_ext.algorithms.cross_gradient import MixFirstAlgorithm
from qgm_ext.compressors import Compressed, Compressor

if TYPE_CHECKING:
    from qgm_ext.cross_gradients import Answers, CrossSteps, Probes
    from qgm_ext.topology import Topology


@register
@dataclass(frozen=True, kw_only=True)
class Ngc(MixFirstAlgorithm):
    r"""NGC: workers average their gradient with those of their data at the neighbours' models and of the neighbours'
    data at theirs.

    With p_j the parameters that worker j has sent, N_i the neighbours of i and pi_i = 1 / (abs(N_i) + 1),

    .. math::
        x_i &= p_i + \gamma \sum_j w_{ij} (p_j - p_i) \\
        g_i &= \nabla F_i(x_i; B_i), \qquad g_i(p_j) = \nabla F_i(p_j; B_i) \\
        a_i &= \pi_i \Bigl( g_i + \sum_{j \in N_i} g_i(p_j) \Bigr), \qquad
        b_i = \pi_i \Bigl( g_i + \sum_{j \in N_i} g_j(p_i) \Bigr) \\
        G_i &= (1 - \alpha) a_i + \alpha b_i + \lambda x_i, \qquad m_i \leftarrow \beta m_i + G_i, \qquad
        p_i \leftarrow x_i - \eta m_i

    or with ``nesterov`` p_i = x_i - eta (G_i + beta m_i). The own gradient is at the mixed x_i, the cross-gradients are
    at p_j and p_i as they have been sent. a_i (model-variant) is the worker's own to compute; of b_i (data-variant) the
    cross-gradients g_j(p_i) are received, which is a second vector to each neighbour, and not sent at all if alpha = 0.
    A step takes one gradient for each neighbour besides the own one.

    With ``quasi_global`` the momentum is that of :class:`QgDsgdm` (or -N) in terms of the mixed points, with mu = beta:
    m_i = beta m_hat_i + G_i for this step only, and then m_hat_i <- beta m_hat_i + (1 - beta) (x_i - x_i^+) / eta. If
    the workers start apart, m_hat starts from the first mixing, (1 - beta) (p_i - x_i) / eta. With lr = 0 it stays.

    ``opt.x`` is x, where the next own gradient is taken, and the state ``sent_params`` is p.

    Args:
        alpha: in [0, 1], the share of the data-variant. The default 1 is recalled, not verified.
        gamma: averaging rate in (0, 1]; the authors' example runs have 0.1 with lr 0.01.
        nesterov: True by default, as in the authors' example runs.
        quasi_global: quasi-global instead of local momentum.

    Example:
        >>> Ngc(lr=0.1, quasi_global=True).state_names
        ('qg_momentum_buffer', 'sent_params')

    Source: Aketi, Kodge, Roy, "Neighborhood Gradient Clustering" (arXiv 2209.14390);
    aparna-aketi/neighborhood_gradient_clustering.
    """

    name: ClassVar[str] = "ngc"
    messages: ClassVar[int] = 2
    source: ClassVar[str] = "Aketi et al. 2022, arXiv 2209.14390"
    needs: ClassVar[str] = "symmetric (alpha > 0)"

    nesterov: bool = True
    alpha: float = 1.0
    quasi_global: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, low=0.0, high=1.0)
        if not isinstance(self.quasi_global, bool):
            raise TypeError(f"quasi_global must be a bool, got {self.quasi_global!r}")

    @property
    def momentum_name(self) -> str:
        return "qg_momentum_buffer" if self.quasi_global else "momentum_buffer"

    @property
    def slope(self) -> float:
        """How far up the slope gradients are taken; N-SADDLe's rho."""
        return 0.0

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        if self.alpha > 0:
            self.needs_both_directions(topology)

    def gradients(self, probes: Probes) -> None:
        opt, links = probes.opt, probes.links
        probes.own_gradients(self.slope)
        own = self.to_send(opt, "own_error_memory", probes.g.to(opt.compute), opt.workers).values
        local, answers = own.clone(), self.answers(opt, own)
        for numbers in links.rounds:
            cross = self.to_send(opt, "link_error_memory", probes.cross_gradients(numbers, self.slope), numbers)
            local[links.rows(numbers)] += cross.values
            answers.add(numbers, cross)
        if self.alpha > 0:
            opt.send(opt.num_steps, self.gradient_bytes(opt))
            local = (1 - self.alpha) * local + self.alpha * answers.total()
        degrees = [links.degrees[worker] for worker in opt.workers]
        shares = torch.tensor([1.0 / (degree + 1) for degree in degrees], dtype=own.dtype, device=own.device)
        probes.g.copy_(shares[:, None] * local)

    def to_send(self, opt: CrossSteps, memory: str, gradients: Tensor, numbers: Sequence[int]) -> Compressed:
        """The gradients of some workers or links as they are used and sent: as they are."""
        return Compressed(gradients)

    def answers(self, opt: CrossSteps, own: Tensor) -> Answers:
        """Where the cross-gradients go back to the neighbours whose models they are at."""
        return opt.answers(own)

    def gradient_bytes(self, opt: CrossSteps) -> int:
        """Size of one cross-gradient as it is sent."""
        return opt.vector_bytes

    def take_mixing(self, opt: CrossSteps, before: Tensor, lr: float, first: bool) -> None:
        if self.quasi_global and lr > 0:
            m_hat = opt.state["qg_momentum_buffer"]
            m_hat.mul_(self.momentum).add_((before - opt.x).to(m_hat.dtype), alpha=(1 - self.momentum) / lr)


@register
@dataclass(frozen=True, kw_only=True)
class CompNgc(Ngc):
    r"""CompNGC: NGC with compressed cross-gradients and error feedback.

    For each parameter tensor of d numbers, with an error memory e for each neighbour and one for the own gradient,

    .. math::
        c = \operatorname{sign}(e + g) \frac{\|e + g\|_1}{d}, \qquad e \leftarrow e + g - c

    and c takes the place of g in both a_i and b_i of :class:`Ngc`. A cross-gradient costs one bit a parameter; the
    parameters are sent uncompressed. sign(0) = 0, as in the authors' code.

    The neighbours must be the same in every step.

    Args:
        compressor: "sign" as the authors, or another one of :mod:`qgm_ext.compressors`, per parameter tensor.
        bits: of qsgd, without the sign. ratio: share that top_k and random_k leave out. seed: of the random ones.

    Example:
        >>> CompNgc(lr=0.1).state_names
        ('momentum_buffer', 'sent_params', 'own_error_memory', 'link_error_memory')

    Source: as :class:`Ngc`.
    """

    name: ClassVar[str] = "comp_ngc"
    needs: ClassVar[str] = "symmetric, static"

    compressor: str = "sign"
    bits: int = 7
    ratio: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        compressors.make(self.compressor, ratio=self.ratio, bits=self.bits)
        compressors.check_seed(self.seed)

    @property
    def state_names(self) -> tuple[str, ...]:
        return (*super().state_names, "own_error_memory", "link_error_memory")

    @property
    def link_state_names(self) -> tuple[str, ...]:
        return ("link_error_memory",)

    def state_rows(self, name: str, topology: Topology) -> int:
        return topology.mixing(0).num_links if name in self.link_state_names else topology.num_workers

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        self.needs_same_neighbours(topology, "an error memory for each neighbour")

    def make_compressor(self) -> Compressor:
        """Build the compressor."""
        return compressors.make(self.compressor, ratio=self.ratio, bits=self.bits)

    def to_send(self, opt: CrossSteps, memory: str, gradients: Tensor, numbers: Sequence[int]) -> Compressed:
        is_own = memory == "own_error_memory"
        first = opt.workers.start if is_own else opt.links(opt.num_steps).first
        rows = [number - first for number in numbers]
        kept = opt.pending(memory)
        carried = kept[rows] + gradients
        # Own gradients and links are numbered alike; an odd stream is an own gradient's.
        streams = [2 * number + is_own for number in numbers]
        packed = opt.compress(self.make_compressor(), carried, streams, self.seed)
        kept[rows] = carried - packed.values
        return packed

    def answers(self, opt: CrossSteps, own: Tensor) -> Answers:
        return opt.answers(own, self.make_compressor(), self.seed)

    def gradient_bytes(self, opt: CrossSteps) -> int:
        return opt.compressed_bytes(self.make_compressor())


@register
@dataclass(frozen=True, kw_only=True)
class NSaddle(Ngc):
    r"""N-SADDLe: NGC with all its gradients taken up the slope, as sharpness-aware minimisation does.

    Own gradients at :math:`x_i + \rho\, g / (\|g\|_2 + 10^{-12})` with g = grad F_i(x_i; B_i), cross-gradients at
    :math:`p_j + \rho\, g / (\|g\|_2 + 10^{-12})` with g = grad F_i(p_j; B_i), each with the same batch and the norm
    over the whole model; the rest is :class:`Ngc`, which it is for rho = 0. Two evaluations for each gradient.

    **Recalled, not verified**, as said at :class:`QSaddle`.

    Args:
        rho: how far up the slope gradients are taken, >= 0, in units of the parameters.

    Source: Choudhary et al., "SADDLe" (WACV 2025, arXiv 2405.13961).
    """

    name: ClassVar[str] = "n_saddle"
    source: ClassVar[str] = "Choudhary et al. 2025, arXiv 2405.13961 (recalled)"

    rho: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho, low=0.0)

    @property
    def slope(self) -> float:
        return self.rho


@register
@dataclass(frozen=True, kw_only=True)
class CompNSaddle(CompNgc):
    r"""N-SADDLe with compressed cross-gradients: :class:`NSaddle` with the error feedback of :class:`CompNgc`.

    **Recalled, not verified**, as said at :class:`QSaddle`. The default is QSGD with 8 bits a number, a quarter of
    float32: the abstract tells of up to 4x compression.

    Args:
        rho: how far up the slope gradients are taken, >= 0, in units of the parameters.

    Source: as :class:`QSaddle`.
    """

    name: ClassVar[str] = "comp_n_saddle"
    source: ClassVar[str] = "Choudhary et al. 2025, arXiv 2405.13961 (recalled)"

    compressor: str = "qsgd"
    rho: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho, low=0.0)

    @property
    def slope(self) -> float:
        return self.rho
