"""Every algorithm against the facts that hold for it: reductions, fixed points, means, hand-made cases.

The facts are those of the papers and of linear algebra: a method with its knobs at zero is a simpler one; its fixed
point under constant step size is known; a doubly stochastic matrix preserves the mean. An algorithm without a row in
ROWS fails here. Where much is known of one family it has a file of its own, such as test_qg_dsgdm.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qgm_ext import StackedOptimizer, algorithms, reference, topology
from quadratic_runs import F64, RING, run, same_path
from rows import ALGORITHMS
from rows.base import Quadratics, optimum

ROWS = {name: row for name, row in ALGORITHMS.items() if not algorithms.get_class(name).needs_model}


def test_every_algorithm_has_a_row():
    assert set(ALGORITHMS) == set(algorithms.names())


def test_every_algorithm_names_its_source_and_what_of_it_was_not_verified():
    for name in algorithms.names():
        documentation = algorithms.get_class(name).__doc__ or ""
        assert "Source: " in documentation, name
        recalled = name in {"choco_sgd", "damsgrad", "ngc", "qg_dadam", "slowmo"} or "saddle" in name
        assert any(word in documentation.lower() for word in ("recalled", "not verified")) == recalled, name


@pytest.mark.parametrize("name", ROWS)
def test_heterogeneous_quadratic_reaches_the_predicted_point(name):
    row = ROWS[name]
    problem, topo = Quadratics(n=row.n), row.graph(row.n)
    opt = run(name, problem, topo, 4000, **row.hyper)
    start = problem.optimum.abs().max()
    if row.point is None:
        assert (opt.x.mean(0) - problem.optimum).abs().max() < 0.5 * start
        return
    expected = row.point(problem, torch.tensor(topo.matrix()))
    torch.testing.assert_close(opt.x, expected, rtol=0, atol=1e-9)
    assert (opt.x.mean(0) - problem.optimum).abs().max() < 0.5 * start
    if row.point is not optimum:
        assert (expected - problem.optimum).abs().max() > 0.01  # the point is biased, not the optimum


@pytest.mark.filterwarnings("ignore:d2.*eigenvalue", "ignore:.*gut.*diverges")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("drop", [False, True], ids=["constant-lr", "lr-drop"])
@pytest.mark.parametrize(
    "topo", [topology.ring(8), topology.complete(8), topology.one_peer_exponential(8)], ids=lambda t: t.name
)
def test_twelve_steps_equal_the_reference(name, drop, topo):
    problem = Quadratics()
    if ROWS[name].graph is topology.chain:  # a tree for each of the graphs
        trees = {"ring": topology.chain, "complete": topology.star, "one_peer_exponential": topology.binary_tree}
        topo = trees[topo.name](8)
    if name == "choco_sgd" and topo.is_time_varying:
        topo = topology.exponential(8)
    for extra in ({}, {"weight_decay": 0.01}, *ROWS[name].variants):
        algorithm = algorithms.get(name, **{**ROWS[name].hyper, **extra})
        opt = StackedOptimizer(torch.ones_like(problem.a), topo, algorithm)
        x, state = torch.ones_like(problem.a), reference.initial_state(algorithm, torch.ones_like(problem.a), topo)
        for t in range(12):
            lr = algorithm.lr * (0.1 if drop and t >= 6 else 1.0)
            opt.step(problem.gradient(opt.x), lr=lr)
            x, state = reference.step(algorithm, x, problem.gradient(x), state, torch.tensor(topo.matrix(t)), t, lr)
        torch.testing.assert_close(opt.x, x, rtol=1e-12, atol=1e-13)
        kept = {**opt.state, **opt.scalars}
        assert kept.keys() == state.keys() - {"previous_lr"}
        for key, vector in kept.items():
            size = state[key].abs().max().item()
            torch.testing.assert_close(vector, state[key], rtol=1e-12, atol=1e-12 * max(1.0, size))


@pytest.mark.parametrize("name", ["dsgd", "dsgdm", "dsgdm_n", "qg_dsgdm", "qg_dsgdm_n"])
def test_first_steps_of_two_workers_by_hand(name):
    """n = 2, W all 1/2, one coordinate, x = (1, 3), g = (1, -1) then (2, 0): plain fractions."""
    eta, beta, mu = 0.5, 0.5, 0.5
    a = algorithms.get(name, lr=eta, **({} if name == "dsgd" else {"momentum": beta}))
    if name.startswith("qg"):
        a = algorithms.get(name, lr=eta, momentum=beta, qg_momentum=mu)
    opt = StackedOptimizer(torch.tensor([[1.0], [3.0]], dtype=F64), topology.complete(2), a)
    # Step 1: every method moves by g (heavy ball) or (1 + beta) g (Nesterov); both workers meet at 2.
    opt.step(torch.tensor([[1.0], [-1.0]], dtype=F64))
    assert opt.x.flatten().tolist() == [2.0, 2.0]
    # Step 2 with g = (2, 0): mean direction of each method, times eta = 1/2.
    #   dsgd: (2 + 0)/2 = 1. dsgdm: m = .5 m + g = (2.5, -.5), mean 1. dsgdm_n: g + .5 m = (3.25, -.25), mean 1.5.
    #   qg: m_hat = .5 (x_old - 2)/.5 = (-1, 1): m = .5 m_hat + g = (1.5, .5), mean 1;
    #   -N: g + .5 m = (2.75, .25), mean 1.5.
    opt.step(torch.tensor([[2.0], [0.0]], dtype=F64))
    mean_direction = 1.5 if name.endswith("_n") else 1.0
    assert opt.x.flatten().tolist() == [2 - eta * mean_direction] * 2
    buffers = {
        "dsgd": None,
        "dsgdm": [2.5, -0.5],
        "dsgdm_n": [2.5, -0.5],
        "qg_dsgdm": [0.5 * -1 + 0.5 * 1.0, 0.5 * 1 + 0.5 * 1.0],
        "qg_dsgdm_n": [0.5 * -1 + 0.5 * 1.5, 0.5 * 1 + 0.5 * 1.5],
    }
    if buffers[name] is not None:
        assert next(iter(opt.state.values())).flatten().tolist() == buffers[name]


@pytest.mark.parametrize("name", ["dsgdm", "dsgdm_n"])
def test_complete_graph_equals_centralised_sgd_momentum(name):
    problem = Quadratics()
    opt = run(name, problem, topology.complete(8), 30, lr=0.05, momentum=0.9, weight_decay=0.01)
    parameter = torch.zeros(3, dtype=F64, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=0.05, momentum=0.9, nesterov=name == "dsgdm_n", weight_decay=0.01)
    for _ in range(30):
        parameter.grad = problem.gradient(parameter.detach().expand(8, 3)).mean(0)
        sgd.step()
    torch.testing.assert_close(opt.x, parameter.detach().expand(8, 3), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["dsgdm", "dsgdm_n"])
def test_zero_momentum_is_dsgd(name):
    problem, topo = Quadratics(), topology.ring(8)
    assert torch.equal(run(name, problem, topo, 25, lr=0.05, momentum=0.0).x, run("dsgd", problem, topo, 25, lr=0.05).x)


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].graph is topology.ring])
def test_permuting_the_workers_permutes_the_result(name):
    problem, order = Quadratics(n=6), torch.tensor([3, 0, 5, 1, 4, 2])
    w = topology.erdos_renyi(6, 0.8, seed=1).matrix()
    permuted = Quadratics(n=6)
    permuted.a, permuted.b = problem.a[order], problem.b[order]
    hyper = ROWS[name].hyper
    straight = run(name, problem, topology.from_matrix(w), 20, **hyper)
    shuffled = run(name, permuted, topology.from_matrix(w[np.ix_(order, order)]), 20, **hyper)
    torch.testing.assert_close(shuffled.x, straight.x[order], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["dsgdm", "dsgdm_n"])
def test_centralised_methods_equal_local_momentum_on_the_complete_graph(name):
    same_path((f"c{name[1:]}", {"lr": 0.02}), (name, {"lr": 0.02}), RING, other_topology=topology.complete(8))


def test_centralised_adam_is_torch_adam_on_the_mean_gradient():
    problem = Quadratics()
    opt = run("cadam", problem, RING, 30, lr=0.05, weight_decay=0.01)
    parameter = torch.zeros(3, dtype=F64, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=0.05, weight_decay=0.01)
    for _ in range(30):
        parameter.grad = problem.gradient(parameter.detach().expand(8, 3)).mean(0)
        adam.step()
    torch.testing.assert_close(opt.x, parameter.detach().expand(8, 3), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:d2.*eigenvalue")
def test_d2_plus_is_d2_for_constant_lr_only():
    topo, hyper = RING, {"lr": 0.05}
    same_path(("d2", hyper), ("d2_plus", hyper), topo)
    problem = Quadratics()
    opts = [StackedOptimizer(torch.zeros_like(problem.a), topo, name, **hyper) for name in ("d2", "d2_plus")]
    for t in range(3000):
        for opt in opts:
            opt.step(problem.gradient(opt.x), lr=0.05 if t < 200 else 0.005)
    errors = [(opt.x - problem.optimum).abs().max().item() for opt in opts]
    assert errors[1] < 0.01 * errors[0]


@pytest.mark.filterwarnings("ignore:d2.*eigenvalue")
def test_d2_is_dsgd_with_a_correction_of_its_last_step():
    """x+ = W (x + u + c), c+ = x+ - x - u with u = -lr g."""
    problem, w = Quadratics(), torch.tensor(RING.matrix())
    opt = StackedOptimizer(torch.zeros_like(problem.a), RING, "d2", lr=0.05)
    x = c = torch.zeros_like(problem.a)
    for _ in range(30):
        opt.step(problem.gradient(opt.x))
        u = -0.05 * problem.gradient(x)
        new = w @ (x + u + c)
        x, c = new, new - x - u
        torch.testing.assert_close(opt.x, x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "topo", "hyper"),
    [
        ("relaysgd", topology.chain(8), {"lr": 0.02, "momentum": 0.5, "fill": "current"}),
        ("relaysgd", topology.double_binary_trees(8), {"lr": 0.02, "momentum": 0.5}),
        ("momentum_tracking", RING, {"lr": 0.005, "momentum": 0.6, "init": "zero"}),
    ],
    ids=["relaysgd-current", "relaysgd-two-trees", "momentum_tracking-zero"],
)
def test_other_starts_and_trees_reach_the_optimum_too(name, topo, hyper):
    problem = Quadratics()
    opt = run(name, problem, topo, 4000, **hyper)
    torch.testing.assert_close(opt.x, problem.optimum.expand_as(opt.x), rtol=0, atol=1e-9)


def test_exact_diffusion_is_d2_with_lazy_mixing():
    lazy = topology.from_matrix((np.eye(8) + RING.matrix()) / 2)
    same_path(("exact_diffusion", {"lr": 0.05}), ("d2", {"lr": 0.05}), RING, other_topology=lazy)


def test_d2_warns_where_it_may_diverge_and_exact_diffusion_does_not():
    problem = Quadratics(n=32)
    for topo in (topology.social(), topology.ring(32)):
        with pytest.warns(UserWarning, match="smallest eigenvalue is above -1/3.* exact_diffusion is stable there"):
            StackedOptimizer(torch.zeros_like(problem.a), topo, "d2", lr=0.05)
    with pytest.warns(UserWarning, match="may diverge"):
        diverged = run("d2", problem, topology.social(), 300, lr=0.05)
    assert not (diverged.x.abs().max() < 1e6)
    stable = run("exact_diffusion", problem, topology.social(), 4000, lr=0.05)
    assert (stable.x - problem.optimum).abs().max() < 1e-9


def test_momentum_tracking_without_momentum_is_gradient_tracking():
    same_path(
        ("momentum_tracking", {"lr": 0.02, "momentum": 0.0, "init": "zero"}), ("gradient_tracking", {"lr": 0.02}), RING
    )


def test_momentum_tracking_mean_is_centralised_heavy_ball_and_corrections_sum_to_zero():
    problem = Quadratics()
    opt = StackedOptimizer(torch.zeros_like(problem.a), RING, "momentum_tracking", lr=0.01)
    mean, m = torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)
    for _ in range(40):
        g = problem.gradient(opt.x)
        m = 0.9 * m + g.mean(0)
        mean = mean - 0.01 * m
        opt.step(g)
        torch.testing.assert_close(opt.x.mean(0), mean, rtol=1e-11, atol=1e-12)
        assert opt.state["correction"].sum(0).abs().max() < 1e-10


@pytest.mark.parametrize(
    "name", ["gradient_tracking", "gradient_tracking_atc", "gradient_tracking_m", "gradient_tracking_m_n"]
)
def test_tracked_gradients_have_the_mean_of_the_gradients(name):
    problem = Quadratics()
    opt = StackedOptimizer(torch.zeros_like(problem.a), RING, name, lr=0.01)
    for _ in range(40):
        opt.step(problem.gradient(opt.x))
        # y_next = correction + g_next: its mean is that of g_next if the corrections sum to zero.
        assert opt.state["correction"].sum(0).abs().max() < 1e-11


def test_damsgrad_tracks_the_mean_second_moment():
    problem = Quadratics()
    opt = StackedOptimizer(torch.zeros_like(problem.a), RING, "damsgrad", lr=0.01)
    for _ in range(40):
        opt.step(problem.gradient(opt.x))
        torch.testing.assert_close(
            opt.state["tracked_sq"].mean(0), opt.state["max_exp_avg_sq"].mean(0), rtol=1e-12, atol=1e-13
        )


def test_slowmo_without_slow_momentum_is_exact_averaging():
    problem, w = Quadratics(), torch.tensor(RING.matrix())
    opt = StackedOptimizer(torch.zeros_like(problem.a), RING, "slowmo", lr=0.02, slowmo_period=4, slowmo_momentum=0.0)
    x, m = torch.zeros_like(problem.a), torch.zeros_like(problem.a)
    for t in range(20):
        opt.step(problem.gradient(opt.x))
        g = problem.gradient(x)
        m = 0.9 * m + g
        x = w @ (x - 0.02 * (g + 0.9 * m))
        if t % 4 == 0:
            x = x.mean(0).expand_as(x).clone()
        torch.testing.assert_close(opt.x, x, rtol=1e-11, atol=1e-12)


def test_push_sum_on_doubly_stochastic_graphs_is_dsgd_and_quasi_global_momentum():
    for topo in (RING, topology.exponential(8), topology.one_peer_exponential(8)):
        same_path(("sgp", {"lr": 0.05}), ("dsgd", {"lr": 0.05}), topo)
        same_path(("sgp", {"lr": 0.01, "momentum": 0.8}), ("dsgdm", {"lr": 0.01, "momentum": 0.8}), topo)
        quasi = {"lr": 0.05, "momentum": 0.8}
        same_path(("qg_sgp", quasi), ("qg_dsgdm_n", {**quasi, "qg_momentum": 0.8}), topo)


@pytest.mark.parametrize("name", ["sgp", "qg_sgp"])
def test_push_sum_agrees_on_the_mean_over_directed_graphs(name):
    directed = topology.random_directed(8, 0.3, seed=1)
    assert not directed.is_doubly_stochastic
    varying = topology.from_sequence([topology.random_directed(8, 0.2, seed=s) for s in range(3)])
    for topo in (directed, varying):
        opt = StackedOptimizer(torch.eye(8, dtype=F64), topo, name, lr=0.1, momentum=0.0)
        for _ in range(200):
            opt.step(torch.zeros(8, 8, dtype=F64))
            assert opt.scalars["push_sum_weight"].sum().item() == pytest.approx(8, abs=1e-10)
        torch.testing.assert_close(opt.x, torch.full((8, 8), 1 / 8, dtype=F64), rtol=1e-9, atol=1e-10)
        assert (opt.scalars["push_sum_weight"] - 1).abs().max() > 0.05
    problem = Quadratics()
    if name == "sgp":  # qg_sgp weighs what gossip moved by 1 / w, so its mean drifts where weights differ
        opt = run(name, problem, directed, 4000, lr=0.002)
        assert (opt.x - problem.optimum).abs().max() < 0.1
    with pytest.raises(ValueError, match="dsgd needs a doubly stochastic mixing matrix.*sgp and qg_sgp"):
        StackedOptimizer(torch.zeros(8, 3), directed, "dsgd", lr=0.1)


@pytest.mark.parametrize("name", ["sgp", "qg_sgp"])
def test_push_sum_on_a_directed_graph_equals_the_reference(name):
    problem, topo = Quadratics(), topology.random_directed(8, 0.3, seed=1)
    for extra in ({}, {"gamma": 0.6, "weight_decay": 0.01, "momentum": 0.7}):
        algorithm = algorithms.get(name, lr=0.05, **extra)
        opt = StackedOptimizer(torch.ones_like(problem.a), topo, algorithm)
        x, state = torch.ones_like(problem.a), reference.initial_state(algorithm, torch.ones_like(problem.a))
        for t in range(12):
            lr = 0.05 if t < 6 else 0.005
            opt.step(problem.gradient(opt.x), lr=lr)
            x, state = reference.step(algorithm, x, problem.gradient(x), state, torch.tensor(topo.matrix()), t, lr)
        torch.testing.assert_close(opt.x, x, rtol=1e-12, atol=1e-13)


def test_choco_without_compression_is_dsgd_in_either_order():
    plain = {"lr": 0.05, "gamma": 1.0, "compressor": "none"}
    same_path(("choco_sgd", plain), ("dsgd", {"lr": 0.05}), RING)
    problem = Quadratics()
    cta = run("choco_sgd", problem, RING, 1, **plain, order="cta")
    combining = StackedOptimizer(cta.x.clone(), RING, "dsgd_cta", lr=0.05)  # the first step does not mix
    for _ in range(30):
        cta.step(problem.gradient(cta.x))
        combining.step(problem.gradient(combining.x))
        torch.testing.assert_close(cta.x, combining.x, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="choco_sgd needs a static topology"):
        StackedOptimizer(torch.zeros(8, 3), topology.one_peer_exponential(8), "choco_sgd", lr=0.1)


def test_bytes_sent_are_counted_for_every_algorithm():
    for name, row in ROWS.items():
        topo = row.graph(row.n)
        opt = StackedOptimizer(torch.zeros(row.n, 100), topo, name, lr=0.1)
        opt.step(torch.ones_like(opt.x))
        wanted = row.bytes_sent or opt.algorithm.messages * topo.mixing().num_links * 400
        assert opt.bytes_sent_per_step == opt.bytes_sent == wanted, name


@pytest.mark.parametrize(
    ("name", "hyper", "error", "message"),
    [
        ("qg_dsgdm_m", {"lr": 0.1}, ValueError, "algorithm 'qg_dsgdm_m' is not known, did you mean 'qg_dsgdm"),
        ("adamw", {"lr": 0.1}, ValueError, "algorithm 'adamw' is not known, "),
        ("dsgd", {}, TypeError, "dsgd needs lr"),
        ("dsgd", {"lr": -1.0}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
        ("dsgd", {"lr": float("nan")}, ValueError, "lr must be a finite number of at least 0, got nan"),
        ("dsgd", {"lr": "fast"}, ValueError, "lr must be a finite number of at least 0, got 'fast'"),
        ("dsgd", {"lr": 0.1, "momentum": 0.9}, TypeError, "dsgd has no hyper-parameter 'momentum'"),
        ("dsgdm", {"lr": 0.1, "momentun": 0.9}, TypeError, "did you mean 'momentum'"),
        ("dsgdm", {"lr": 0.1, "momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ("qg_dsgdm", {"lr": 0.1, "qg_momentum": 1.1}, ValueError, r"qg_momentum must be in \[0, 1\], got 1.1"),
        ("qg_dsgdm", {"lr": 0.1, "local_step": 0}, ValueError, "local_step must be an integer of at least 1, got 0"),
        ("dsgd", {"lr": 0.1, "weight_decay": float("inf")}, ValueError, "weight_decay must be a finite number"),
    ],
)
def test_wrong_hyper_parameters_are_named(name, hyper, error, message):
    with pytest.raises(error, match=message):
        algorithms.get(name, **hyper)


def test_a_taken_name_can_not_be_registered_again():
    with pytest.raises(ValueError, match="'dsgd' is already taken by qgm_ext.algorithms.dsgd.Dsgd"):

        @algorithms.register
        class Other(algorithms.Algorithm):
            name = "dsgd"
