"""Topologies: weights, spectra, neighbours, sequences in time, checks with their messages, pictures.

Spectral values are those of the specification (ring of 16 and 32, social network of 32), the others are closed forms.
"""

from __future__ import annotations

import builtins
import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qgm_ext import graphs, topology
from qgm_ext.topology import Topology

GOLDEN_PAIRS = [[[2], [4], [0], [5], [1], [3]], [[3], [2], [1], [0], [5], [4]]]
GOLDEN_FINGERPRINT = "6774ebc93235bf55"
SIZES = [1, 2, 3, 5, 7, 16, 33]
ANY_SIZE = [name for name in topology.names() if name not in ("hypercube", "social", "random_directed")]
PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


def every_named(n: int) -> list[Topology]:
    """Every topology that has a name and takes n workers."""
    found = [topology.get(name, n) for name in ANY_SIZE]
    if n & (n - 1) == 0:
        found.append(topology.hypercube(n))
    if n == 32:
        found.append(topology.social())
    return found


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


# Time-varying -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "hops"), [(2, [1]), (3, [1, 2]), (5, [1, 2, 4]), (8, [1, 2, 4]), (9, [1, 2, 4, 8])])
def test_one_peer_exponential(n: int, hops: list[int]) -> None:
    graph = topology.one_peer_exponential(n)
    assert graph.period == len(hops) == math.floor(math.log2(n - 1)) + 1
    assert graph.is_time_varying == (len(hops) > 1)
    for step in range(3 * len(hops)):
        hop = hops[step % len(hops)]
        expected = 0.5 * np.eye(n) + 0.5 * np.eye(n)[(np.arange(n) - hop) % n]
        assert np.array_equal(graph.matrix(step), expected)
        assert graph.neighbors(0, step) == [(-hop) % n]
        assert graph.at(step) is graph.at(step + len(hops))
        assert not graph.at(step).is_time_varying


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_one_peer_exponential_averages_exactly_after_a_period(n: int) -> None:
    graph = topology.one_peer_exponential(n)
    product = np.linalg.multi_dot([np.eye(n), *(graph.matrix(step) for step in range(graph.period or 0)), np.eye(n)])
    np.testing.assert_allclose(product, 1 / n, atol=1e-15)
    assert graph.spectral_gap == 1.0


def test_cyclic_spectral_gap_is_per_step() -> None:
    ring = topology.ring(12)
    for count in (2, 3):
        assert topology.from_sequence([ring] * count).spectral_gap == pytest.approx(ring.spectral_gap, abs=1e-12)


def test_random_matching_pairs_everyone() -> None:
    for n in (2, 7, 16, 33):
        pairs = topology.random_matching(n, seed=5)
        assert pairs.period is None
        assert pairs.is_time_varying
        assert pairs.is_symmetric
        for step in range(20):
            partners = [pairs.neighbors(worker, step) for worker in range(n)]
            assert sum(len(partner) == 0 for partner in partners) == n % 2
            for worker, partner in enumerate(partners):
                assert all(partners[other] == [worker] for other in partner)
            assert set(np.unique(pairs.matrix(step))) <= {0.0, 0.5, 1.0}


