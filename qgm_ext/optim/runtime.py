"""Which runtime a process gets, and the one of a worker alone.

A worker alone collects :class:`Update` objects, one for each run of parameters that is stepped as one vector, and hands
them to :class:`OneWorker`. Workers that average with others have :class:`qgm_ext.optim.peers.Peers`. Nothing here knows
parameters, groups or algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist
from torch import Tensor

from qgm_ext import ops
from qgm_ext import topology as topologies
from qgm_ext.distributed.communication import Communication
from qgm_ext.distributed.options import RuntimeOptions
from qgm_ext.topology import Topology

if TYPE_CHECKING:
    from qgm_ext.optim.peers import Peers

__all__ = ["OneWorker", "Update", "runtime_for"]


class Update(NamedTuple):
    """One vector to step: what the rule reads and writes, each tensor [1, L], and its numbers."""

    x: Tensor
    grad: Tensor
    state: list[Tensor]
    rule: str
    hyper: list[float]


class OneWorker:
    """A worker without neighbours: W = [1], so each update is one fused pass."""

    num_workers = 1
    communication = last_communication = Communication()

    def __init__(self) -> None:
        self._mixing = topologies.complete(1).mixing()

    def step(self, updates: Sequence[Update]) -> None:
        mixing = self._mixing
        for x, grad, state, rule, hyper in updates:
            tensors = mixing.tensors(x.device, ops.compute_dtype(x.dtype))
            ops.gossip_step_(x, grad, state, tensors, mixing.form, rule, hyper)


def runtime_for(
    topology: Topology | None, group: dist.ProcessGroup | None, options: RuntimeOptions, by_passes: bool
) -> OneWorker | Peers:
    """The runtime of this process.

    Args:
        topology: who averages with whom; None for a worker of its own.
        group: the process group of the workers; None for the default group if torch.distributed is initialised.
        options: of the runtime of several workers.
        by_passes: the algorithm may be more than one rule, so that even a worker alone runs it pass by pass.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if topology, group and the processes that were started don't fit together.
    """
    from qgm_ext.optim.peers import Peers  # which builds on this module's buffers

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
    if size > 1 and topology is None:
        raise ValueError(
            f"the process group has {size} workers, so topology must say who averages with whom, e.g. "
            f"topology=qgm_ext.topology.ring({size}); got None"
        )
    if size > 1 or by_passes:
        return Peers(topologies.complete(1) if topology is None else topology, group, options)
    return OneWorker()
