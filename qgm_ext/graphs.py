"""Graphs as edge lists, the two weight rules that make a mixing matrix of one, reachability, and drawing.

A graph here is a pair of arrays (receiver, sender): worker ``receiver[e]`` gets a message from ``sender[e]``. A
worker's own weight is no edge. networkx and matplotlib are imported where something is drawn. This file does not know
the Topology class, which checks what is made here, nor the constructors that users call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qgm_ext.mixing import Mixing

Edges = tuple[NDArray[np.int64], NDArray[np.int64]]
Weights = Literal["metropolis", "uniform"]


# Graphs ---------------------------------------------------------------------------------------------------------------


def edges(n: int, receivers: ArrayLike, senders: ArrayLike) -> Edges:
    """Return each edge once, sorted by receiver, then sender; self-loops are dropped (every worker keeps a share)."""
    to, frm = np.asarray(receivers, dtype=np.int64).ravel(), np.asarray(senders, dtype=np.int64).ravel()
    keys = np.unique(to[to != frm] * n + frm[to != frm])
    return keys // n, keys % n


def undirected(n: int, left: ArrayLike, right: ArrayLike) -> Edges:
    """Return the edges of an undirected graph: every pair in both directions."""
    return edges(n, np.concatenate([left, right]), np.concatenate([right, left]))


def circulant(n: int, hops: Sequence[int]) -> Edges:
    """Return the directed graph in which worker i receives from i - hop (mod n) for each hop."""
    workers = np.arange(n)
    senders = (workers - np.asarray(hops, dtype=np.int64)[:, None]) % n
    return edges(n, np.broadcast_to(workers, senders.shape), senders)


def exponential_hops(n: int) -> list[int]:
    """Return 1, 2, 4, ... below n: the hops of the exponential graphs; p = floor(log2(n - 1)) + 1 of them."""
    return [1 << k for k in range((n - 1).bit_length())]


def torus_shape(n: int) -> tuple[int, int]:
    """Return rows <= columns with rows * columns = n, as close to a square as the divisors of n allow."""
    rows = next(side for side in range(math.isqrt(n), 0, -1) if n % side == 0)
    return rows, n // rows


def torus(n: int) -> Edges:
    """Return the grid of :func:`torus_shape` with both directions closed; sides of 1 or 2 give no double edges."""
    rows, columns = torus_shape(n)
    worker = np.arange(n).reshape(rows, columns)
    right, down = np.roll(worker, -1, axis=1), np.roll(worker, -1, axis=0)
    return undirected(n, np.concatenate([worker, worker], axis=None), np.concatenate([right, down], axis=None))


def binary_tree(n: int) -> Edges:
    """Return the binary tree of RelaySum's code: worker 0 hangs on worker 1, worker w >= 2 on w // 2."""
    child = np.arange(1, n)
    return undirected(n, child, child // 2)


def breadth_first_tree(n: int, graph: Edges) -> Edges:
    """Return the tree in which each worker hangs on the first of its neighbours that a search from worker 0 reached."""
    to, frm = graph
    parent = np.full(n, -1)
    parent[0], queue = 0, [0]
    for worker in queue:
        for neighbour in to[frm == worker].tolist():
            if parent[neighbour] < 0:
                parent[neighbour] = worker
                queue.append(neighbour)
    return undirected(n, np.arange(1, n), parent[1:])


# Weights --------------------------------------------------------------------------------------------------------------


def metropolis(n: int, graph: Edges) -> Mixing:
    """Return Metropolis-Hastings weights w_ij = 1 / (1 + max(d_i, d_j)), w_ii = 1 - sum_j w_ij.

    Symmetric and doubly stochastic for every undirected graph; on a regular one equal to :func:`uniform`.
    """
    to, frm = graph
    degree = np.bincount(to, minlength=n)
    larger = np.maximum(degree[to], degree[frm])
    off_diagonal = 1.0 / (1.0 + larger)
    diagonal = 1.0 - np.bincount(to, weights=off_diagonal, minlength=n)
    # Where no neighbour has more neighbours, 1 - d/(1+d) is 1/(1+d): written so, a ring gets 1/3 and not 1/3 + 1 ulp.
    largest = degree.copy()
    np.maximum.at(largest, to, larger)
    return assemble(n, graph, off_diagonal, np.where(largest == degree, 1.0 / (1.0 + degree), diagonal))


def uniform(n: int, graph: Edges) -> Mixing:
    """Return w_ij = 1 / (1 + d_i), d_i senders, for each of them and for i: rows sum to one, columns may not."""
    to, _ = graph
    share = 1.0 / (1.0 + np.bincount(to, minlength=n))
    return assemble(n, graph, share[to], share)


def column_uniform(n: int, graph: Edges) -> Mixing:
    """Return p_ij = 1 / (1 + o_j), o_j receivers of j, for each of them and for j: columns sum to one, rows may not."""
    _, frm = graph
    share = 1.0 / (1.0 + np.bincount(frm, minlength=n))
    return assemble(n, graph, share[frm], share)


def assemble(n: int, graph: Edges, off_diagonal: ArrayLike, diagonal: ArrayLike) -> Mixing:
    """Return the mixing matrix with the given weights, one for each edge and one for each worker itself."""
    to, frm = graph
    keys = np.concatenate([to * n + frm, np.arange(n) * (n + 1)])
    order = np.argsort(keys, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(to, minlength=n) + 1)])
    weights = np.concatenate([np.asarray(off_diagonal, dtype=np.float64), np.asarray(diagonal, dtype=np.float64)])
    return Mixing.from_csr(offsets, keys[order] % n, weights[order])


