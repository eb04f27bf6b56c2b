"""Decentralized: any algorithm of the package as a torch.optim.Optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.distributed as dist

from qgm_ext import algorithms
from qgm_ext.algorithms import Algorithm
from qgm_ext.distributed.options import RuntimeOptions
from qgm_ext.optim.base import DecentralizedOptimizer, Params
from qgm_ext.stacked import OnNonfinite
from qgm_ext.topology import Topology

__all__ = ["Decentralized"]


class Decentralized(DecentralizedOptimizer):
    """An optimizer by the name of its algorithm; one process is one worker.

    Args:
        params: parameters, named parameters or groups; every hyper-parameter of the algorithm may be set for a group.
        algorithm: a name from :func:`qgm_ext.algorithms.names`, but for those that take gradients at other points than
            a worker's own parameters, which :class:`CrossGradient` runs.
        maximize, topology, group, on_nonfinite: see :class:`DecentralizedOptimizer`.
        **more: hyper-parameters of the algorithm (lr, ...) and options of the runtime
            (:class:`qgm_ext.distributed.RuntimeOptions`).

    What an algorithm takes from a worker's whole model (a norm, what a compressor keeps) it takes here from a parameter
    group; with one group the bits are those of :class:`qgm_ext.Simulator`.

    Raises:
        TypeError, ValueError: if an argument does not fit; it is named with what was expected and what came.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = Decentralized(model.parameters(), "gradient_tracking", lr=0.1)
        >>> model(torch.ones(3)).sum().backward()
        >>> opt.step()
        >>> list(opt.state[model.weight])
        ['correction', 'step']
    """

    family: ClassVar[str] = "decentralized"
    by_passes: ClassVar[bool] = True
    takes_model: ClassVar[bool] = False

    def __init__(
        self,
        params: Params,
        algorithm: str,
        *,
        maximize: bool = False,
        topology: Topology | None = None,
        group: dist.ProcessGroup | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        **more: Any,
    ) -> None:
        if not isinstance(algorithm, str):
            raise TypeError(f"algorithm must be a name, got {type(algorithm).__name__}")
        options = {field.name for field in dataclasses.fields(RuntimeOptions)}
        runtime = {name: more.pop(name) for name in options & more.keys()}
        made = algorithms.get(algorithm, **more)
        if made.needs_model != self.takes_model:
            raise ValueError(
                f"{algorithm} takes gradients at other points than a worker's own parameters, for which the optimizer "
                "must have the model; use qgm_ext.optim.CrossGradient, or qgm_ext.Simulator"
                if made.needs_model
                else f"{algorithm} takes one gradient a step, that of backward(); use qgm_ext.optim.Decentralized"
            )
        self.family = algorithm  # type: ignore[misc]
        defaults = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
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
        names = [field.name for field in dataclasses.fields(algorithms.get_class(self.family))]
        return algorithms.get(self.family, **{name: group[name] for name in names})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"family": self.family}
