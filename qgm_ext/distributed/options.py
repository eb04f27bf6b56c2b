"""How workers in processes of their own talk: everything about the runtime that is not the algorithm."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from typing_extensions import TypedDict

from qgm_ext import messages
from qgm_ext.hints import did_you_mean

__all__ = ["ON_PEER_LOSS", "OnPeerLoss", "RuntimeArguments", "RuntimeOptions", "options_from"]

OnPeerLoss = Literal["raise", "heal"]
ON_PEER_LOSS: tuple[str, ...] = get_args(OnPeerLoss)


class RuntimeArguments(TypedDict, total=False):
    """The keyword arguments of optimizers that :class:`RuntimeOptions` explains."""

    timeout: float
    bucket_mb: float
    broadcast_parameters: bool
    clip_grad_norm: float | None
    gossip_every: int
    overlap: bool
    message: str
    on_peer_loss: OnPeerLoss
    staleness: int


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Options of training over a process group; all workers must give the same.

    Args:
        timeout: seconds to wait for a neighbour's message, after which the step fails and names the neighbour.
        bucket_mb: parameters are stepped and sent in buckets of at most this many MB (10^6 bytes).
        broadcast_parameters: start all workers from the parameters of worker 0; False keeps each worker's own.
        clip_grad_norm: if given, this worker's gradient is scaled to at most this 2-norm before the step, by
            min(1, clip_grad_norm / (norm + 1e-6)) as :func:`torch.nn.utils.clip_grad_norm_` does. The norm is known
            only after the whole backward pass, so nothing is sent before it.
        gossip_every: average in every so many-th step only; the steps between are local, W = I, and time-varying
            topologies wait. Refused by algorithms that need the others in every step: exact means, relayed sums,
            choco_sgd.
        overlap: a bucket is stepped and sent during backward, as soon as all its gradients are there; step() merges.
            Bits are the same; what a program must not do then is in :mod:`qgm_ext.optim.overlap`. Small models need a
            small ``bucket_mb`` for it: a single bucket has its gradients only when backward is over.
        message: how messages to neighbours are written: "float32", which is as they are, or "bfloat16" or "int8" with
            error feedback (:mod:`qgm_ext.messages`). Exact means are sent as they are; algorithms that relay sums or
            compress refuse.
        on_peer_loss: what the others do when a worker is gone. "raise": the step ends with
            :class:`qgm_ext.distributed.PeerLostError`, on every worker within ``timeout``. "heal": its neighbours give
            its weight to themselves and training goes on (:mod:`qgm_ext.distributed.healing`); over Gloo, with
            symmetric topologies, and with algorithms whose state is no sum over workers
            (:attr:`qgm_ext.algorithms.Algorithm.can_lose_workers`). The store at which the workers met must outlive the
            lost one.
        staleness: a step merges a neighbour's last message if it is up to so many steps old, and waits for a newer one
            only then; ``opt.message_ages`` counts. For slow neighbours; with static, undirected topologies over Gloo,
            and the algorithms that ``on_peer_loss="heal"`` takes. What it costs, exact means and repeatable runs, is in
            :mod:`qgm_ext.distributed.stale`. 0: every step merges the messages of its own. Above 0 training ends with
            ``opt.drain()``.

    Raises:
        TypeError, ValueError: if a value does not fit.
    """

    timeout: float = 300.0
    bucket_mb: float = 25.0
    broadcast_parameters: bool = True
    clip_grad_norm: float | None = None
    gossip_every: int = 1
    overlap: bool = False
    message: str = "float32"
    on_peer_loss: OnPeerLoss = "raise"
    staleness: int = 0

    def __post_init__(self) -> None:
        _check_positive("timeout", self.timeout)
        _check_positive("bucket_mb", self.bucket_mb)
        if self.clip_grad_norm is not None:
            _check_positive("clip_grad_norm", self.clip_grad_norm)
        for name in ("broadcast_parameters", "overlap"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        messages.make(self.message, [])
        for name, least in (("gossip_every", 1), ("staleness", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.on_peer_loss not in ON_PEER_LOSS:
            raise ValueError(f"on_peer_loss must be one of {', '.join(ON_PEER_LOSS)}, got {self.on_peer_loss!r}")
        if self.staleness and (self.overlap or self.message != "float32"):
            raise ValueError(
                f"staleness={self.staleness} needs overlap=False and message='float32', "
                f"got overlap={self.overlap} and message={self.message!r}"
            )
        if self.on_peer_loss == "heal" and self.staleness:
            raise ValueError(f"staleness must be 0 with on_peer_loss='heal', got {self.staleness}")

    @property
    def uneven(self) -> str | None:
        """The option, if any, with which workers don't go in step."""
        if self.on_peer_loss == "heal":
            return "on_peer_loss='heal'"
        return f"staleness={self.staleness}" if self.staleness else None

    def check_nonfinite(self, on_nonfinite: str) -> None:
        """Raise ValueError if gradients that are not finite can't be treated so."""
        if self.uneven is not None and on_nonfinite != "ignore":
            raise ValueError(
                f"{self.uneven} needs on_nonfinite='ignore', for the others ask all workers in every step, "
                f"got {on_nonfinite!r}"
            )

    @property
    def bucket_bytes(self) -> int:
        """Largest size of a bucket in bytes."""
        return max(1, int(self.bucket_mb * 1e6))


def options_from(arguments: dict[str, Any]) -> RuntimeOptions:
    """Options from keyword arguments.

    Raises:
        TypeError: if there is no such option; suggests the nearest.
    """
    known = [field.name for field in fields(RuntimeOptions)]
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known, f"the options of the runtime are {', '.join(known)}")
            raise TypeError(f"unexpected keyword argument {name!r}, {hint}")
    return RuntimeOptions(**arguments)


def _check_positive(name: str, value: Any) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