def test_random_matching_depends_on_seed_and_step_alone() -> None:
    one, other = topology.random_matching(16, seed=1), topology.random_matching(16, seed=1)
    forward = [one.matrix(step) for step in range(30)]
    backward = [other.matrix(step) for step in reversed(range(30))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert len({matrix.tobytes() for matrix in forward}) == 30, "every step draws anew"
    assert not np.array_equal(forward[0], topology.random_matching(16, seed=2).matrix(0))
    assert np.array_equal(one.matrix(2**40), other.matrix(2**40))
    for step in (256, 2**32, 2**40):
        assert not np.array_equal(one.matrix(step), one.matrix(0)), step


def test_random_matching_golden() -> None:
    """Written down, because processes on different machines and numpy versions must pair alike."""
    pairs = topology.random_matching(6, seed=0)
    assert [[pairs.neighbors(worker, step) for worker in range(6)] for step in range(2)] == GOLDEN_PAIRS


def test_random_matching_cache_is_bounded() -> None:
    pairs = topology.random_matching(16)
    for step in range(100):
        assert pairs.mixing(step) is pairs.mixing(step)
    assert len(pairs.__dict__["_recent"]) <= 8


@pytest.mark.parametrize("n", [2, 3, 4, 9])
def test_random_matching_spectral_gap_is_that_of_the_expectation(n: int) -> None:
    pairs = topology.random_matching(n, seed=0)
    squares = [pairs.matrix(step).T @ pairs.matrix(step) for step in range(4000)]
    rho = math.sqrt(max(0.0, np.linalg.eigvalsh(np.mean(squares, axis=0) - 1 / n)[-1]))
    assert pairs.spectral_gap == pytest.approx(1 - rho, abs=0.03)
    if n == 4:  # E[W]: 1/2 on the diagonal, 1/6 elsewhere
        assert pairs.spectral_gap == pytest.approx(1 - math.sqrt(1 / 3), abs=1e-12)


def test_sequence_of_matrices_and_topologies() -> None:
    swap = np.array([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]])
    cross = np.array([[0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5]])
    sequence = topology.from_sequence([swap, cross, topology.ring(4)], name="mine")
    assert (sequence.name, sequence.period, sequence.num_workers) == ("mine", 3, 4)
    assert np.array_equal(sequence.matrix(3), swap)
    assert np.array_equal(sequence.matrix(4), cross)
    assert sequence.at(5) == topology.ring(4)
    assert sequence.degrees == [2, 2, 2, 2]
    assert topology.from_sequence([swap, cross]).spectral_gap == 1.0  # the two together average exactly
    assert topology.from_sequence([topology.ring(4)]) == topology.ring(4)
    assert topology.from_sequence(np.stack([swap, cross])) == topology.from_sequence([swap, cross])


def test_static_topology_is_its_own_step() -> None:
    ring = topology.ring(5)
    assert ring.at(7) is ring
    assert ring.period == 1
    assert not ring.is_time_varying
    assert ring.mixing(3) is ring.mixing()


# Identity, immutability, reports ------------------------------------------------------------------------------------


def test_equality_and_hash_go_by_content() -> None:
    assert topology.ring(8) == topology.from_matrix(topology.ring(8).matrix())
    assert hash(topology.ring(8)) == hash(topology.from_matrix(topology.ring(8).matrix()))
    assert topology.ring(3) == topology.complete(3)
    assert topology.ring(8) != topology.ring(9)
    assert topology.ring(8) != topology.chain(8)
    assert topology.one_peer_exponential(8) == topology.one_peer_exponential(8)
    assert topology.one_peer_exponential(8) != topology.exponential(8)
    assert topology.random_matching(8, 1) == topology.random_matching(8, 1) != topology.random_matching(8, 2)
    assert topology.random_matching(8) != topology.random_matching(9)
    assert topology.ring(8) != "ring"
    assert len({topology.ring(8), topology.ring(8), topology.star(8)}) == 2


@pytest.mark.parametrize("n", [1, 2, 8])
def test_pickle_and_deepcopy(n: int) -> None:
    for graph in every_named(n):
        for twin in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph)):
            assert twin == graph
            assert hash(twin) == hash(graph)
            assert (twin.name, twin.period, dict(twin.arguments)) == (graph.name, graph.period, dict(graph.arguments))
            assert np.array_equal(twin.matrix(2), graph.matrix(2))


def test_nothing_can_be_changed() -> None:
    ring = topology.ring(4)
    with pytest.raises(AttributeError, match="can't set 'name'"):
        ring.name = "star"
    with pytest.raises(AttributeError, match="can't delete 'period'"):
        del ring.period
    with pytest.raises(TypeError):
        ring.arguments["n"] = 5  # type: ignore[index]
    ring.matrix()[0, 0] = 9.0
    ring.neighbors(0).append(9)
    ring.degrees.append(9)
    ring.eigenvalues[:] = 9.0
    assert ring == topology.ring(4)
    assert ring.neighbors(0) == [1, 3]
    assert ring.degrees == [2] * 4
    assert ring.lambda_2 == pytest.approx(1 / 3)


