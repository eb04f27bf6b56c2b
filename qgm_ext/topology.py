"""Topologies: who averages with whom, with which weights, at which step. This is the module that users call.

Holds the constructors (``ring(16)``, ``from_networkx(g)``, ``get("torus", 12)``, ...). Row i of the mixing matrix W is
what worker i receives, x_i+ = sum_j w_ij x_j, and W is doubly stochastic: rows sum to one, so that agreement stays
agreement, and columns do, so that averaging keeps the mean of the workers.

The class is in :mod:`qgm_ext._topology`, the checks of what constructors are given in :mod:`qgm_ext._topology_checks`,
edge lists and weight rules in :mod:`qgm_ext.graphs`, the form that kernels read in :mod:`qgm_ext.mixing`. Nothing here
needs torch. Weights follow the code of Lin et al., "Quasi-Global Momentum" (ICML 2021): 1/(degree + 1) on regular
graphs and, on its social network, a rule equal to Metropolis-Hastings.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qgm_ext import graphs
from qgm_ext._topology import CyclicTopology, RandomMatching, StaticTopology, Topology, to_integer
from qgm_ext._topology_checks import (
    check_both_ways,
    check_connected,
    check_stochastic,
    check_uniform,
    checked_workers,
)
from qgm_ext.graphs import Weights
from qgm_ext.hints import did_you_mean
from qgm_ext.mixing import Mixing

__all__ = [
    "Topology",
    "binary_tree",
    "chain",
    "complete",
    "double_binary_trees",
    "erdos_renyi",
    "exponential",
    "from_matrix",
    "from_networkx",
    "from_sequence",
    "get",
    "hypercube",
    "names",
    "one_peer_exponential",
    "random_directed",
    "random_matching",
    "ring",
    "social",
    "spanning_tree",
    "star",
    "torus",
]

# What turns the name of a topology into that of its spanning tree.
TREE_PREFIX = "spanning_tree_of_"


# Constructors ---------------------------------------------------------------------------------------------------------


def ring(n: int) -> Topology:
    """Return a ring: each worker and its two neighbours with weight 1/3 (n = 2: 1/2 each; n = 1: alone).

    Example:
        >>> round(ring(16).lambda_2, 4)
        0.9493
    """
    n = checked_workers("ring", n)
    return _named("ring", graphs.metropolis(n, graphs.undirected(n, np.arange(n), (np.arange(n) + 1) % n)))


def chain(n: int) -> Topology:
    """Return a chain 0 - 1 - ... - n-1 with Metropolis-Hastings weights (1/3; both ends keep 2/3)."""
    n = checked_workers("chain", n)
    return _named("chain", graphs.metropolis(n, graphs.undirected(n, np.arange(n - 1), np.arange(1, n))))


def star(n: int) -> Topology:
    """Return a star with worker 0 in the middle and Metropolis-Hastings weights: 1/n on every edge."""
    n = checked_workers("star", n)
    return _named("star", graphs.metropolis(n, graphs.undirected(n, np.zeros(n - 1), np.arange(1, n))))


def binary_tree(n: int) -> Topology:
    """Return a binary tree as RelaySum's code numbers it: worker 0 hangs on worker 1, worker w >= 2 on w // 2."""
    n = checked_workers("binary_tree", n)
    return _named("binary_tree", graphs.metropolis(n, graphs.binary_tree(n)))


def double_binary_trees(n: int) -> Topology:
    """Return two binary trees at once for RelaySGD, even coordinates on one, odd ones on the other.

    The second is the first with worker w renamed n - 1 - w, so that inner workers of one are leaves of the other (the
    renaming is [recalled] from RelaySum's code). The mixing matrix, for other algorithms, is that of both together.
    """
    n = checked_workers("double_binary_trees", n)
    one = graphs.binary_tree(n)
    other = graphs.edges(n, n - 1 - one[0], n - 1 - one[1])
    both = graphs.edges(n, np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]))
    return StaticTopology("double_binary_trees", graphs.metropolis(n, both), {}, (one, other))


def spanning_tree(topology: Topology) -> Topology:
    """Return a tree of links of a static topology: a breadth-first search from worker 0, neighbours ascending.

    Raises:
        TypeError: if it is no Topology.
        ValueError: if it is time-varying, not connected, or some link goes one way only.
    Example:
        >>> spanning_tree(ring(5)).neighbors(0)
        [1, 4]
    """
    if not isinstance(topology, Topology):
        raise TypeError(f"topology must be a Topology, got {type(topology).__name__}")
    if topology.is_time_varying:
        raise ValueError(f"topology must be static for a spanning tree, got {topology.name!r}; use its at(step)")
    n = topology.num_workers
    graph = graphs.off_diagonal_edges(topology.mixing())
    check_both_ways(n, graph, list(range(n)))
    check_connected(topology.name, [topology], allow_disconnected=False)
    mixing = graphs.metropolis(n, graphs.breadth_first_tree(n, graph))
    return StaticTopology("spanning_tree", mixing, {"of": topology.name})


