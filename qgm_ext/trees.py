"""Trees as RelaySum uses them: directed edges with their reverse, hop distances, and the tensors that kernels read.

A message lives on every directed edge; edge e goes from ``senders[e]`` to the worker whose range in ``offsets`` holds
it. This file knows no mixing matrix and no training; which topologies are trees is said in :mod:`qgm_ext._topology`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qgm_ext.graphs import Edges

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Tree:
    """One tree of n workers.

    Args:
        num_workers: n >= 1.
        edges: (receiver, sender) of all 2 (n - 1) directed edges, sorted by receiver, then sender.
    """

    num_workers: int
    edges: Edges

    @property
    def offsets(self) -> NDArray[np.int32]:
        """Where the edges into each worker begin, [n + 1]."""
        counts = np.bincount(self.edges[0], minlength=self.num_workers)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    @property
    def reverse(self) -> NDArray[np.int32]:
        """The number of the edge in the other direction, [2 (n - 1)]."""
        to, frm = self.edges
        return np.argsort(frm * self.num_workers + to, kind="stable").argsort().astype(np.int32)

    def distances(self) -> NDArray[np.int64]:
        """Hops between any two workers, [n, n]."""
        n, (to, frm) = self.num_workers, self.edges
        hops = np.where(np.eye(n, dtype=bool), 0, n)
        for _ in range(n):
            before = hops.copy()
            np.minimum.at(hops, to, hops[frm] + 1)
            if np.array_equal(before, hops):
                break
        return hops

    def subtree_sizes(self) -> NDArray[np.int64]:
        """How many workers are on the sender's side of each edge, [2 (n - 1)]."""
        hops = self.distances()
        to, frm = self.edges
        return np.asarray((hops[frm] < hops[to]).sum(axis=1))


@dataclass(frozen=True, eq=False)
class Trees:
    """K >= 1 trees of the same workers: coordinate c of the parameters belongs to tree c mod K."""

    trees: tuple[Tree, ...]
    _tensors: dict[Any, tuple[torch.Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_edges(self) -> int:
        """Directed edges of one tree, 2 (n - 1): how many messages are kept."""
        return 2 * (self.trees[0].num_workers - 1)

    def tensors(self, device: torch.device | str) -> tuple[torch.Tensor, ...]:
        """Return (offsets [K, n + 1], senders [K, E], reverse [K, E]), int32; the same tensors on every call."""
        import torch

        place = torch.device(device)
        if place not in self._tensors:
            columns = (
                [tree.offsets for tree in self.trees],
                [tree.edges[1].astype(np.int32) for tree in self.trees],
                [tree.reverse for tree in self.trees],
            )
            self._tensors[place] = tuple(torch.tensor(np.stack(column), device=place) for column in columns)
        return self._tensors[place]

    def reached(self, step: int) -> NDArray[np.int64]:
        """From how many others each worker's sum holds a model after step number ``step``, [K, n]."""
        return np.stack([(tree.distances() <= step + 1).sum(axis=1) - 1 for tree in self.trees])
