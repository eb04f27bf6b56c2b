"""Cross-feature Contrastive Loss (CCL): workers pull their features towards their neighbours'."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgm_ext.algorithms.base import check_number, register
from qgm_ext.algorithms.cross_gradient import MixFirstAlgorithm
from qgm_ext.compressors import Compressed
from qgm_ext.models.features import Features, Recorder, feature_layer

if TYPE_CHECKING:
    from qgm_ext.cross_gradients import CrossSteps, Probes
    from qgm_ext.topology import Topology


@register
@dataclass(frozen=True, kw_only=True)
class Ccl(MixFirstAlgorithm):
    r"""CCL: two terms of the loss compare features across models and across data.

    With p_j the parameters that worker j has sent, N_i the neighbours of i, x_i the mixed parameters,
    z = phi(x_i; B_i) the features of the worker's batch and zc_j = phi(p_j; B_i) those of the same batch under a
    neighbour's parameters,

    .. math::
        r_i &= \gamma \sum_j w_{ij} (p_j - p_i), \qquad x_i = p_i + r_i, \qquad
        m_i \leftarrow m_i - r_i / \eta_{prev} \\
        L_i &= F_i(x_i; B_i) + \lambda_m \sum_{j \in N_i} \operatorname{MSE}(z, zc_j)
               + \lambda_d \operatorname{MSE}(z, T_i[y]) \\
        g_i &= \nabla L_i + \lambda x_i, \qquad m_i \leftarrow \beta m_i + g_i, \qquad p_i \leftarrow x_i - \eta m_i

    or with ``nesterov`` p_i = x_i - eta (g_i + beta m_i). MSE is the mean over batch and features, and the gradient
    goes through z alone.

    - model-variant: zc_j is computed by the worker itself, by its model with p_j in evaluation mode.
    - data-variant: T_i[c] is the mean feature of class c, over the worker's own batch (z) and, under p_i, over the
      neighbours' batches. Each neighbour sends for each class the sum of features and their number; classes that
      nobody has stay zero, and are nobody's target.

    Sent to each neighbour in a step: the parameters, and C (F + 1) numbers for C classes and F features if lambda_d is
    not 0. A step takes one forward pass for each neighbour besides the own gradient. The losses that a step returns
    are L_i, with both terms.

    The momentum takes the whole displacement by gossip, with weight 1 and the step size of the step before (that of the
    first step, at the start; after a step with lr = 0 it takes none). With heavy ball and both lambdas 0 the x_i
    follow :class:`QgDsgdm` with qg_momentum = 0. It is unstable where (1 - gamma) + gamma W has an eigenvalue below
    -1 / (1 + 2 beta), or with Nesterov -(1 + beta - beta^2) / (1 + beta + beta^2); a warning says so. On the social
    network it needs gamma < 1; the authors take 0.9 on their tori.

    The model says which layer's output are its features, :func:`qgm_ext.models.declare_feature_layer`. Batches must be
    pairs (inputs, classes [B]) and the model's output class scores [B, C] for the data-variant.

    ``opt.x`` is x, where the next gradient is taken, and the state ``sent_params`` is p.

    Args:
        lambda_m: weight of the model-variant, >= 0.
        lambda_d: weight of the data-variant, >= 0.
        gamma: averaging rate in (0, 1].
        nesterov: True by default, as the authors run it.

    Example:
        >>> Ccl(lr=0.1).lambda_m, Ccl(lr=0.1).nesterov
        (0.1, True)

    Source: Aketi, Roy, "Cross-feature Contrastive Loss for Decentralized Deep Learning on Heterogeneous Data" (WACV
    2024, arXiv 2310.15890); aparna-aketi/Cross_feature_Contrastive_Loss.
    """

    name: ClassVar[str] = "ccl"
    source: ClassVar[str] = "Aketi, Roy 2024, arXiv 2310.15890"
    needs: ClassVar[str] = "symmetric (lambda_d > 0)"

    nesterov: bool = True
    lambda_m: float = 0.1
    lambda_d: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lambda_m", self.lambda_m, low=0.0)
        check_number("lambda_d", self.lambda_d, low=0.0)

    @property
    def stable_above(self) -> float:
        """The eigenvalue of the relaxed mixing matrix below which gossip alone diverges."""
        beta = self.momentum
        if self.nesterov:
            return -(1 + beta - beta**2) / (1 + beta + beta**2)
        return -1 / (1 + 2 * beta)

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        if self.lambda_d > 0:
            self.needs_both_directions(topology)
        if topology.is_time_varying or not topology.is_symmetric:
            return
        smallest = 1 - self.gamma + self.gamma * topology.lambda_n
        if smallest < self.stable_above - 1e-12:
            gamma = (1 - self.stable_above) / (1 - topology.lambda_n)
            warnings.warn(
                f"ccl with momentum {self.momentum:g} diverges on topology {topology.name!r} with gamma "
                f"{self.gamma:g}: its smallest eigenvalue {smallest:.3f} is below {self.stable_above:.3f}; use gamma "
                f"below {gamma:.3g}",
                stacklevel=2,
            )

    def check_model(self, model: nn.Module) -> None:
        if self._compares:
            feature_layer(model)

    @property
    def _compares(self) -> bool:
        return self.lambda_m > 0 or self.lambda_d > 0

    def gradients(self, probes: Probes) -> None:
        if not self._compares:
            probes.own_gradients()
            return
        layer = feature_layer(probes.model)
        cross: dict[int, Features] = {}
        for numbers in probes.links.rounds:
            cross.update(zip(numbers, probes.cross_features(numbers, layer), strict=True))
        extras: list[dict[str, Tensor]] = [{} for _ in probes.batches]
        if self.lambda_m > 0 and cross:
            _add_neighbours_features(extras, probes, cross, layer)
        if self.lambda_d > 0:
            _add_class_sums(extras, probes, cross, layer)
        closure = _Contrast(probes.closure, layer, self.lambda_m, self.lambda_d)
        probes.own_gradients(closure=closure, batches=list(zip(probes.batches, extras, strict=True)))

    def take_mixing(self, opt: CrossSteps, before: Tensor, lr: float, first: bool) -> None:
        if lr > 0:
            m, sent = opt.state["momentum_buffer"], opt.state["sent_params"]
            m.add_(sent - opt.x.to(m.dtype), alpha=1 / lr)


class _Contrast:
    """The user's loss and the two terms, of a batch and what the neighbours' models and data say of it."""

    def __init__(self, closure: Any, layer: str, lambda_m: float, lambda_d: float) -> None:
        self._closure, self._layer = closure, layer
        self._lambda_m, self._lambda_d = lambda_m, lambda_d

    def __call__(self, model: nn.Module, item: tuple[Any, dict[str, Tensor]]) -> Tensor:
        batch, extra = item
        with Recorder(model, self._layer) as recorder:
            loss: Tensor = self._closure(model, batch)
        z = recorder.result().features
        if "neighbours" in extra:
            errors = (z - extra["neighbours"]).square().flatten(1).mean(1)
            loss = loss + self._lambda_m * (errors * extra["is_there"]).sum()
        if "sums" in extra:
            classes = batch[1]
            sums, counts = _class_sums(z.detach(), classes, len(extra["counts"]))
            counts = extra["counts"] + counts
            means = (extra["sums"] + sums) / counts.clamp(min=1)[:, None]
            loss = loss + self._lambda_d * F.mse_loss(z, means[classes].to(z.dtype))
        return loss


def _add_neighbours_features(
    extras: list[dict[str, Tensor]], probes: Probes, cross: dict[int, Features], layer: str
) -> None:
    """zc_j of all neighbours, [K, B, F], and 1 for each that is there, [K]: as many for every worker, K."""
    links, most = probes.links, max(probes.links.degrees)
    for row, (worker, extra) in enumerate(zip(links.workers, extras, strict=True)):
        mine = [found.features for link, found in cross.items() if links.receivers[link] == worker]
        missing = most - len(mine)
        like = mine[0] if mine else probes.own_features(row, layer).features
        extra["neighbours"] = torch.stack([*mine, *[torch.zeros_like(like)] * missing])
        extra["is_there"] = torch.tensor([1.0] * len(mine) + [0.0] * missing).to(like)


def _add_class_sums(extras: list[dict[str, Tensor]], probes: Probes, cross: dict[int, Features], layer: str) -> None:
    """Sums of features and numbers of samples of each class, [C, F] and [C], from the neighbours' batches."""
    links, opt = probes.links, probes.opt
    example = next(iter(cross.values())) if cross else probes.own_features(0, layer)
    num_classes = _num_classes(example.output)
    for worker, batch in zip(links.workers, probes.batches, strict=True):
        _check_classes(worker, batch, num_classes)
    width, dtype = example.features.shape[1], torch.promote_types(example.features.dtype, torch.float32)
    answers = opt.answers(example.features.new_zeros(len(extras), num_classes, width + 1, dtype=dtype))
    for numbers in links.rounds:
        found = []
        for link, row in zip(numbers, links.rows(numbers), strict=True):
            sums, counts = _class_sums(cross[link].features, probes.batches[row][1], num_classes)
            found.append(torch.cat([sums, counts[:, None]], dim=1))
        answers.add(numbers, Compressed(torch.stack(found)))
    for extra, total in zip(extras, answers.total(), strict=True):
        extra["sums"], extra["counts"] = total[:, :width], total[:, width]
    opt.send(opt.num_steps, num_classes * (width + 1) * dtype.itemsize)


def _class_sums(features: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Per class: sum of features [C, F] and number of samples [C], at least in float32."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    is_of = (classes[:, None] == torch.arange(num_classes, device=classes.device)).to(features.dtype)
    return is_of.T @ features, is_of.sum(0)


def _num_classes(output: Tensor | None) -> int:
    if output is None or output.dim() != 2:
        got = "something else" if output is None else str(list(output.shape))
        raise ValueError(f"ccl with lambda_d > 0 needs a model that returns class scores [B, C], got {got}")
    return output.shape[1]


def _check_classes(worker: int, batch: Any, num_classes: int) -> None:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    if not pair or batch[1].dim() != 1 or batch[1].is_floating_point():
        raise ValueError(
            f"ccl with lambda_d > 0 needs batches (inputs, classes [B] of integers), that of worker {worker} is not"
        )
    low, high = int(batch[1].min()), int(batch[1].max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"classes must be in [0, {num_classes}), the batch of worker {worker} has {low} to {high}")
