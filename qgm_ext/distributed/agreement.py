"""Whether all workers were started alike: a comparison of what each of them says about itself.

What is exchanged is JSON in tensors of bytes; nothing that a peer sends is unpickled. :func:`gather_bytes`,
:func:`as_bytes` and :func:`collective_device` are for others that exchange such tensors, :func:`digest` for those that
compare some.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qgm_ext.distributed.peer_loss import global_rank, meeting

__all__ = [
    "DisagreementError",
    "as_bytes",
    "check_agreement",
    "collective_device",
    "digest",
    "gather_bytes",
    "gather_json",
]

_LARGEST = 1 << 28  # bytes that a worker may say about itself; more is garbage


class DisagreementError(ValueError):
    """Workers of one group were started with different arguments; every one of them raises it."""


def gather_json(group: dist.ProcessGroup | None, content: Any, device: torch.device) -> list[Any]:
    """What every worker of a group says, by rank; a collective.

    Args:
        group: the workers.
        content: of this worker, JSON-ready.
        device: where the group's backend wants its tensors.

    Raises:
        ValueError: if a worker sends something else; its rank is named.
        PeerLostError: if a worker is gone.
    """
    found = []
    text = json.dumps(content).encode()
    for rank, theirs in enumerate(gather_bytes(group, text, device, largest=_LARGEST)):
        try:
            found.append(json.loads(theirs.decode()))
        except ValueError as error:
            raise ValueError(
                f"rank {rank} sends no JSON about itself ({error}): it does not run this program"
            ) from error
    return found


def gather_bytes(
    group: dist.ProcessGroup | None,
    mine: bytes,
    device: torch.device,
    *,
    largest: int | None = None,
    only_first: bool = False,
) -> list[bytes]:
    """What every worker of a group sends, by rank; a collective.

    Args:
        group: the workers.
        mine: of this worker, at least one byte.
        device: where the group's backend wants its tensors.
        largest: how many bytes a worker may send, or None for any number.
        only_first: give it to rank 0 of the group only, and an empty list to the others.

    Raises:
        ValueError: if a worker announces no bytes or more than ``largest``; its rank is named.
        PeerLostError: if a worker is gone.
    """
    size = dist.get_world_size(group)
    announced = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    with meeting(group):
        dist.all_gather(announced, torch.tensor([len(mine)], dtype=torch.int64, device=device), group=group)
    lengths = [int(length) for length in announced]
    for rank, length in enumerate(lengths):
        if length <= 0 or (largest is not None and length > largest):
            raise ValueError(f"rank {rank} announces {length} bytes about itself: it does not run this program")
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    receives = not only_first or dist.get_rank(group) == 0
    rows = [torch.empty_like(padded) for _ in range(size)] if receives else []
    with meeting(group):
        if only_first:
            dist.gather(padded, rows or None, global_rank(group, 0), group=group)
        else:
            dist.all_gather(rows, padded, group=group)
    return [bytes(row[:length].cpu().numpy()) for row, length in zip(rows, lengths, strict=False)]


def check_agreement(group: dist.ProcessGroup | None, fields: Mapping[str, Any], device: torch.device) -> None:
    """Compare what all workers say with what rank 0 says; a collective, after which all of them have spoken.

    Args:
        group: the workers.
        fields: what must be equal, by name, JSON-ready.
        device: where the group's backend wants its tensors.

    Raises:
        DisagreementError: on every worker, if one differs; it names the rank, the field and both values.
        PeerLostError: if a worker is gone.
    """
    said = gather_json(group, dict(fields), device)
    first = said[0] if isinstance(said[0], dict) else {}
    for rank, theirs in enumerate(said):
        theirs = theirs if isinstance(theirs, dict) else {}
        for name in (*first, *(key for key in theirs if key not in first)):
            if name not in first or name not in theirs or first[name] != theirs[name]:
                raise DisagreementError(
                    f"workers must be started alike, but {name} of rank {rank} is {_shown(theirs, name)}, "
                    f"and of rank 0 {_shown(first, name)}"
                )


def _shown(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        return "missing"
    text = json.dumps(fields[name])
    return text if len(text) <= 200 else f"{text[:200]}..."


def as_bytes(tensor: Tensor) -> Tensor:
    """Its bytes in the order of its elements, [k] uint8; a view of it if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def digest(tensors: Sequence[Tensor]) -> str:
    """Equal where all bytes are."""
    sha = hashlib.sha256()
    for tensor in tensors:
        if tensor.numel():
            sha.update(as_bytes(tensor.cpu()).numpy().data)
    return sha.hexdigest()


def collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the backend of a group, which there must be, wants the tensors of its collectives."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