def random_directed(n: int, p: float = 0.3, seed: int = 0) -> Topology:
    """Return a random directed graph for push-sum: a directed ring, and each other link with probability p.

    A sender splits its mass evenly over itself and its receivers: columns sum to one, rows need not, so only ``sgp``
    and ``qg_sgp`` work on it. :func:`from_sequence` of several makes it time-varying. Directed graphs whose rows sum
    to one, too, are :func:`exponential` and :func:`one_peer_exponential`.

    Args:
        n: number of workers.
        p: in [0, 1].
        seed: in [0, 2**32).
    """
    n, seed = checked_workers("random_directed", n), to_integer("seed", seed, 0, 2**32 - 1)
    if isinstance(p, bool) or not isinstance(p, (int, float, np.floating)):
        raise TypeError(f"p must be a number in [0, 1], got {p!r}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    links = np.random.RandomState(seed).uniform(size=(n, n)) < p
    links[(np.arange(n) + 1) % n, np.arange(n)] = True  # the ring: every worker reaches every other
    graph = graphs.edges(n, *np.nonzero(links))
    return StaticTopology("random_directed", graphs.column_uniform(n, graph), {"p": float(p), "seed": seed})


def complete(n: int) -> Topology:
    """Return the complete graph: every weight 1/n, exact averaging in each step."""
    n = checked_workers("complete", n)
    columns = np.tile(np.arange(n, dtype=np.int32), n)
    return _named("complete", Mixing.from_csr(np.arange(n + 1) * n, columns, np.full(n * n, 1.0 / n)))


def torus(n: int) -> Topology:
    """Return a grid with both directions closed, as near to square as n's divisors allow; weights 1/(degree + 1).

    Worker r * columns + c is in row r, column c. Any n works: a prime n gives one row, which is the ring; a side of two
    gives one edge, not two.

    Example:
        >>> torus(12).neighbors(0)  # 3 x 4
        [1, 3, 4, 8]
    """
    n = checked_workers("torus", n)
    return _named("torus", graphs.metropolis(n, graphs.torus(n)))


def hypercube(n: int) -> Topology:
    """Return the hypercube: neighbours differ in one bit of their number; weights 1/(log2(n) + 1).

    Raises:
        ValueError: if n is not a power of two.
    """
    n = checked_workers("hypercube", n)
    if n & (n - 1):
        below = 1 << (n.bit_length() - 1)
        raise ValueError(f"n must be a power of two for a hypercube, got {n}; the nearest are {below} and {2 * below}")
    bits = np.array([1 << k for k in range(n.bit_length() - 1)], dtype=np.int64)[:, None]
    partner = np.arange(n) ^ bits
    return _named(
        "hypercube", graphs.metropolis(n, graphs.edges(n, np.broadcast_to(np.arange(n), partner.shape), partner))
    )


def exponential(n: int) -> Topology:
    """Return the static exponential graph: worker i receives from i - 1, i - 2, i - 4, ... (mod n), all weights equal.

    Directed and doubly stochastic, with p = floor(log2(n - 1)) + 1 neighbours; weights 1/(p + 1).
    """
    n = checked_workers("exponential", n)
    return _named("exponential", graphs.uniform(n, graphs.circulant(n, graphs.exponential_hops(n))))


def social(n: int = 32) -> Topology:
    """Return the Southern Women network (Davis 1941; 18 women, 14 events, 89 edges), Metropolis-Hastings weights.

    Equal to the matrix of the quasi-global momentum paper's code. lambda_n is -0.434, so D2 diverges on it.

    Args:
        n: the network has 32 workers, no other number.
    """
    import networkx as nx

    if checked_workers("social", n) != 32:
        raise ValueError(f"n must be 32 for the social network, got {n}: its graph is a fixed one")
    return from_networkx(nx.davis_southern_women_graph(), name="social")


def erdos_renyi(n: int, p: float | None = None, seed: int = 0) -> Topology:
    """Return a random graph: each pair is an edge with probability p; Metropolis-Hastings weights.

    Args:
        n: number of workers.
        p: in [0, 1]. (Default: min(1, 2 (ln(n) + 1) / n), at which 99 graphs in 100 are connected from n = 16 on.)
        seed: of the graph, >= 0.
    Raises:
        ValueError: if the graph that was drawn is not connected; another seed or a larger p helps.
    """
    import networkx as nx

    n, seed = checked_workers("erdos_renyi", n), to_integer("seed", seed, 0, 2**32 - 1)
    threshold = math.log(n) / n
    if p is None:
        p = min(1.0, 2.0 * (threshold + 1.0 / n))
    if isinstance(p, bool) or not isinstance(p, (int, float, np.floating)):
        raise TypeError(f"p must be a number in [0, 1], got {p!r}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    graph = nx.gnp_random_graph(n, float(p), seed=seed)
    lost = graphs.unreached(n, graphs.undirected(n, *np.array(graph.edges, dtype=np.int64).reshape(-1, 2).T))
    if lost:
        raise ValueError(
            f"erdos_renyi(n={n}, p={p:.4g}, seed={seed}) is not connected: {graphs.enumerate_workers(lost)} can't "
            f"reach worker 0; try another seed or a larger p (above ln(n)/n = {threshold:.4g} most are connected)"
        )
    return from_networkx(graph, name="erdos_renyi", arguments={"p": float(p), "seed": seed})


def from_networkx(
    graph: Any,
    weights: Weights = "metropolis",
    *,
    name: str | None = None,
    allow_disconnected: bool = False,
    arguments: dict[str, Any] | None = None,
) -> Topology:
    """Return the topology of a networkx graph.

    Worker i is node i if the nodes are 0 to n - 1, else the i-th node of ``graph.nodes``. An edge of a DiGraph goes
    from the sender to the receiver. Parallel edges count once; self-loops and edge attributes are ignored.

    Args:
        graph: networkx Graph, DiGraph or their multigraph forms.
        weights: "metropolis", w_ij = 1/(1 + max(d_i, d_j)), for undirected graphs (a DiGraph needs every edge both
            ways); "uniform", 1/(degree + 1), which is doubly stochastic on regular graphs only.
        name: (Default: the graph's own name, else "networkx".)
        allow_disconnected: accept a graph in several parts, which never agree.
        arguments: what to report as the constructor's arguments. (Default: the weights.)
    Raises:
        TypeError: if graph is no networkx graph.
        ValueError: if it is empty or not connected, or the weights don't fit it.
    """
    import networkx as nx

    if not isinstance(graph, nx.Graph):  # the base class of all four
        raise TypeError(f"graph must be a networkx graph, got {type(graph).__name__}")
    if weights not in ("metropolis", "uniform"):
        raise ValueError(f"weights must be 'metropolis' or 'uniform', got {weights!r}")
    n = graph.number_of_nodes()
    if n == 0:
        raise ValueError("graph must have at least one node, got an empty graph")
    nodes = list(graph.nodes)
    if all(isinstance(node, int) for node in nodes) and sorted(nodes) == list(range(n)):
        nodes.sort()
    worker = {node: index for index, node in enumerate(nodes)}
    senders = np.array([worker[edge[0]] for edge in graph.edges()], dtype=np.int64)
    receivers = np.array([worker[edge[1]] for edge in graph.edges()], dtype=np.int64)
    directed = graph.is_directed()
    found = graphs.edges(n, receivers, senders) if directed else graphs.undirected(n, receivers, senders)
    if weights == "metropolis":
        if directed:
            check_both_ways(n, found, nodes)
        mixing = graphs.metropolis(n, found)
    else:
        mixing = graphs.uniform(n, found)
        check_uniform(n, found, mixing, nodes)
    topology = StaticTopology(name or str(graph.name or "networkx"), mixing, arguments or {"weights": weights})
    check_connected(topology.name, [topology], allow_disconnected)
    return topology


def from_matrix(matrix: ArrayLike, *, name: str = "custom", allow_disconnected: bool = False) -> Topology:
    """Return the topology of a mixing matrix W: row i is what worker i receives.

    Args:
        matrix: [n, n], finite, no entry negative, every row and every column sums to one within 1e-9, connected. A
            matrix computed in float32 misses that; compute it in float64.
        name: shown in reports.
        allow_disconnected: accept workers that never hear from each other, e.g. the identity.
    Raises:
        TypeError: if it is no array of real numbers.
        ValueError: if it is none of the above; names the row, the column or the entry.
    Example:
        >>> from_matrix([[0.75, 0.25], [0.25, 0.75]]).spectral_gap
        0.5
    """
    topology = StaticTopology(name, Mixing.from_matrix(check_stochastic("matrix", matrix)), {})
    check_connected(name, [topology], allow_disconnected)
    return topology


def from_sequence(
    matrices: Sequence[ArrayLike | Topology] | NDArray[np.float64],
    *,
    name: str = "sequence",
    allow_disconnected: bool = False,
) -> Topology:
    """Return a time-varying topology that uses these in turn: step t uses number t mod p.

    Args:
        matrices: p >= 1 mixing matrices or static topologies of the same size. Each must be doubly stochastic; only
            together must they connect all workers. One alone gives a static topology.
        name: shown in reports.
        allow_disconnected: accept workers that never hear from each other.
    Raises:
        TypeError: if it is no sequence, or an element no array of real numbers.
        ValueError: if it is empty, sizes differ, one is time-varying or not doubly stochastic, or they don't connect.
    """
    if isinstance(matrices, (Topology, str)) or not isinstance(matrices, Sequence | np.ndarray):
        raise TypeError(f"matrices must be a sequence of mixing matrices or topologies, got {type(matrices).__name__}")
    if len(matrices) == 0:
        raise ValueError("matrices must hold at least one mixing matrix, got none")
    cycle: list[Topology] = []
    for index, item in enumerate(matrices):
        if isinstance(item, Topology):
            if item.is_time_varying:
                raise ValueError(f"matrices[{index}] must be static, got the time-varying topology {item.name!r}")
            cycle.append(item)
        else:
            checked = check_stochastic(f"matrices[{index}]", item)
            cycle.append(StaticTopology(f"{name}[{index}]", Mixing.from_matrix(checked), {}))
        if cycle[-1].num_workers != cycle[0].num_workers:
            raise ValueError(
                f"matrices must all have the same number of workers: matrices[0] has {cycle[0].num_workers}, "
                f"matrices[{index}] has {cycle[-1].num_workers}"
            )
    check_connected(name, cycle, allow_disconnected)
    return _cyclic(name, cycle)


def one_peer_exponential(n: int) -> Topology:
    """Return the one-peer exponential graph: at step t, worker i averages half and half with i - 2^(t mod p) (mod n).

    Directed, one message a step, period p = floor(log2(n - 1)) + 1. For n a power of two p steps average exactly.
    """
    n = checked_workers("one_peer_exponential", n)
    hops = graphs.exponential_hops(n) or [0]
    steps = [graphs.uniform(n, graphs.circulant(n, [hop])) for hop in hops]
    return _cyclic(
        "one_peer_exponential",
        [StaticTopology("one_peer_exponential", w, {"hop": hop}) for hop, w in zip(hops, steps, strict=True)],
    )


def random_matching(n: int, seed: int = 0) -> Topology:
    """Return random pairs: at every step the workers are paired anew, each pair averages half and half.

    With an odd n one worker, drawn anew, is left out of a step. The pairing depends on (seed, step) alone, so all
    processes find the same one without talking.

    Args:
        n: number of workers.
        seed: in [0, 2**32).
    """
    return RandomMatching(checked_workers("random_matching", n), to_integer("seed", seed, 0, 2**32 - 1))


_NAMED: dict[str, Callable[..., Topology]] = {
    constructor.__name__: constructor
    for constructor in (
        ring,
        chain,
        star,
        binary_tree,
        double_binary_trees,
        complete,
        torus,
        hypercube,
        exponential,
        social,
        erdos_renyi,
        one_peer_exponential,
        random_matching,
        random_directed,
    )
}


def names() -> list[str]:
    """Return the names that :func:`get` takes, sorted; it also takes ``spanning_tree_of_NAME``."""
    return sorted(_NAMED)


def get(name: str, n: SupportsIndex | None = None, **arguments: Any) -> Topology:
    """Return a topology by name, as the command line does; ``-`` and ``_`` are the same.

    Args:
        name: one of :func:`names`, or "spanning_tree_of_" and one of them: its :func:`spanning_tree`.
        n: number of workers; may be left out for "social".
        arguments: passed on, e.g. ``p`` and ``seed`` for "erdos_renyi".
    Raises:
        ValueError: if the name is unknown (the nearest is suggested), n is missing, or n or an argument doesn't fit.
        TypeError: if the topology takes no such argument, or an argument has the wrong type.
    Example:
        >>> get("one-peer-exponential", 8).period
        3
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    key = name.strip().lower().replace("-", "_")
    if key.startswith(TREE_PREFIX):
        return spanning_tree(get(key.removeprefix(TREE_PREFIX), n, **arguments))
    if key not in _NAMED:
        hint = did_you_mean(key, _NAMED)
        raise ValueError(
            f"name must be a known topology, got {name!r}; {hint and f'{hint} '}The names are {', '.join(names())}"
        )
    parameters = inspect.signature(_NAMED[key]).parameters
    for argument in arguments:
        if argument not in parameters:
            takes = ", ".join(parameters)
            raise TypeError(f"topology {key!r} takes no argument {argument!r}; it takes {takes}")
    if n is None and parameters["n"].default is inspect.Parameter.empty:
        raise ValueError(f"n must be the number of workers of topology {key!r}, got None")
    return _NAMED[key](**arguments) if n is None else _NAMED[key](n, **arguments)


def _named(name: str, mixing: Mixing) -> Topology:
    return StaticTopology(name, mixing, {})


def _cyclic(name: str, cycle: Sequence[Topology]) -> Topology:
    return StaticTopology(name, cycle[0].mixing(), {}) if len(cycle) == 1 else CyclicTopology(name, cycle, {})
