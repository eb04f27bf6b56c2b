"""Topologies: weights, spectra and neighbours of the named graphs, of any graph and of networkx's.

Spectral values are those of the specification (ring of 16 and 32, social network of 32), the others are closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from named_topologies import ANY_SIZE, every_named
from qgm_ext import graphs, topology

SIZES = [1, 2, 3, 5, 7, 16, 33]
PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


def assert_doubly_stochastic(matrix: np.ndarray) -> None:
    """Fail unless the matrix is a mixing matrix."""
    assert matrix.dtype == np.float64
    assert matrix.ndim == 2
    assert matrix.shape[0] == matrix.shape[1]
    assert np.all(matrix >= 0)
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0, atol=1e-13)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-13)


def metropolis_by_hand(graph: nx.Graph) -> np.ndarray:
    """w_ij = 1 / (1 + max(d_i, d_j)), w_ii = 1 - sum, entry by entry."""
    nodes = list(graph.nodes)
    matrix = np.zeros((len(nodes), len(nodes)))
    for i, one in enumerate(nodes):
        for j, other in enumerate(nodes):
            if i != j and graph.has_edge(one, other):
                matrix[i, j] = 1 / (1 + max(graph.degree(one), graph.degree(other)))
        matrix[i, i] = 1 - matrix[i].sum()
    return matrix


@st.composite
def connected_graphs(draw: Callable[..., Any]) -> nx.Graph:
    """A random connected graph of 1 to 24 nodes."""
    n = draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**16))
    graph = nx.gnp_random_graph(n, draw(st.floats(0.0, 1.0)), seed=seed)
    order = np.random.RandomState(seed).permutation(n).tolist()
    graph.add_edges_from((order[k], order[np.random.RandomState(seed + k).randint(k)]) for k in range(1, n))
    return graph


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ANY_SIZE))
def test_one_worker_is_alone(name: str) -> None:
    alone = topology.get(name, 1)
    assert alone.matrix().tolist() == [[1.0]]
    assert alone.neighbors(0) == []
    assert alone.degrees == [0]
    assert alone.spectral_gap == 1.0
    assert alone.mixing().form == "identity"


def test_one_worker_hypercube_and_eigenvalues() -> None:
    assert topology.hypercube(1).matrix().tolist() == [[1.0]]
    assert (topology.ring(1).lambda_2, topology.ring(1).lambda_n) == (0.0, 1.0)


@pytest.mark.parametrize("name", sorted([*ANY_SIZE, "hypercube"]))
def test_two_workers_average(name: str) -> None:
    pair = topology.get(name, 2)
    assert pair.matrix().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert pair.neighbors(0) == [1]
    assert pair.neighbors(1) == [0]
    assert pair.spectral_gap == pytest.approx(1.0, abs=1e-15)
    assert pair.mixing().form == "mean"


def test_ring_of_four_by_hand() -> None:
    third = 1 / 3
    expected = [[third, third, 0, third], [third, third, third, 0], [0, third, third, third], [third, 0, third, third]]
    assert topology.ring(4).matrix().tolist() == expected  # exactly 1/3, not 1/3 and a rounding error


def test_chain_of_four_by_hand() -> None:
    third = 1 / 3
    expected = [[2 / 3, third, 0, 0], [third, third, third, 0], [0, third, third, third], [0, 0, third, 2 / 3]]
    np.testing.assert_allclose(topology.chain(4).matrix(), expected, atol=1e-15)


def test_star_of_four_by_hand() -> None:
    expected = [[0.25] * 4, [0.25, 0.75, 0, 0], [0.25, 0, 0.75, 0], [0.25, 0, 0, 0.75]]
    np.testing.assert_allclose(topology.star(4).matrix(), expected, atol=1e-15)


@pytest.mark.parametrize("n", SIZES)
def test_complete_is_the_mean_exactly(n: int) -> None:
    mean = topology.complete(n)
    assert np.array_equal(mean.matrix(), np.full((n, n), 1 / n))
    assert mean.spectral_gap == 1.0
    assert mean.lambda_2 == 0.0
    assert mean.mixing().form == ("identity" if n == 1 else "mean")


@pytest.mark.parametrize(
    ("n", "worker", "neighbors"),
    [
        (12, 0, [1, 3, 4, 8]),  # 3 x 4
        (12, 6, [2, 5, 7, 10]),
        (16, 5, [1, 4, 6, 9]),  # 4 x 4
        (8, 0, [1, 3, 4]),  # 2 x 4: up and down are the same worker
        (6, 5, [2, 3, 4]),  # 2 x 3
        (4, 0, [1, 2]),  # 2 x 2
        (9, 4, [1, 3, 5, 7]),  # 3 x 3
        (7, 0, [1, 6]),  # 1 x 7
    ],
)
def test_torus_neighbors(n: int, worker: int, neighbors: list[int]) -> None:
    grid = topology.torus(n)
    assert grid.neighbors(worker) == neighbors
    assert grid.is_regular
    assert grid.matrix()[worker, worker] == 1 / (1 + len(neighbors))


@pytest.mark.parametrize("n", [2, 3, 5, 7, 31])
def test_torus_of_a_prime_is_the_ring(n: int) -> None:
    assert topology.torus(n) == topology.ring(n)


@pytest.mark.parametrize("n", [12, 16, 20, 36])
def test_torus_equals_networkx_grid(n: int) -> None:
    rows = max(side for side in range(1, n) if n % side == 0 and side * side <= n)
    grid = nx.grid_2d_graph(rows, n // rows, periodic=True)  # its nodes come in row-major order
    assert topology.from_networkx(grid, weights="uniform") == topology.torus(n)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_hypercube_equals_networkx(d: int) -> None:
    corners = nx.relabel_nodes(nx.hypercube_graph(d), lambda bits: int("".join(map(str, bits)), 2))
    assert topology.hypercube(2**d) == topology.from_networkx(corners)
    cube = topology.hypercube(2**d)
    assert cube.degrees == [d] * 2**d
    assert cube.lambda_2 == pytest.approx((d - 1) / (d + 1), abs=1e-12)
    assert cube.lambda_n == pytest.approx((1 - d) / (1 + d), abs=1e-12)


@pytest.mark.parametrize("n", SIZES[1:])
def test_exponential_receives_from_powers_of_two_back(n: int) -> None:
    hops = [2**k for k in range(n) if 2**k < n]
    graph = topology.exponential(n)
    for worker in range(n):
        assert graph.neighbors(worker) == sorted({(worker - hop) % n for hop in hops})
        assert graph.out_neighbors(worker) == sorted({(worker + hop) % n for hop in hops})
    np.testing.assert_allclose(graph.matrix()[graph.matrix() > 0], 1 / (1 + len(hops)), atol=1e-15)


def test_exponential_spectral_gap_known_values() -> None:
    """For n a power of two, rho = (p - 1) / (p + 1) (Ying et al. 2021, "Exponential Graph is Provably Efficient")."""
    for p in (2, 3, 4, 5):
        assert topology.exponential(2**p).spectral_gap == pytest.approx(1 - (p - 1) / (p + 1), abs=1e-12)
    assert not topology.exponential(16).is_symmetric


@pytest.mark.parametrize(("n", "lambda_2"), [(16, 0.9493), (32, 0.9872)])
def test_ring_spectrum(n: int, lambda_2: float) -> None:
    ring = topology.ring(n)
    assert ring.lambda_2 == pytest.approx(lambda_2, abs=5e-5)
    assert ring.lambda_2 == pytest.approx((1 + 2 * math.cos(2 * math.pi / n)) / 3, abs=1e-13)
    assert ring.lambda_n == pytest.approx(-1 / 3, abs=1e-13)
    assert ring.spectral_gap == pytest.approx(1 - ring.lambda_2, abs=1e-15)


def test_spectral_gap_counts_negative_eigenvalues() -> None:
    reluctant = np.array([[0.1, 0.45, 0, 0.45], [0.45, 0.1, 0.45, 0], [0, 0.45, 0.1, 0.45], [0.45, 0, 0.45, 0.1]])
    graph = topology.from_matrix(reluctant)
    np.testing.assert_allclose(graph.eigenvalues, [1, 0.1, 0.1, -0.8], atol=1e-14)
    assert graph.spectral_gap == pytest.approx(0.2, abs=1e-14)


def test_unreached_follows_messages_from_sender_to_receiver() -> None:
    chain = graphs.edges(4, receivers=[1, 2], senders=[0, 1])  # 0 -> 1 -> 2, and 3 alone
    assert [graphs.unreached(4, chain, start) for start in range(4)] == [[3], [0, 3], [0, 1, 3], [0, 1, 2]]


def test_social_network() -> None:
    social = topology.social()
    assert social.num_workers == 32
    np.testing.assert_allclose(social.matrix(), metropolis_by_hand(nx.davis_southern_women_graph()), atol=1e-15)
    assert social.lambda_2 == pytest.approx(0.9179, abs=5e-5)
    assert social.lambda_n == pytest.approx(-0.4343, abs=5e-5)
    assert sum(social.degrees) == 2 * 89
    assert min(social.degrees) == 2
    assert max(social.degrees) == 14


def test_social_equals_the_recursive_rule_of_the_papers_code() -> None:
    """A + I; by falling degree, set what is still unset in row and column to 1/(degree + 1); then the diagonal."""
    adjacency = nx.to_numpy_array(nx.davis_southern_women_graph(), weight=None) + np.eye(32)
    degree = adjacency.sum(axis=1)
    unset, matrix = adjacency == 1, adjacency.copy()
    for node in np.argsort(-degree, kind="stable"):
        for index in [(node, slice(None)), (slice(None), node)]:
            matrix[index] = np.where(unset[index], 1 / degree[node], matrix[index])
            unset[index] = False
    matrix[np.diag_indices(32)] += 1 - matrix.sum(axis=1)
    np.testing.assert_allclose(topology.social().matrix(), matrix, atol=1e-15)


def test_erdos_renyi_is_reproducible_and_depends_on_the_seed() -> None:
    one = topology.erdos_renyi(16, 0.4, seed=3)
    assert one == topology.erdos_renyi(16, p=0.4, seed=3)
    assert one != topology.erdos_renyi(16, 0.4, seed=4)
    assert dict(one.arguments) == {"p": 0.4, "seed": 3}
    np.testing.assert_allclose(one.matrix(), metropolis_by_hand(nx.gnp_random_graph(16, 0.4, seed=3)), atol=1e-15)
    assert topology.erdos_renyi(8, 1.0) == topology.complete(8)


# Properties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_every_named_topology_is_doubly_stochastic_and_connected(n: int) -> None:
    for graph in every_named(n):
        assert graph.num_workers == n
        assert graph.is_connected
        for step in range(8):
            assert_doubly_stochastic(graph.matrix(step))
        assert 0.0 <= graph.spectral_gap <= 1.0
        if n > 1:
            assert graph.spectral_gap > 0, graph


@PROPERTY
@given(graph=connected_graphs())
def test_metropolis_of_any_graph(graph: nx.Graph) -> None:
    mixed = topology.from_networkx(graph)
    matrix = mixed.matrix()
    assert_doubly_stochastic(matrix)
    assert np.array_equal(matrix, matrix.T)
    assert mixed.is_symmetric
    np.testing.assert_allclose(matrix, metropolis_by_hand(nx.from_dict_of_lists({v: graph[v] for v in sorted(graph)})))
    assert mixed.degrees == [graph.degree(node) for node in range(len(graph))]
    assert mixed.lambda_n > -1.0
    assert len(graph) == 1 or mixed.lambda_2 < 1.0


@PROPERTY
@given(graph=connected_graphs(), seed=st.integers(0, 2**16))
def test_permuted_workers_permute_the_matrix(graph: nx.Graph, seed: int) -> None:
    order = np.random.RandomState(seed).permutation(len(graph))
    renamed = nx.relabel_nodes(graph, dict(enumerate(order.tolist())))
    matrix, permuted = topology.from_networkx(graph), topology.from_networkx(renamed)
    np.testing.assert_allclose(permuted.matrix()[np.ix_(order, order)], matrix.matrix(), atol=1e-15)
    assert permuted.spectral_gap == pytest.approx(matrix.spectral_gap, abs=1e-10)


@PROPERTY
@given(n=st.integers(1, 40), name=st.sampled_from(ANY_SIZE), step=st.integers(0, 100), seed=st.integers(0, 2**16))
def test_mixing_keeps_the_mean_and_shrinks_the_distance(n: int, name: str, step: int, seed: int) -> None:
    x = np.random.RandomState(seed).standard_normal((n, 3))
    graph = topology.get(name, n, **({"p": 1.0} if name == "erdos_renyi" else {}))
    mixed = graph.matrix(step) @ x
    np.testing.assert_allclose(mixed.mean(axis=0), x.mean(axis=0), atol=1e-13)
    before, after = (np.linalg.norm(v - v.mean(axis=0)) for v in (x, mixed))
    assert after <= before * (1 + 1e-12)
    if not graph.is_time_varying:
        assert after <= (1 - graph.spectral_gap) * before + 1e-12


@PROPERTY
@given(n=st.integers(1, 24), count=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_any_doubly_stochastic_matrix_is_taken_as_it_is(n: int, count: int, seed: int) -> None:
    """Birkhoff: mixtures of permutations are all of them."""
    rng = np.random.RandomState(seed)
    share = rng.dirichlet(np.ones(count))
    matrix = sum(s * np.eye(n)[rng.permutation(n)] for s in share)
    graph = topology.from_matrix(matrix, allow_disconnected=True)
    np.testing.assert_allclose(graph.matrix(), matrix, atol=1e-12)
    if graph.mixing().form in ("sparse", "dense"):
        assert np.array_equal(graph.matrix(), matrix)
    directed = nx.from_numpy_array(matrix, create_using=nx.DiGraph)
    assert graph.is_connected == nx.is_strongly_connected(directed)
    if not graph.is_connected:
        with pytest.raises(ValueError, match="is not connected"):
            topology.from_matrix(matrix)
    else:
        assert topology.from_matrix(matrix) == graph
    singular = np.linalg.svd(matrix - 1 / n, compute_uv=False)[0]
    assert graph.spectral_gap == pytest.approx(1.0 if n == 1 else 1 - min(1.0, singular), abs=1e-9)
    assert graph.is_symmetric == np.allclose(matrix, matrix.T, atol=1e-12, rtol=0)
    for worker in range(n):
        received = [j for j in range(n) if j != worker and matrix[worker, j] > 0]
        assert graph.neighbors(worker) == received
        assert graph.out_neighbors(worker) == [i for i in range(n) if i != worker and matrix[i, worker] > 0]


@PROPERTY
@given(n=st.integers(3, 24), degree=st.integers(2, 6), seed=st.integers(0, 100))
def test_uniform_equals_metropolis_on_regular_graphs(n: int, degree: int, seed: int) -> None:
    assume(degree < n and n * degree % 2 == 0)
    graph = nx.random_regular_graph(degree, n, seed=seed)
    assume(nx.is_connected(graph))
    uniform = topology.from_networkx(graph, weights="uniform")
    assert uniform == topology.from_networkx(graph)
    np.testing.assert_array_equal(
        np.unique(uniform.matrix()), np.unique([0.0, 1 / (1 + degree)])[-1 - (degree < n - 1) :]
    )


# networkx -----------------------------------------------------------------------------------------------------------


def test_nodes_zero_to_n_keep_their_numbers_whatever_their_order() -> None:
    graph = nx.Graph([(3, 0), (0, 1), (1, 2)])
    assert list(graph.nodes) == [3, 0, 1, 2]
    assert topology.from_networkx(graph).neighbors(3) == [0]


def test_other_nodes_are_numbered_in_order() -> None:
    graph = nx.Graph([("c", "a"), ("a", "b")])
    assert topology.from_networkx(graph).neighbors(1) == [0, 2]  # "a" is the second node


def test_self_loops_and_parallel_edges_count_once() -> None:
    multi = nx.MultiGraph([(0, 1), (0, 1), (1, 1), (1, 2)])
    assert topology.from_networkx(multi) == topology.chain(3)


def test_directed_graph_goes_from_sender_to_receiver() -> None:
    graph = nx.DiGraph([(k, (k + hop) % 16) for k in range(16) for hop in (1, 2, 4, 8)])
    assert topology.from_networkx(graph, weights="uniform") == topology.exponential(16)


def test_directed_graph_with_both_ways_takes_metropolis() -> None:
    assert topology.from_networkx(nx.path_graph(5).to_directed()) == topology.chain(5)


def test_graph_round_trip() -> None:
    social = topology.social()
    assert nx.is_isomorphic(social.graph(), nx.davis_southern_women_graph())
    assert social.graph().edges[0, 18]["weight"] == social.matrix()[0, 18]
    assert social.graph().nodes[7]["self_weight"] == social.matrix()[7, 7]
    directed = topology.exponential(8).graph()
    assert directed.is_directed()
    assert sorted(directed.predecessors(0)) == [4, 6, 7]
    peer = topology.one_peer_exponential(8).graph(step=1)
    assert sorted(peer.edges) == [(k, (k + 2) % 8) for k in range(8)]
