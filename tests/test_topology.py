"""Topologies as objects: sequences in time, equality and reports, names, pictures."""

from __future__ import annotations

import builtins
import copy
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from named_topologies import every_named
from qgm_ext import graphs, topology
from qgm_ext.topology import Topology

GOLDEN_PAIRS = [[[2], [4], [0], [5], [1], [3]], [[3], [2], [1], [0], [5], [4]]]
GOLDEN_FINGERPRINT = "6774ebc93235bf55"


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
