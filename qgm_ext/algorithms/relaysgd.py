"""RelaySGD and RelaySGD/Grad: exact averages with a delay, relayed over trees."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from qgm_ext import reference
from qgm_ext.algorithms.base import MomentumAlgorithm, Pass, RelayPass, State, Step, StepResult, register
from qgm_ext.algorithms.gut import check_equal_start
from qgm_ext.topology import Topology
from qgm_ext.trees import Tree, Trees

Fill = Literal["initial", "current"]


@functools.lru_cache(maxsize=64)
def _own_counts(trees: Trees, step: int) -> Tensor:
    """How often a worker's own model counts where those not yet heard of are replaced by it: n - K_i, [K, n]."""
    n = trees.trees[0].num_workers
    return torch.from_numpy(n - trees.reached(step).astype(np.float64))


def _reference_direction(a: RelaySgd | RelaySgdGrad, x: Tensor, g: Tensor, state: State) -> StepResult:
    g = g + a.weight_decay * x
    if a.momentum == 0:
        return g, {}
    m = a.momentum * state["momentum_buffer"] + g
    return (g + a.momentum * m if a.nesterov else m), {"momentum_buffer": m}


@register
@dataclass(frozen=True, kw_only=True)
class RelaySgd(MomentumAlgorithm):
    r"""RelaySGD: every worker's model becomes the exact mean of all models, each as old as its way is long.

    .. math::
        x_i^{1/2} &= x_i - \eta D_i, \qquad
        m_{i \to j} \leftarrow x_i^{1/2} + \sum_{l \in N_i, l \ne j} m_{l \to i}^{\rm prev} \\
        x_i^+ &= \frac 1 n \Bigl( x_i^{1/2} + (n - 1 - K_i) f_i + \sum_{j \in N_i} m_{j \to i} \Bigr)

    on a tree. K_i is how many others' models the messages hold, n - 1 from step tau_max (the diameter) on; what is
    missing before that is replaced by f_i. D is the local step: g' = g + lambda x, or with heavy-ball momentum m, or
    g' + beta m. One vector a step to each neighbour. Exact on heterogeneous data. On several trees at once
    (:func:`qgm_ext.topology.double_binary_trees`) coordinate c goes over tree c mod K.

    Args:
        momentum: beta in [0, 1), local.
        nesterov: use the Nesterov form, as in the paper's deep learning runs.
        fill: "initial": missing models are taken to be the initial parameters (the deep learning code's default; all
            workers must start equal), by messages that hold them at the start. "current": the worker's own model.

    Source: Vogels et al., "RelaySum for Decentralized Deep Learning on Heterogeneous Data" (NeurIPS 2021,
    arXiv 2110.04175); epfml/relaysgd.
    """

    name: ClassVar[str] = "relaysgd"
    source: ClassVar[str] = "Vogels et al. 2021, arXiv 2110.04175"
    needs: ClassVar[str] = "tree"
    rounding_obstacle: ClassVar[str | None] = "relayed sums are sent as they are"

    momentum: float = 0.9
    nesterov: bool = True
    fill: Fill = "initial"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fill not in get_args(Fill):
            raise ValueError(f"fill must be one of {', '.join(get_args(Fill))}, got {self.fill!r}")

    @property
    def can_skip_gossip(self) -> bool:
        return False

    @property
    def rule(self) -> str:
        if self.momentum == 0.0:
            return "dsgd"
        return "dsgdm_n" if self.nesterov else "dsgdm"

    @property
    def _vectors(self) -> tuple[str, ...]:
        return () if self.momentum == 0.0 else ("momentum_buffer",)

    @property
    def state_names(self) -> tuple[str, ...]:
        return (*self._vectors, "relay_messages")

    def state_rows(self, name: str, topology: Topology) -> int:
        return topology.trees().num_edges if name == "relay_messages" else topology.num_workers

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        topology.trees()
        if self.fill == "initial":
            check_equal_start(self, x)

    def start_state(self, topology: Topology, x: Tensor, state: Mapping[str, Tensor]) -> None:
        if self.fill == "current":
            return
        trees, messages = topology.trees().trees, state["relay_messages"]
        for k, tree in enumerate(trees):
            # As if every worker beyond an edge had sent the initial parameters: then all counts are full at once.
            sizes = torch.from_numpy(tree.subtree_sizes()).to(messages)
            messages[:, k :: len(trees)] = sizes[:, None] * x[0, k :: len(trees)].to(messages.dtype)

    def initial_relay(self, tree: Tree, edge: int, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.fill == "current" else x * float(tree.subtree_sizes()[edge])

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.weight_decay] if self.momentum == 0.0 else [lr, self.momentum, self.weight_decay]

    def passes(self, step: Step) -> Iterator[Pass | RelayPass]:
        trees = step.topology.trees()
        n = step.num_workers
        counts = torch.ones(len(trees.trees), n, dtype=torch.float64)
        if self.fill == "current":
            counts = _own_counts(trees, min(step.number, n))
        hyper = self.hyper(step.number, step.lr)
        yield RelayPass(self.rule, hyper, self._vectors, "relay_messages", trees, counts)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        """With fill "initial" the first messages hold the initial parameters of all that are not yet heard of."""
        direction, kept = _reference_direction(self, x, g, state)
        x_half, n = x - lr * direction, len(x)
        messages, received = reference.relay(w, x_half, state["relay_messages"])
        own = torch.ones(n, 1, dtype=x.dtype)
        if self.fill == "current":
            own = (n - ((reference.tree_distances(w) <= step + 1).sum(1) - 1)).to(x.dtype)[:, None]
        return (own * x_half + received) / n, {**kept, "relay_messages": messages}