# Reachability ---------------------------------------------------------------------------------------------------------


def unreached(n: int, graph: Edges, start: int = 0) -> list[int]:
    """Return the workers that what worker ``start`` sends never reaches, even through others; ascending."""
    to, frm = graph
    reached = np.zeros(n, dtype=bool)
    reached[start] = True
    while True:
        grown = reached.copy()
        grown[to[reached[frm]]] = True
        if np.array_equal(grown, reached):
            missing: list[int] = np.flatnonzero(~reached).tolist()
            return missing
        reached = grown


def enumerate_workers(workers: Sequence[int], limit: int = 8) -> str:
    """Return "worker 3" or "workers 1, 2, 5", at most ``limit`` of them and how many there are in all."""
    shown = ", ".join(map(str, workers[:limit]))
    more = f", ... ({len(workers)} in all)" if len(workers) > limit else ""
    return f"worker{'s' if len(workers) > 1 else ''} {shown}{more}"


# Drawing --------------------------------------------------------------------------------------------------------------

_NODE, _SPECIAL = "#1f5f99", "#c2410c"
_EDGE = "#64748b"
# Named graphs whose workers stand in a circle in the order of their numbers.
_CIRCLES = ("ring", "chain", "star", "complete", "exponential", "one_peer_exponential", "random_matching", "sequence")
_STEPS = ("#1f77b4", "#e4761b", "#2a9d4a", "#c03a5b", "#7c5cc4", "#8c6d4f", "#d16ba5", "#6b7280")


def positions(name: str, n: int, graph: Edges) -> NDArray[np.float64]:
    """Return where to draw each worker, [n, 2], within about [-1, 1]: a layout that shows what the named graph is."""
    turn = 2.0 * np.pi * np.arange(n) / n
    if name == "star" and n > 1:
        turn = 2.0 * np.pi * np.arange(n - 1) / (n - 1)
        return np.concatenate([[[0.0, 0.0]], np.stack([np.sin(turn), np.cos(turn)], axis=1)])
    if name == "chain" and n > 2:
        # An open arc: a straight line of 32 workers could be read only on a very wide picture.
        turn = np.pi * (np.linspace(-0.86, 0.86, n))
    if name == "torus" and torus_shape(n)[0] > 1:
        rows, columns = torus_shape(n)
        row, column = np.divmod(np.arange(n), columns)
        return np.stack([column - (columns - 1) / 2, (rows - 1) / 2 - row], axis=1) * (2.0 / max(columns - 1, 1))
    if name == "hypercube" and 2 < n <= 64 and n & (n - 1) == 0:
        return _hypercube_positions(n)
    if name == "social" and n == 32:  # 18 women on the left, 14 events on the right
        height = np.concatenate([np.linspace(1, -1, 18), np.linspace(1, -1, 14)])
        return np.stack([np.where(np.arange(n) < 18, -0.8, 0.8), height], axis=1)
    if name not in _CIRCLES and graph[0].size < 0.5 * n * n:
        import networkx as nx

        drawn = nx.Graph()
        drawn.add_nodes_from(range(n))
        drawn.add_edges_from(zip(*(side.tolist() for side in graph), strict=True))
        placed = nx.spring_layout(drawn, seed=1, k=1.6 / math.sqrt(n), iterations=300)
        return np.array([placed[worker] for worker in range(n)])
    return np.stack([np.sin(turn), np.cos(turn)], axis=1)


def _hypercube_positions(n: int) -> NDArray[np.float64]:
    """Return the corners of a cube in d dimensions seen from an angle at which no two of them coincide."""
    axes = np.array([(1.0, 0.0), (0.0, 1.0), (0.42, 0.30), (1.85, 0.80), (-0.75, 2.45), (4.4, 1.1)])
    bits = (np.arange(n)[:, None] >> np.arange(len(axes))) & 1
    placed: NDArray[np.float64] = bits @ axes
    placed -= (placed.max(axis=0) + placed.min(axis=0)) / 2
    placed /= np.abs(placed).max()
    return placed


