"""What the algorithms have in common that take gradients elsewhere than at the worker's own parameters.

Holds the contract between them and :mod:`qgm_ext.cross_gradients`, which runs them, and the step of those that mix
first. No algorithm is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from qgm_ext.algorithms.base import Algorithm, check_number

if TYPE_CHECKING:
    from qgm_ext.cross_gradients import CrossSteps, Probes
    from qgm_ext.topology import Topology

__all__ = ["CrossGradientAlgorithm", "MixFirstAlgorithm"]


@dataclass(frozen=True, kw_only=True)
class CrossGradientAlgorithm(Algorithm):
    """An algorithm whose step takes more than the gradient of each worker at its own parameters.

    A step is :meth:`gradients`, then clipping and the check for infinities by the caller, then :meth:`advance`.
    State is changed in :meth:`advance` alone, because the step may be left out.

    Args:
        momentum: beta in [0, 1).
        nesterov: the step is g + beta m instead of m.
    """

    needs_model: ClassVar[bool] = True
    rounding_obstacle: ClassVar[str | None] = "its workers send more than one kind of message"

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("momentum", self.momentum, low=0.0, high=1.0, high_open=True)
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov must be a bool, got {self.nesterov!r}")

    @property
    def can_skip_gossip(self) -> bool:
        return False

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError for a model that this algorithm can't train; called before the first step."""

    def needs_both_directions(self, topology: Topology) -> None:
        """Refuse links that go one way: an answer to what came over a link goes back over it."""
        if not topology.is_symmetric:
            raise ValueError(
                f"{self.name} sends answers back to the workers it receives from, so every link must go both ways; "
                f"topology {topology.name!r} has one-way links"
            )

    def needs_same_neighbours(self, topology: Topology, kept: str) -> None:
        """Refuse neighbours that change, because a worker keeps something of them."""
        if topology.is_time_varying:
            raise ValueError(
                f"{self.name} keeps {kept}, so the neighbours must be the same in every step; topology "
                f"{topology.name!r} is time-varying"
            )

    def start(self, opt: CrossSteps, lr: float) -> None:
        """Set parameters and state to what they are before the first gradient; they are put back if that step fails."""

    def gradients(self, probes: Probes) -> None:
        """Leave in ``probes.g`` what the step takes for the gradient, without weight decay."""
        raise NotImplementedError

    def advance(self, opt: CrossSteps, g: Tensor, lr: float) -> None:
        """The step of parameters and state with what :meth:`gradients` left, after clipping."""
        raise NotImplementedError

    def descend(self, opt: CrossSteps, g: Tensor, lr: float, momentum: Tensor) -> None:
        """g' = g + wd x;  m <- beta m + g';  x <- x - eta (m, or with Nesterov g' + beta m). Nothing is sent."""
        rule = "dsgdm_n" if self.nesterov else "dsgdm"
        opt.run_rule(rule, [lr, self.momentum, self.weight_decay], g, [momentum])


@dataclass(frozen=True, kw_only=True)
class MixFirstAlgorithm(CrossGradientAlgorithm):
    r"""A step that mixes before it takes the gradient, as the authors' codes write it, run here as descend, then mix.

    In a step the codes mix the parameters p, y = p + gamma (W - I) p, take gradients at y (and at the neighbours' p),
    and descend from y to the next p. Here ``opt.x`` is y, where the next gradient is to be taken, and p, as the
    neighbours have received it, is the state ``sent_params``. The mixing before the first gradient is done in the first
    step; it changes nothing if all workers start equal.

    Args:
        gamma: averaging rate in (0, 1].
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, low=0.0, high=1.0)
        if self.gamma == 0:
            raise ValueError("gamma must be in (0, 1], got 0")

    @property
    def momentum_name(self) -> str:
        """The state vector of the momentum."""
        return "momentum_buffer"

    @property
    def state_names(self) -> tuple[str, ...]:
        return (self.momentum_name, "sent_params")

    def start(self, opt: CrossSteps, lr: float) -> None:
        opt.state["sent_params"].copy_(opt.x)
        opt.state[self.momentum_name].zero_()
        if not opt.start_alike():
            before = opt.x.clone()
            opt.mix_params(self.gamma, opt.num_steps)
            self.take_mixing(opt, before, lr, first=True)

    def advance(self, opt: CrossSteps, g: Tensor, lr: float) -> None:
        before = opt.x.clone()
        momentum = opt.state[self.momentum_name]
        # Quasi-global momentum has this step's gradient for this step only.
        self.descend(opt, g, lr, momentum if self.momentum_name == "momentum_buffer" else momentum.clone())
        opt.state["sent_params"].copy_(opt.x)
        opt.send(opt.num_steps + 1, opt.vector_bytes)
        opt.mix_params(self.gamma, opt.num_steps + 1)
        self.take_mixing(opt, before, lr, first=False)

    def take_mixing(self, opt: CrossSteps, before: Tensor, lr: float, first: bool) -> None:
        """What the momentum takes from the step after ``sent_params`` have been mixed into ``opt.x``.

        Args:
            before: the gradient point of the step, or the parameters at the start if ``first``.
        """
