"""Survivors: meetings between steps of workers of which some may be lost (``on_peer_loss="heal"``).

Collectives of torch.distributed need every worker of their group, and one that dies in the middle leaves some of the
others with a result and some without. So here each worker puts what it has to say into the store at which the workers
met. The lowest that is left makes the result of it when it has heard all that are left, and puts it there, too. Who is
lost is agreed on as in a step (:meth:`qgm_ext.distributed.healing.HealingEngine.together`). It is for a few numbers now
and then, and for the parameters when models are evaluated; steps send their messages directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qgm_ext.distributed.agreement import as_bytes
from qgm_ext.distributed.healing import HealingEngine
from qgm_ext.distributed.roll import CHUNK

__all__ = ["Survivors"]


class Survivors:
    """The workers that are left, as one of them sees them.

    Args:
        engine: of this worker.
        store: at which the workers met; outlives those that are lost.
        rank, size: of this worker and the group.
    """

    def __init__(self, engine: HealingEngine, store: Any, rank: int, size: int) -> None:
        self._engine, self._store, self._rank, self._size = engine, store, rank, size
        self._number = 0

    @property
    def left(self) -> list[int]:
        """Their ranks, as far as this worker knows."""
        lost = self._engine.lost
        return [rank for rank in range(self._size) if rank not in lost]

    def gather(self, mine: Tensor) -> dict[int, Tensor]:
        """A tensor of each of them by rank, the same on all; on all of one shape and dtype."""

        def together(said: Mapping[int, Tensor]) -> Tensor:
            return torch.cat([as_bytes(part) for rank, one in said.items() for part in (torch.tensor([rank]), one)])

        found = self.decide(mine, together).view(-1, 8 + mine.numel() * mine.element_size())
        ranks = found[:, :8].contiguous().view(torch.int64)[:, 0].tolist()
        return {rank: row[8:].clone().view(mine.dtype).view(mine.shape) for rank, row in zip(ranks, found, strict=True)}

    def decide(self, mine: Tensor, work: Callable[[dict[int, Tensor]], Tensor]) -> Tensor:
        """Let the lowest of them make something of what all say.

        Args:
            mine: what this worker says, on the CPU; on all of one shape and dtype.
            work: makes the result from what was said, by rank; called on one of them, or, should that get lost,
                on another one again.

        Returns:
            The bytes of the result, [k] uint8, the same on all.

        Raises:
            PeerLostError: if a worker is silent, or the workers can't agree on who is lost.
        """
        key = f"{self._engine.meetings}/{self._number}"
        self._number += 1
        self._put(f"{key}/said/{self._rank}", mine)

        def result() -> Tensor | None:
            if self._store.check([f"{key}/by"]):
                return self._get(f"{key}/result/{int(self._store.get(f'{key}/by').decode())}")
            left = self.left
            if self._rank != left[0] or not self._store.check([f"{key}/said/{rank}/size" for rank in left]):
                return None
            said = {rank: self._get(f"{key}/said/{rank}").view(mine.dtype).view(mine.shape) for rank in left}
            self._put(f"{key}/result/{self._rank}", work(said))
            by = int(self._store.compare_set(f"{key}/by", "", str(self._rank)).decode())
            return self._get(f"{key}/result/{by}")

        found = self._engine.together(result)
        # All that are left have the result.
        self._remove(f"{key}/said/{self._rank}")
        self._remove(f"{key}/result/{self._rank}")
        return found

    def _put(self, key: str, content: Tensor) -> None:
        data = as_bytes(content).numpy().tobytes()
        for k in range(0, len(data), CHUNK):
            self._store.set(f"{key}/{k}", data[k : k + CHUNK])
        self._store.set(f"{key}/size", str(len(data)))

    def _get(self, key: str) -> Tensor:
        size = int(self._store.get(f"{key}/size").decode())
        data = b"".join(bytes(self._store.get(f"{key}/{k}")) for k in range(0, size, CHUNK))
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def _remove(self, key: str) -> None:
        if not self._store.check([f"{key}/size"]):
            return
        size = int(self._store.get(f"{key}/size").decode())
        for name in ("size", *range(0, size, CHUNK)):
            self._store.delete_key(f"{key}/{name}")