def draw(ax: Any, name: str, n: int, steps: Sequence[tuple[str, Mixing]], title: str) -> None:
    """Draw workers as numbered discs and messages as lines, as wide as they are heavy, into a matplotlib Axes.

    Args:
        ax: the Axes.
        name: the graph's name, which chooses the layout.
        n: number of workers.
        steps: (label, mixing matrix) of each step to draw; with more than one, each has its own colour and a legend.
        title: text above the picture.
    """
    import networkx as nx
    from matplotlib.lines import Line2D

    graphs = [off_diagonal_edges(mixing) for _, mixing in steps]
    everything = edges(n, *(np.concatenate(side) for side in zip(*graphs, strict=True)))
    place = dict(enumerate(positions(name, n, everything)))
    disc = min(520.0, 9500.0 / n)
    crowd = max(1.0, everything[0].size / n)
    for index, ((_, mixing), (to, frm)) in enumerate(zip(steps, graphs, strict=True)):
        colour = _STEPS[index] if len(steps) > 1 else _EDGE
        pairs = set(zip(frm.tolist(), to.tolist(), strict=True))
        one_way = any(pair[::-1] not in pairs for pair in pairs)
        lines = sorted(pairs) if one_way else sorted(pair for pair in pairs if pair[0] < pair[1])
        wrapped = [pair for pair in lines if _wraps(name, n, *pair)]
        straight = [pair for pair in lines if not _wraps(name, n, *pair)]
        weight = {(sender, receiver): value for receiver, sender, value in mixing.entries()}
        heaviest = max((weight[pair] for pair in lines), default=1.0)
        drawn: Any = nx.DiGraph() if one_way else nx.Graph()
        drawn.add_nodes_from(range(n))
        style: dict[str, Any] = {"ax": ax, "edge_color": colour, "alpha": float(np.clip(4.0 / crowd, 0.3, 0.9))}
        if one_way:
            style |= {"arrowsize": 11, "node_size": disc, "connectionstyle": f"arc3,rad={0.10 + 0.03 * index}"}
        thin = 0.55 if crowd > 8 or (one_way and len(steps) == 1) else 1.0
        widths = [(0.5 + 1.7 * weight[pair] / heaviest) * thin for pair in straight]
        nx.draw_networkx_edges(drawn, place, edgelist=straight, width=widths, **style)
        for pair in wrapped:
            _draw_wrapped(ax, n, place, *pair, colour=colour)
    special = {"star": range(1), "social": range(18, 32)}.get(name, range(0)) if n > 2 else range(0)
    nx.draw_networkx_nodes(
        nx.empty_graph(n),
        place,
        ax=ax,
        node_size=disc,
        node_color=[_SPECIAL if worker in special else _NODE for worker in range(n)],
        edgecolors="white",
        linewidths=1.2,
    )
    if n <= 64:
        size = float(np.clip(math.sqrt(disc) * 0.48, 5.0, 10.0))
        nx.draw_networkx_labels(nx.empty_graph(n), place, ax=ax, font_size=size, font_color="white")
    if len(steps) > 1:
        handles = [Line2D([], [], color=_STEPS[k], lw=2, label=label) for k, (label, _) in enumerate(steps)]
        ax.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.02),
            ncols=min(len(steps), 4 if len(steps) > 5 else 5),
            frameon=False,
            fontsize=9,
        )
    ax.set_title(title, fontsize=10)
    ax.set_aspect("equal")
    ax.margins(0.12)
    ax.set_axis_off()


def off_diagonal_edges(mixing: Mixing) -> Edges:
    """Return who receives from whom under a mixing matrix."""
    return edges(mixing.num_workers, mixing.rows(), mixing.columns)


def max_drawn_steps() -> int:
    """Return how many steps one picture can tell apart."""
    return len(_STEPS)


def _wraps(name: str, n: int, one: int, other: int) -> bool:
    """Tell whether an edge closes a torus direction of more than two workers: a line across would hide the others."""
    if name != "torus" or torus_shape(n)[0] == 1:
        return False
    (row, column), (row2, column2) = divmod(one, torus_shape(n)[1]), divmod(other, torus_shape(n)[1])
    return abs(row - row2) > 1 or abs(column - column2) > 1


def _draw_wrapped(ax: Any, n: int, place: dict[int, Any], one: int, other: int, colour: str) -> None:
    """Draw an edge that closes the torus as a dashed stub at both ends."""
    stub = 0.55 * 2.0 / max(torus_shape(n)[1] - 1, 1)
    for here, there in ((one, other), (other, one)):
        outward = np.sign(place[here] - place[there]) * stub
        ends = np.stack([place[here], place[here] + outward])
        ax.plot(ends[:, 0], ends[:, 1], color=colour, lw=1.6, ls=(0, (2, 1.5)), zorder=0.5)