@register
@dataclass(frozen=True, kw_only=True)
class RelaySgdGrad(MomentumAlgorithm):
    r"""RelaySGD/Grad: the local steps are relayed instead of the models.

    .. math::
        u_i = -\eta D_i, \qquad m_{i \to j} \leftarrow u_i + \sum_{l \in N_i, l \ne j} m_{l \to i}^{\rm prev},
        \qquad x_i \leftarrow x_i + \frac 1 n \Bigl( u_i + \sum_{j \in N_i} m_{j \to i} \Bigr)

    with messages 0 at the start and D as in :class:`RelaySgd`. All workers add the same steps, at different times;
    nothing averages the models, which stay apart by the steps still under way and drift by rounding. So with a constant
    step size and heterogeneous data they come to rest off the optimum, by O(eta) (examples/quadratics.py).

    Args:
        momentum: beta in [0, 1), local.
        nesterov: use the Nesterov form.

    Source: as :class:`RelaySgd`.
    """

    name: ClassVar[str] = "relaysgd_grad"
    source: ClassVar[str] = "Vogels et al. 2021, arXiv 2110.04175"
    needs: ClassVar[str] = "tree"
    rounding_obstacle: ClassVar[str | None] = "relayed sums are sent as they are"

    nesterov: bool = True

    @property
    def can_skip_gossip(self) -> bool:
        return False

    @property
    def rule(self) -> str:
        if self.momentum == 0.0:
            return "relay_grad"
        return "relay_grad_m_n" if self.nesterov else "relay_grad_m"

    @property
    def _vectors(self) -> tuple[str, ...]:
        return () if self.momentum == 0.0 else ("momentum_buffer",)

    @property
    def state_names(self) -> tuple[str, ...]:
        return (*self._vectors, "relay_messages")

    def state_rows(self, name: str, topology: Topology) -> int:
        return topology.trees().num_edges if name == "relay_messages" else topology.num_workers

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        topology.trees()

    def hyper(self, step: int, lr: float) -> list[float]:
        return [lr, self.weight_decay] if self.momentum == 0.0 else [lr, self.momentum, self.weight_decay]

    def passes(self, step: Step) -> Iterator[Pass | RelayPass]:
        trees = step.topology.trees()
        counts = torch.ones(len(trees.trees), step.num_workers, dtype=torch.float64)
        hyper = self.hyper(step.number, step.lr)
        yield RelayPass(self.rule, hyper, self._vectors, "relay_messages", trees, counts)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        direction, kept = _reference_direction(self, x, g, state)
        messages, received = reference.relay(w, -lr * direction, state["relay_messages"])
        return x + (received - lr * direction) / len(x), {**kept, "relay_messages": messages}
