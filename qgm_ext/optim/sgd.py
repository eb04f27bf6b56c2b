"""SGD of one worker and its neighbours: DSGD, DSGDm (local momentum) and QGSGD (quasi-global momentum).

The equations are in :mod:`qgm_ext.algorithms.dsgd` and :mod:`qgm_ext.algorithms.qg_dsgdm`; here is only how a
parameter group names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from qgm_ext.algorithms import Algorithm, get
from qgm_ext.distributed.options import RuntimeArguments
from qgm_ext.optim.base import DecentralizedOptimizer, Params
from qgm_ext.stacked import OnNonfinite
from qgm_ext.topology import Topology

__all__ = ["DSGD", "QGSGD", "DSGDm"]


class DSGD(DecentralizedOptimizer):
    """Decentralized SGD: a gradient step, then averaging with the neighbours. Alone: torch.optim.SGD.

    Args:
        params: parameters, named parameters or groups; lr and weight_decay may be set for each group.
        lr: step size eta >= 0, a number or a tensor of one element.
        weight_decay: lambda >= 0, coupled: added to the gradient.
        maximize, topology, group, on_nonfinite, **runtime: see :class:`DecentralizedOptimizer`.

    Raises:
        TypeError, ValueError: if an argument does not fit; it is named with what was expected and what came.

    Source: Lian et al. 2017, arXiv 1705.09056; see :class:`qgm_ext.algorithms.dsgd.Dsgd`.
    """

    family: ClassVar[str] = "dsgd"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        topology: Topology | None = None,
        group: dist.ProcessGroup | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        **runtime: Unpack[RuntimeArguments],
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            maximize=maximize,
            topology=topology,
            group=group,
            on_nonfinite=on_nonfinite,
            **runtime,
        )

    def make_algorithm(self, group: Mapping[str, Any]) -> Algorithm:
        return get("dsgd", lr=group["lr"], weight_decay=group["weight_decay"])


class DSGDm(DecentralizedOptimizer):
    """DSGD with momentum that each worker keeps for itself. Alone: torch.optim.SGD with momentum, dampening 0.

    Args:
        params: parameters, named parameters or groups; the arguments up to weight_decay may be set for each group.
        lr: step size eta >= 0, a number or a tensor of one element.
        momentum: beta in [0, 1).
        nesterov: take the step g + beta m instead of m.
        weight_decay: lambda >= 0, coupled: added to the gradient before the momentum.
        maximize, topology, group, on_nonfinite, **runtime: see :class:`DecentralizedOptimizer`.

    Raises:
        TypeError, ValueError: if an argument does not fit; it is named with what was expected and what came.

    Source: see :class:`qgm_ext.algorithms.dsgd.Dsgdm`.
    """

    family: ClassVar[str] = "dsgdm"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0.9,
        nesterov: bool = False,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        topology: Topology | None = None,
        group: dist.ProcessGroup | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        **runtime: Unpack[RuntimeArguments],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            maximize=maximize,
            topology=topology,
            group=group,
            on_nonfinite=on_nonfinite,
            **runtime,
        )

    def make_algorithm(self, group: Mapping[str, Any]) -> Algorithm:
        name = "dsgdm_n" if _nesterov(group) else "dsgdm"
        return get(name, lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"])


class QGSGD(DecentralizedOptimizer):
    """SGD with quasi-global momentum, QG-DSGDm(-N): the momentum follows the whole step, averaging included.

    Alone it is quasi-hyperbolic momentum (QHM): with one worker, beta = ``momentum`` (beta^2 with ``nesterov``) and
    mu = ``qg_momentum``, QHM with discount b = mu + (1 - mu) beta, nu = beta / b and step size lr / (1 - momentum).
    It equals SGD with momentum only for mu = 0.

    Args:
        params: parameters, named parameters or groups; the arguments up to local_step may be set for each group.
        lr: step size eta >= 0, a number or a tensor of one element. 0 leaves the momentum as it is.
        momentum: beta in [0, 1), weight of the momentum in a step.
        qg_momentum: mu in [0, 1], how much of the momentum stays; 0.9 whatever momentum is, as in the authors' code.
        nesterov: the Nesterov form, QG-DSGDm-N.
        weight_decay: lambda >= 0, coupled: added to the gradient before the momentum.
        local_step: k >= 1; with k > 1 the momentum takes the mean of k steps on every k-th step.
        maximize, topology, group, on_nonfinite, **runtime: see :class:`DecentralizedOptimizer`.

    Raises:
        TypeError, ValueError: if an argument does not fit; it is named with what was expected and what came.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = QGSGD(model.parameters(), lr=0.1, weight_decay=1e-4)
        >>> for x, y in [(torch.ones(4, 3), torch.zeros(4, 1))] * 30:
        ...     opt.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     opt.step()
        >>> list(opt.state[model.weight])
        ['qg_momentum_buffer', 'step']

    Source: Lin et al. 2021, arXiv 2102.04761; see :class:`qgm_ext.algorithms.qg_dsgdm.QgDsgdm`.
    """

    family: ClassVar[str] = "qg_dsgdm"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        qg_momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        local_step: int = 1,
        maximize: bool = False,
        topology: Topology | None = None,
        group: dist.ProcessGroup | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        **runtime: Unpack[RuntimeArguments],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "qg_momentum": qg_momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "local_step": local_step,
        }
        super().__init__(
            params,
            defaults,
            maximize=maximize,
            topology=topology,
            group=group,
            on_nonfinite=on_nonfinite,
            **runtime,
        )

    def make_algorithm(self, group: Mapping[str, Any]) -> Algorithm:
        return get(
            "qg_dsgdm_n" if _nesterov(group) else "qg_dsgdm",
            lr=group["lr"],
            momentum=group["momentum"],
            qg_momentum=group["qg_momentum"],
            weight_decay=group["weight_decay"],
            local_step=group["local_step"],
        )


def _nesterov(group: Mapping[str, Any]) -> bool:
    value = group["nesterov"]
    if not isinstance(value, bool):
        raise TypeError(f"nesterov must be True or False, got {value!r}")
    return value
