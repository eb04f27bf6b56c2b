"""How the updates of a step are carried out: alone, or with neighbours.

An optimizer collects :class:`Update` objects, one for each run of parameters that is stepped as one vector, and hands
them to a :class:`Runtime`, which owns the mixing. Nothing here knows parameters, groups or algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from qgm_ext import ops
from qgm_ext import topology as topologies
from qgm_ext.topology import Topology

__all__ = ["OneWorker", "Runtime", "Update", "runtime_for"]


class Update(NamedTuple):
    """One vector to step: what the rule reads and writes, each tensor [1, L], and its numbers."""

    x: Tensor
    grad: Tensor
    state: list[Tensor]
    rule: str
    hyper: list[float]


class Runtime(Protocol):
    """Carries out the updates of one step, all of them, in place."""

    num_workers: int

    def step(self, updates: Sequence[Update]) -> None: ...


class OneWorker:
    """A worker without neighbours: W = [1], so each update is one fused pass."""

    num_workers = 1

    def __init__(self) -> None:
        self._mixing = topologies.complete(1).mixing()

    def step(self, updates: Sequence[Update]) -> None:
        mixing = self._mixing
        for x, grad, state, rule, hyper in updates:
            tensors = mixing.tensors(x.device, ops.compute_dtype(x.dtype))
            ops.gossip_step_(x, grad, state, tensors, mixing.form, rule, hyper)


def runtime_for(topology: Topology | None, group: dist.ProcessGroup | None) -> Runtime:
    """The runtime of this process.

    Args:
        topology: who averages with whom; None for a worker of its own, or the default of a process group.
        group: the process group of the workers; None for the default group if torch.distributed is initialised.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if topology, group and the processes that were started don't fit together.
        NotImplementedError: if the group has several workers; averaging over a process group is not supported yet.
    """
    if topology is not None and not isinstance(topology, Topology):
        raise TypeError(f"topology must be a qgm_ext.topology.Topology or None, got {type(topology).__name__}")
    running = dist.is_available() and dist.is_initialized()
    if group is not None:
        # Not isinstance(group, dist.ProcessGroup): builds without distributed lack the class, and a process outside
        # a new group holds a sentinel, which get_rank knows.
        if not running:
            raise ValueError(
                f"group needs torch.distributed, which is not initialised, got {type(group).__name__}; start with "
                "torchrun and call torch.distributed.init_process_group first"
            )
        if dist.get_rank(group) < 0:
            raise ValueError("group must have this process as a member, got a process group of others")
    size = dist.get_world_size(group) if running else 1
    if topology is not None and topology.num_workers != size:
        if running:
            raise ValueError(f"topology has {topology.num_workers} workers, but the process group has {size}")
        raise ValueError(
            f"topology has {topology.num_workers} workers, but this is a single process: torch.distributed is not "
            f"initialised. Start one process per worker with `torchrun --nproc-per-node {topology.num_workers} "
            "SCRIPT` and call torch.distributed.init_process_group first; for all workers in one process use "
            "qgm_ext.Simulator"
        )
    if size > 1:
        raise NotImplementedError(
            f"the process group has {size} workers, and averaging over a process group is not supported yet: use one "
            "process, or qgm_ext.Simulator for several workers on one device"
        )
    return OneWorker()
