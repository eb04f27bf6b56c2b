"""The methods that the WAN test bed compares: each takes a model's gradients and makes one step over the network.

``bare_*`` move the bytes of the gossip methods with plain torch.distributed and no optimizer of this package; they say
what the network allows, and the bed itself is proven with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import qgm_ext as qgm

__all__ = ["DEFAULT", "METHODS", "Trained"]

MOMENTUM = 0.9


@dataclass
class Trained:
    """A model in training.

    Args:
        forward: what to call instead of the model.
        step: to be called after backward; clears the gradients.
    """

    forward: nn.Module
    step: Callable[[], None]


def _sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, nesterov=True)


def _all_reduce(model: nn.Module, lr: float, bfloat16: bool = False) -> Trained:
    wrapped = DistributedDataParallel(model)
    if bfloat16:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    optimizer = _sgd(model, lr)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trained(wrapped, step)


def _bare(topology: qgm.topology.Topology, dtype: torch.dtype) -> Callable[[nn.Module, float], Trained]:
    """Momentum SGD, then one flat buffer to every neighbour and the weighted mean of what comes."""

    def make(model: nn.Module, lr: float) -> Trained:
        optimizer, rank = _sgd(model, lr), dist.get_rank()
        params = list(model.parameters())
        flat = torch.cat([p.detach().flatten() for p in params])
        place = 0
        for p in params:
            p.data = flat[place : place + p.numel()].view_as(p)
            place += p.numel()
        count = 0

        def step() -> None:
            nonlocal count
            optimizer.step()
            optimizer.zero_grad()
            weights = topology.matrix(count)
            sources = [j for j in range(len(weights)) if j != rank and weights[rank, j]]
            targets = [j for j in range(len(weights)) if j != rank and weights[j, rank]]
            message = flat.to(dtype) if dtype != flat.dtype else flat
            received: list[Tensor] = [torch.empty_like(message) for _ in sources]
            exchanges = [dist.P2POp(dist.irecv, buffer, j) for buffer, j in zip(received, sources, strict=True)]
            exchanges += [dist.P2POp(dist.isend, message, j) for j in targets]
            for work in dist.batch_isend_irecv(exchanges):
                work.wait()
            flat.mul_(float(weights[rank, rank]))
            for buffer, j in zip(received, sources, strict=True):
                flat.add_(buffer, alpha=float(weights[rank, j]))
            count += 1

        return Trained(model, step)

    return make


def _quasi_global(
    topology: qgm.topology.Topology, message: str = "float32", overlap: bool = False
) -> Callable[[nn.Module, float], Trained]:
    def make(model: nn.Module, lr: float) -> Trained:
        megabytes = sum(p.numel() for p in model.parameters()) * 4e-6
        optimizer = qgm.optim.QGSGD(
            model.parameters(),
            lr=lr,
            momentum=MOMENTUM,
            nesterov=True,
            topology=topology,
            message=message,
            overlap=overlap,
            bucket_mb=megabytes / 8 if overlap else 25.0,
        )

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return Trained(model, step)

    return make


# Name: (what the table calls it, of how many hosts -> how to make it).
METHODS: dict[str, tuple[str, Callable[[int], Callable[[nn.Module, float], Trained]]]] = {
    "ddp": ("all-reduce SGDm (DDP), float32", lambda n: _all_reduce),
    "ddp_bf16": ("all-reduce SGDm (DDP), bfloat16", lambda n: lambda model, lr: _all_reduce(model, lr, True)),
    "ring": ("QG-DSGDm-N, ring, float32", lambda n: _quasi_global(qgm.topology.ring(n))),
    "one_peer": (
        "QG-DSGDm-N, one-peer exponential, float32",
        lambda n: _quasi_global(qgm.topology.one_peer_exponential(n)),
    ),
    "one_peer_bf16": (
        "QG-DSGDm-N, one-peer exponential, bfloat16",
        lambda n: _quasi_global(qgm.topology.one_peer_exponential(n), "bfloat16"),
    ),
    "one_peer_int8": (
        "QG-DSGDm-N, one-peer exponential, int8",
        lambda n: _quasi_global(qgm.topology.one_peer_exponential(n), "int8"),
    ),
    "one_peer_overlap": (
        "QG-DSGDm-N, one-peer exponential, float32, overlap",
        lambda n: _quasi_global(qgm.topology.one_peer_exponential(n), overlap=True),
    ),
    "bare_ring": ("bare exchange, ring, float32", lambda n: _bare(qgm.topology.ring(n), torch.float32)),
    "bare_one_peer": (
        "bare exchange, one-peer, float32",
        lambda n: _bare(qgm.topology.one_peer_exponential(n), torch.float32),
    ),
    "bare_one_peer_bf16": (
        "bare exchange, one-peer, bfloat16",
        lambda n: _bare(qgm.topology.one_peer_exponential(n), torch.bfloat16),
    ),
}

DEFAULT = ("ddp", "ring", "one_peer", "one_peer_bf16", "one_peer_int8", "bare_one_peer")
