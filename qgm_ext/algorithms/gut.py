"""Global update tracking: GUT and QG-GUTm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qgm_ext.algorithms.base import Algorithm, MomentumAlgorithm, Pass, Step, check_number, register
from qgm_ext.topology import Topology


def check_equal_start(algorithm: Algorithm, x: Tensor) -> None:
    """Refuse workers that start from different parameters."""
    if not bool((x == x[0]).all()):
        raise ValueError(f"{algorithm.name} needs all workers to start from the same parameters; rows of x differ")


@register
@dataclass(frozen=True, kw_only=True)
class Gut(Algorithm):
    r"""GUT: tracks the change of the whole model, gossip included, so that local updates follow the global one.

    .. math::
        \delta_i &= g_i - \frac{r_i}{\eta'}, \qquad r_i = \sum_j w_{ij} p_j - p_i, \qquad g_i = \nabla F_i(p_i + r_i) \\
        y_i &= \delta_i - \frac{\mu}{\eta'} \Bigl[ \sum_j w_{ij} (p_j - p_j^{\rm prev}) + B r_i^{\rm prev} \Bigr]
        - \mu \delta_i^{\rm prev}, \qquad B = 1 \\
        p_i^+ &= p_i - \eta y_i

    p is a worker's own model; the gradient is taken at the mixed point p + r, which is ``opt.x``. eta' is the step size
    of the step before. One vector a step (the change of p). With constant lr it stays biased, less for larger mu; with
    mu = 0 it is p+ = W p - eta g(W p). The averaging rate gamma is 1, the only value the authors' scripts use.
    ``weight_decay`` acts at the mixed point; it is 0 in the source. With lr = 0 nothing moves.

    Args:
        scaling: mu in [0, 1), 0.9 in the authors' scripts.

    Stability of pure gossip: mu = 0.9 needs eigenvalues of W above -0.357 (the social network has -0.434).
    Source: Aketi, Choudhary, Roy, "Global Update Tracking" (NeurIPS 2023, arXiv 2305.04792);
    aparna-aketi/global_update_tracking.
    """

    name: ClassVar[str] = "gut"
    source: ClassVar[str] = "Aketi et al. 2023, arXiv 2305.04792"
    needs: ClassVar[str] = "doubly stochastic, lambda_n > -0.357"

    scaling: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scaling", self.scaling, low=0.0, high=1.0, high_open=True)

    @property
    def rule(self) -> str:
        return "gut"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("mixing_displacement", "correction")

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        check_equal_start(self, x)

    def passes(self, step: Step) -> Iterator[Pass]:
        hyper = [step.lr, step.previous_lr, 0.0, self.scaling, self.weight_decay]
        yield Pass(self.rule, hyper, self.state_names, step.mixing)


@register
@dataclass(frozen=True, kw_only=True)
class QgGutm(MomentumAlgorithm):
    r"""QG-GUTm: GUT with momentum on the tracked update.

    .. math::
        M_i \leftarrow \beta M_i + y_i, \qquad p_i^+ = p_i - \eta M_i \quad (\text{Nesterov: } y_i + \beta M_i)

    with y as in :class:`Gut` and B = 1 + beta (Nesterov: 1 + beta + beta^2).

    Args:
        momentum: beta in [0, 1).
        scaling: mu in [0, 1); 0.06 in the authors' scripts for a ring of 16 (0.005 to 0.08 elsewhere).
        nesterov: use the Nesterov form.

    Stability of pure gossip with mu = 0.06: always; with Nesterov, eigenvalues above -0.452.
    Source: as :class:`Gut`.
    """

    name: ClassVar[str] = "qg_gutm"
    source: ClassVar[str] = "Aketi et al. 2023, arXiv 2305.04792"

    scaling: float = 0.06
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scaling", self.scaling, low=0.0, high=1.0, high_open=True)

    @property
    def rule(self) -> str:
        return "qg_gutm_n" if self.nesterov else "qg_gutm"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("mixing_displacement", "correction", "momentum_buffer")

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        check_equal_start(self, x)

    def passes(self, step: Step) -> Iterator[Pass]:
        hyper = [step.lr, step.previous_lr, self.momentum, self.scaling, self.weight_decay]
        yield Pass(self.rule, hyper, self.state_names, step.mixing)
