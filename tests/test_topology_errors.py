"""Topologies: what is refused, and that the message says what is wrong and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import pytest

from qgm_ext import topology


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: topology.get("rign", 4), ValueError, "got 'rign'; did you mean 'ring'\\? The names are binary_tree,"),
        (lambda: topology.get("zzz", 4), ValueError, "got 'zzz'; The names are binary_tree,"),
        (lambda: topology.get(3, 4), TypeError, "name must be a string, got int"),  # type: ignore[arg-type]
        (lambda: topology.get("ring"), ValueError, "n must be the number of workers of topology 'ring', got None"),
        (lambda: topology.get("ring", 4, p=1), TypeError, "'ring' takes no argument 'p'; it takes n$"),
        (lambda: topology.get("erdos_renyi", 4, P=1), TypeError, "takes no argument 'P'; it takes n, p, seed"),
        (lambda: topology.ring(0), ValueError, r"n \(number of workers of ring\) must be at least 1, got 0"),
        (lambda: topology.star(-3), ValueError, r"star\) must be at least 1, got -3"),
        (lambda: topology.torus(4.0), TypeError, r"torus\) must be an integer, got 4.0"),  # type: ignore[arg-type]
        (lambda: topology.chain("4"), TypeError, r"chain\) must be an integer, got '4'"),  # type: ignore[arg-type]
        (lambda: topology.complete(True), TypeError, r"complete\) must be an integer, got True"),
        (lambda: topology.hypercube(12), ValueError, "n must be a power of two .*, got 12; the nearest are 8 and 16"),
        (lambda: topology.social(16), ValueError, "n must be 32 for the social network, got 16"),
        (lambda: topology.erdos_renyi(8, 1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: topology.erdos_renyi(8, float("nan")), ValueError, r"p must be in \[0, 1\], got nan"),
        (lambda: topology.erdos_renyi(8, "0.5"), TypeError, "p must be a number"),  # type: ignore[arg-type]
        (lambda: topology.erdos_renyi(8, 0.5, seed=-1), ValueError, r"seed must be in \[0, 4294967295\], got -1"),
        (
            lambda: topology.erdos_renyi(4, 0.0, seed=9),
            ValueError,
            r"erdos_renyi\(n=4, p=0, seed=9\) is not connected: workers 1, 2, 3 can't reach worker 0; .* = 0.3466",
        ),
        (lambda: topology.random_matching(4, seed=0.5), TypeError, "seed must be an integer, got 0.5"),  # type: ignore[arg-type]
        (lambda: topology.ring(4).at(-1), ValueError, "step must be at least 0, got -1"),
        (lambda: topology.ring(4).matrix(1.5), TypeError, "step must be an integer, got 1.5"),  # type: ignore[arg-type]
        (lambda: topology.one_peer_exponential(4).at(-1), ValueError, "step must be at least 0, got -1"),
        (lambda: topology.random_matching(4).at(-1), ValueError, "step must be at least 0, got -1"),
        (lambda: topology.ring(4).neighbors(4), ValueError, r"worker must be in \[0, 3\], got 4"),
        (lambda: topology.ring(4).out_neighbors(-1), ValueError, r"worker must be in \[0, 3\], got -1"),
        (lambda: topology.exponential(8).lambda_2, ValueError, "'exponential' is not symmetric; use spectral_gap"),
        (
            lambda: topology.random_matching(8).lambda_n,
            ValueError,
            r"'random_matching' is time-varying; use at\(step\)",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def identity_with(n: int, *entries: tuple[int, int, float]) -> np.ndarray:
    """The identity with some entries replaced."""
    matrix = np.eye(n)
    for row, column, value in entries:
        matrix[row, column] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.ones((2, 3)), ValueError, r"matrix must be square with at least one row, got shape \[2, 3\]"),
        (np.zeros((0, 0)), ValueError, r"at least one row, got shape \[0, 0\]"),
        ([0.5, 0.5], ValueError, r"got shape \[2\]"),
        ([[1.0, 0.0], [1.0]], TypeError, r"matrix must be an \[n, n\] array of real numbers, got list"),
        ([["1"]], TypeError, "array of real numbers, got list of dtype <U1"),
        (np.eye(2) * 1j, TypeError, "array of real numbers, got ndarray of dtype complex128"),
        (np.eye(2, dtype=bool), TypeError, "got ndarray of dtype bool"),
        (None, TypeError, "got NoneType"),
        (topology.ring(3), TypeError, "got StaticTopology"),
        (identity_with(3, (1, 2, np.nan)), ValueError, r"matrix\[1, 2\] must be finite, got nan$"),
        (identity_with(3, (0, 2, np.inf), (2, 0, np.inf)), ValueError, r"matrix\[0, 2\] .* got inf \(2 such entries"),
        (identity_with(3, (1, 0, -0.1), (1, 1, 1.1)), ValueError, r"matrix\[1, 0\] must not be negative, got -0.1$"),
        (
            identity_with(4, (2, 2, 0.5), (2, 1, 0.4)),
            ValueError,
            r"matrix: row 2 sums to 0.9, expected 1 within 1e-09: .* largest entry is \[2, 2\] = 0.5$",
        ),
        (identity_with(4, (2, 2, 0.5), (3, 3, 2.0)), ValueError, r"row 2 sums to 0.5, .* \(2 rows are off\)"),
        (
            [[0.5, 0.5, 0.0], [0.75, 0.25, 0.0], [0.0, 0.25, 0.75]],
            ValueError,
            r"matrix: column 0 sums to 1.25, expected 1 .* workers' mean; its largest entry is \[1, 0\] = 0.75 \(2 col",
        ),
        (np.full((3, 3), 1 / 3, dtype=np.float32), ValueError, r"row 0 sums to 1.0000000\d+, .*compute it in float64"),
        (
            np.kron(np.eye(2), np.full((2, 2), 0.5)),
            ValueError,
            "topology 'custom' is not connected: workers 2, 3 can't reach worker 0, not even through others, .* "
            "allow_disconnected=True",
        ),
        (np.eye(40), ValueError, r"workers 1, 2, 3, 4, 5, 6, 7, 8, ... \(39 in all\) can't reach worker 0"),
    ],
)
def test_wrong_matrices_are_explained(matrix: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topology.from_matrix(matrix)


def test_disconnected_only_when_asked_for() -> None:
    alone = topology.from_matrix(np.eye(3), allow_disconnected=True)
    assert alone.mixing().form == "identity"
    assert not alone.is_connected
    assert alone.spectral_gap == 0.0
    assert alone.degrees == [0, 0, 0]
    assert not alone.describe()["connected"]
    two = nx.Graph([(0, 1), (2, 3)])
    with pytest.raises(ValueError, match="topology 'networkx' is not connected: workers 2, 3 can't reach worker 0"):
        topology.from_networkx(two)
    assert not topology.from_networkx(two, allow_disconnected=True).is_connected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: topology.from_networkx([(0, 1)]), TypeError, "graph must be a networkx graph, got list"),
        (lambda: topology.from_networkx(nx.Graph()), ValueError, "graph must have at least one node"),
        (
            lambda: topology.from_networkx(nx.path_graph(3), weights="mh"),  # type: ignore[arg-type]
            ValueError,
            "weights must be 'metropolis' or 'uniform', got 'mh'",
        ),
        (
            lambda: topology.from_networkx(nx.star_graph(3), weights="uniform"),
            ValueError,
            "regular graphs: worker 0 with degree 3 would count 1.75 times .*; use weights='metropolis'",
        ),
        (
            lambda: topology.from_networkx(nx.Graph([("a", "b"), ("b", "c")]), weights="uniform"),
            ValueError,
            r"worker 0 \(node 'a'\) with degree 1 would count 0.833333 times",
        ),
        (
            lambda: topology.from_networkx(nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)]), weights="uniform"),
            ValueError,
            "worker 0 with in-degree 1 and out-degree 2 would count",
        ),
        (
            lambda: topology.from_networkx(nx.DiGraph([("a", "b"), ("b", "a"), ("b", "c")])),
            ValueError,
            r"every edge both ways, but worker 1 \(node 'b'\) sends to worker 2 \(node 'c'\) and not back",
        ),
    ],
)
def test_wrong_graphs_are_explained(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("sequence", "error", "message"),
    [
        ([], ValueError, "matrices must hold at least one mixing matrix, got none"),
        (topology.ring(3), TypeError, "matrices must be a sequence of .*, got StaticTopology"),
        (7, TypeError, "matrices must be a sequence of .*, got int"),
        ([np.eye(2), topology.ring(3)], ValueError, r"matrices\[0\] has 2, matrices\[1\] has 3"),
        (
            [topology.one_peer_exponential(4)],
            ValueError,
            r"matrices\[0\] must be static, got the time-varying .*one_peer",
        ),
        ([np.eye(2), 2 * np.eye(2)], ValueError, r"matrices\[1\]: row 0 sums to 2, expected 1"),
        ([np.eye(2), [[1, 0], [0, -1]]], ValueError, r"matrices\[1\]\[1, 1\] must not be negative, got -1.0"),
        (
            [np.eye(3), identity_with(3, (0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1))],
            ValueError,
            "topology 'sequence' is not connected over its period of 2 steps: worker 2 can't reach worker 0",
        ),
    ],
)
def test_wrong_sequences_are_explained(sequence: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topology.from_sequence(sequence)
