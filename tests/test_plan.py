"""qgm plan: closed forms against the graphs themselves, the model against hand-made numbers, and wrong input."""

import itertools
import json
import re

import numpy as np
import pytest

from qgm_ext import graphs, topology
from qgm_ext.experiments import plan
from qgm_ext.experiments.plan import ALL_REDUCE, Network
from test_cli import fails, qgm

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 30, 32, 64]


def made(name, n):
    try:
        return topology.get(name, n)
    except ValueError:  # hypercube of no power of two, social of other than 32, a random graph in two parts
        return None


@pytest.mark.parametrize("name", [name for name in topology.names() if name != "random_directed"])
def test_mixing_rate_is_the_spectral_gap(name):
    for n in SIZES:
        graph = made(name, n)
        if graph is None:
            with pytest.raises(ValueError, match="n|connected"):
                plan.mixing_rate(name, n)
        else:
            assert plan.mixing_rate(name, n) == pytest.approx(graph.spectral_gap, abs=1e-7), n


@pytest.mark.parametrize("name", topology.names())
def test_message_counts_are_those_of_the_graph(name):
    for n in SIZES:
        graph = made(name, n)
        if graph is None:
            continue
        for step, (most, mean) in enumerate(plan.steps_of(name, n)):
            to, frm = graphs.off_diagonal_edges(graph.mixing(step))
            degrees = [np.bincount(ends, minlength=n).max() if len(ends) else 0 for ends in (to, frm)]
            assert (most, mean) == (max(degrees), pytest.approx(len(to) / n)), (n, step)


def test_sparse_eigenvalues_are_the_dense_ones(monkeypatch):
    for name in ("binary_tree", "double_binary_trees", "erdos_renyi"):
        dense = topology.get(name, 150).spectral_gap
        monkeypatch.setattr(plan, "_DENSE", 10)
        assert plan.mixing_rate(name, 150) == pytest.approx(dense, rel=1e-6)
        monkeypatch.undo()


def test_closed_forms_take_a_million_workers():
    n = 10**6
    assert plan.mixing_rate("ring", n) == pytest.approx((2 / 3) * (1 - np.cos(2 * np.pi / n)), rel=1e-3)
    assert plan.mixing_rate("chain", n) == pytest.approx((2 / 3) * (1 - np.cos(np.pi / n)), rel=1e-3)
    assert plan.mixing_rate("star", n) == 1e-6
    assert plan.mixing_rate("one_peer_exponential", 2**20) == 1.0
    assert plan.steps_of("complete", n) == [(n - 1, n - 1.0)]


def test_times_and_bytes_by_hand():
    found = {(c.topology, c.message): c for c in plan.make(10**6, Network(8, 1e8, 0.05, compute=0.2)).choices}
    second = 8 * 4e6 / 1e8 / (1448 / 1514)  # of one message
    assert found["ring", "float32"].seconds == pytest.approx(0.2 + 2 * 0.05 + 2 * second)
    assert found["one_peer_exponential", "float32"].seconds == pytest.approx(0.2 + 2 * 0.05 + second)
    assert found["one_peer_exponential", "bfloat16"].seconds == pytest.approx(0.2 + 2 * 0.05 + second / 2)
    assert found["star", "float32"].seconds == pytest.approx(0.2 + 2 * 0.05 + 7 * second)
    assert found[ALL_REDUCE, "float32"].seconds == pytest.approx(0.2 + 14 * 2 * 0.05 + 14 / 8 * second)
    ring = found["ring", "float32"]
    assert (ring.bytes_mean, ring.bytes_max, ring.memory) == (8e6, 8e6, 3 * 4e6 + 3 * 4e6)
    assert found["star", "float32"].bytes_mean == pytest.approx(14 / 8 * 4e6)
    assert found["ring", "top_k"].mixing == pytest.approx(0.25 * topology.ring(8).spectral_gap)
    assert found["ring", "top_k"].runs_with == "choco_sgd"
    assert found["one_peer_exponential", "top_k"].runs_with is None
    int8 = found["one_peer_exponential", "int8"]
    assert (int8.runs_with, int8.bytes_mean) == ("any algorithm", 1e6 + 4 * 15625)
    assert int8.memory == 4 * 4e6 + 2 * int8.bytes_mean


def test_recommended_is_the_fastest_that_runs_and_mixes_enough():
    network = Network(1024, 1e9, 0.05)
    found = plan.make(1_300_000_000, network)
    assert found.recommended.topology == "one_peer_exponential"
    for choice in found.choices:
        exact = choice.message in ("float32", "bfloat16")
        if exact and choice.runs_with is not None and (choice.mixing or 0) >= found.least_mixing:
            assert choice.seconds >= found.recommended.seconds * (1 - 1e-8)
    # At full mixing in every step only exact averaging is left.
    assert plan.make(1000, Network(6, 1e9, 0.0), least_mixing=1.0).recommended.mixing == 1.0
    seconds = [c.seconds for c in found.choices]
    assert all(one <= other * (1 + 1e-8) for one, other in itertools.pairwise(seconds))


def test_one_worker_sends_nothing():
    found = plan.make(10, Network(1, 1e6, 0.1, compute=0.5))
    assert {(c.seconds, c.bytes_max) for c in found.choices} == {(0.5, 0.0)}


def test_topologies_that_do_not_exist_are_noted():
    notes = plan.make(10, Network(6, 1e6, 0.1)).notes
    assert any(re.match("hypercube: n must be a power of two, got 6", note) for note in notes)
    assert any(note.startswith("social: ") for note in notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0, 0.0), "workers must be at least 1, got 0"),
        ((2, 0.0, 0.0), "bandwidth must be a finite number > 0, got 0"),
        ((2, float("nan"), 0.0), "bandwidth must be"),
        ((2, 1.0, -1.0), "latency must be"),
        ((2, 1.0, 0.0, float("inf")), "compute must be"),
    ],
)
def test_network_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Network(*arguments)


def test_make_refuses():
    network = Network(2, 1e6, 0.0)
    with pytest.raises(TypeError, match="parameters must be an integer, got 1.5"):
        plan.make(1.5, network)
    with pytest.raises(ValueError, match="least_mixing must be"):
        plan.make(5, network, least_mixing=2.0)
    with pytest.raises(ValueError, match="qg_dsgdm"):
        plan.make(5, network, algorithm="qg_dsgdm_m")


def test_command_shows_and_recommends():
    code, output = qgm("plan", "--params", "1.3e9", "--workers", "1024", "--bandwidth", "1e9", "--latency", "0.05")
    assert code == 0
    assert "recommended: one_peer_exponential with bfloat16 messages" in output
    assert re.search(r"all-reduce +float32 +2\d\d", output)
    code, output = qgm("plan", "--params", "1000", "--workers", "4", "--bandwidth", "1e6", "--latency", "0", "--json")
    assert json.loads(output)["recommended"]["topology"]
    assert len(json.loads(output)["choices"]) > 50


def test_command_refuses_in_one_line():
    rest = ("--workers", "4", "--bandwidth", "1e9", "--latency", "0")
    assert fails("plan", "--params", "1.5", *rest) == "qgm: --params must be a whole number of at least 1, got 1.5"
    assert "--params must be a whole number of at least 1, got 0" in fails("plan", "--params", "0", *rest)
    assert "--params must be a whole number of at least 1, got nan" in fails("plan", "--params", "nan", *rest)
    assert "--mixing must be in [0, 1], got 2" in fails("plan", "--params", "9", *rest, "--mixing", "2")
    assert "bandwidth" in fails("plan", "--params", "5", "--workers", "4", "--bandwidth", "-1", "--latency", "0")