def test_describe_is_json_and_says_what_is_there() -> None:
    facts = topology.ring(16).describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["name"] == "ring"
    assert facts["num_workers"] == 16
    assert facts["period"] == 1
    assert facts["degree_min"] == facts["degree_max"] == 2
    assert facts["messages_per_step"] == 32
    assert facts["weight_min"] == facts["self_weight_max"] == 1 / 3
    assert facts["spectral_gap"] == topology.ring(16).spectral_gap
    assert facts["lambda_n"] == topology.ring(16).lambda_n
    swap = topology.from_matrix([[0.0, 1.0], [1.0, 0.0]]).describe()  # connected, but never agrees
    assert swap["self_weight_min"] == 0.0
    assert swap["spectral_gap"] == 0.0


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_describe_of_every_topology(n: int) -> None:
    for graph in every_named(n):
        facts = graph.describe()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts
        assert (facts["lambda_2"] is None) == (graph.is_time_varying or not graph.is_symmetric)
        assert repr(graph).startswith(f"<Topology {graph.name}: {n} workers, period {graph.period}")


def test_fingerprint_is_the_same_everywhere() -> None:
    """Written down: a resumed run compares it with the one in its config.json."""
    assert topology.ring(4).fingerprint == GOLDEN_FINGERPRINT
    assert topology.ring(4).fingerprint != topology.ring(5).fingerprint


# Names --------------------------------------------------------------------------------------------------------------


def test_get_takes_the_spanning_tree_of_a_named_topology() -> None:
    assert topology.get("spanning-tree-of-ring", 5) == topology.spanning_tree(topology.ring(5))
    assert topology.get("spanning_tree_of_social") == topology.spanning_tree(topology.social())
    with pytest.raises(ValueError, match="did you mean 'ring'"):
        topology.get("spanning_tree_of_rnig", 5)


def test_names_and_get() -> None:
    assert topology.names() == sorted(topology.names())
    assert {"ring", "social", "complete", "torus", "star", "chain", "exponential"} <= set(topology.names())
    assert topology.get("ring", 16) == topology.ring(16)
    assert topology.get("One-Peer-Exponential", 8) == topology.one_peer_exponential(8)
    assert topology.get("social") == topology.get("social", 32) == topology.social()
    assert topology.get("erdos_renyi", 12, p=0.6, seed=2) == topology.erdos_renyi(12, 0.6, 2)
    assert topology.get("ring", np.int64(4)) == topology.ring(4)


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


# Pictures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "graph",
    [
        topology.ring(1),
        topology.ring(2),
        topology.chain(5),
        topology.star(6),
        topology.torus(12),
        topology.hypercube(16),
        topology.exponential(8),
        topology.one_peer_exponential(8),
        topology.random_matching(7),
        topology.social(),
        topology.from_networkx(nx.petersen_graph()),
        topology.from_matrix(np.eye(3), allow_disconnected=True),
        topology.complete(70),
    ],
    ids=lambda graph: f"{graph.name}-{graph.num_workers}",
)
def test_save_png_writes_a_picture(graph: Topology, tmp_path: Path) -> None:
    file = tmp_path / "graph"
    graph.save_png(file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    assert file.stat().st_size > 5000


def test_plot_draws_every_worker_edge_and_step() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert topology.one_peer_exponential(8).plot(axes) is axes
    assert sorted(text.get_text() for text in axes.texts) == sorted(map(str, range(8)))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["step 0", "step 1", "step 2"]
    ring = Figure().add_subplot()
    topology.ring(16).plot(ring)
    assert sum(len(lines.get_paths()) for lines in ring.collections if "Line" in type(lines).__name__) == 16
    assert "ring, n = 16: degree 2, spectral gap 0.0507" in ring.get_title()


@pytest.mark.parametrize("name", ["ring", "chain", "star", "torus", "hypercube", "social", "erdos_renyi", "complete"])
def test_no_two_workers_are_drawn_on_one_spot(name: str) -> None:
    for n in (32,) if name == "social" else (2, 4, 16, 32, 64):
        graph = topology.get(name, n)
        spots = graphs.positions(name, n, graphs.off_diagonal_edges(graph.mixing()))
        apart = np.linalg.norm(spots[:, None] - spots[None], axis=2) + 9 * np.eye(n)
        assert spots.shape == (n, 2)
        assert apart.min() > 0.04, (name, n)


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=re.escape("the extra 'train': pip install 'qgm_ext[train]'")):
        topology.ring(4).save_png(tmp_path / "graph.png")
    with pytest.raises(ModuleNotFoundError, match="needs matplotlib"):
        topology.ring(4).plot()


def test_save_png_into_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        topology.ring(4).save_png(tmp_path / "missing" / "graph.png")
