"""Every algorithm against the facts that hold for it: reductions, fixed points, means, hand-made cases.

The facts are those of the papers and of linear algebra: a method with its knobs at zero is a simpler one; its fixed
point under constant step size is known; a doubly stochastic matrix preserves the mean. An algorithm without a row in
ROWS fails here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from qgm_ext import StackedOptimizer, algorithms, reference, topology

F64 = torch.float64


@dataclass(frozen=True)
class Row:
    """What is known of an algorithm: hyper-parameters to test with, and the lr of the DSGD whose fixed point it has."""

    hyper: dict[str, float]
    same_fixed_point_as_dsgd_with_lr: float


# On quadratics: momentum amplifies DSGD's bias by 1 / (1 - beta); quasi-global momentum does not, because its buffer
# vanishes where x stands still (with Nesterov's form the step there is (1 + beta) g).
ROWS: dict[str, Row] = {
    "dsgd": Row({"lr": 0.05}, 0.05),
    "dsgdm": Row({"lr": 0.01, "momentum": 0.8}, 0.01 / (1 - 0.8)),
    "dsgdm_n": Row({"lr": 0.01, "momentum": 0.8}, 0.01 / (1 - 0.8)),
    "qg_dsgdm": Row({"lr": 0.05, "momentum": 0.9, "qg_momentum": 0.8}, 0.05),
    "qg_dsgdm_n": Row({"lr": 0.05, "momentum": 0.9, "qg_momentum": 0.8}, 0.05 * 1.9),
}


class Quadratics:
    """f_i(x) = sum_d a_id x_d^2 / 2 - b_id x_d with a ~ U(0.5, 2), b ~ 2 N(0, 1): heterogeneous, optimum known."""

    def __init__(self, n: int = 8, dim: int = 3, seed: int = 0) -> None:
        rng = np.random.RandomState(seed)
        self.a = torch.tensor(rng.uniform(0.5, 2.0, (n, dim)))
        self.b = torch.tensor(2 * rng.randn(n, dim))

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * x - self.b

    @property
    def optimum(self) -> torch.Tensor:
        return self.b.mean(0) / self.a.mean(0)

    def dsgd_fixed_point(self, w: torch.Tensor, lr: float) -> torch.Tensor:
        """x = W (x - lr (a x - b)), solved coordinate by coordinate."""
        eye = torch.eye(len(w), dtype=F64)
        columns = [
            torch.linalg.solve(eye - w @ (eye - lr * torch.diag(self.a[:, d])), lr * w @ self.b[:, d])
            for d in range(self.a.shape[1])
        ]
        return torch.stack(columns, 1)


def run(name: str, problem: Quadratics, topo: topology.Topology, steps: int, **hyper: Any) -> StackedOptimizer:
    opt = StackedOptimizer(torch.zeros_like(problem.a), topo, name, **hyper)
    for _ in range(steps):
        opt.step(problem.gradient(opt.x))
    return opt


def test_every_algorithm_has_a_row_and_a_reference():
    by_gradients = {name for name in algorithms.names() if not algorithms.get_class(name).needs_simulator}
    assert set(ROWS) == by_gradients == set(reference.STEPS)


@pytest.mark.parametrize("name", ROWS)
def test_heterogeneous_quadratic_reaches_the_predicted_point(name):
    problem, topo, row = Quadratics(), topology.ring(8), ROWS[name]
    opt = run(name, problem, topo, 4000, **row.hyper)
    expected = problem.dsgd_fixed_point(torch.tensor(topo.matrix()), row.same_fixed_point_as_dsgd_with_lr)
    torch.testing.assert_close(opt.x, expected, rtol=0, atol=1e-9)
    assert (expected - problem.optimum).abs().max() > 0.1  # the point is biased, not the optimum
    start = problem.optimum.abs().max()
    assert (opt.x.mean(0) - problem.optimum).abs().max() < 0.5 * start


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("drop", [False, True], ids=["constant-lr", "lr-drop"])
@pytest.mark.parametrize(
    "topo", [topology.ring(8), topology.complete(8), topology.one_peer_exponential(8)], ids=lambda t: t.name
)
def test_twelve_steps_equal_the_reference(name, drop, topo):
    problem = Quadratics()
    for extra in ({}, {"weight_decay": 0.01}) + (({"local_step": 3},) if name.startswith("qg") else ()):
        algorithm = algorithms.get(name, **{**ROWS[name].hyper, **extra})
        opt = StackedOptimizer(torch.ones_like(problem.a), topo, algorithm)
        x, state = torch.ones_like(problem.a), reference.initial_state(algorithm, problem.a)
        for t in range(12):
            lr = algorithm.lr * (0.1 if drop and t >= 6 else 1.0)
            opt.step(problem.gradient(opt.x), lr=lr)
            x, state = reference.step(algorithm, x, problem.gradient(x), state, torch.tensor(topo.matrix(t)), t, lr)
        torch.testing.assert_close(opt.x, x, rtol=1e-12, atol=1e-13)
        assert opt.state.keys() == state.keys()
        for key, vector in opt.state.items():
            torch.testing.assert_close(vector, state[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
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


def qhm(gradient: Any, theta: torch.Tensor, steps: int, alpha: float, b: float, nu: float) -> torch.Tensor:
    """Quasi-hyperbolic momentum (Ma, Yarats 2019): s <- b s + (1 - b) g; theta <- theta - alpha ((1 - nu) g + nu s)."""
    s = torch.zeros_like(theta)
    for _ in range(steps):
        g = gradient(theta)
        s = b * s + (1 - b) * g
        theta = theta - alpha * ((1 - nu) * g + nu * s)
    return theta


@pytest.mark.parametrize(("beta", "mu"), [(0.9, 0.9), (0.9, 0.5), (0.6, 0.99)])
@pytest.mark.parametrize("name", ["qg_dsgdm", "qg_dsgdm_n"])
@pytest.mark.parametrize("topo", [topology.ring(1), topology.complete(8)], ids=["one-worker", "complete-graph"])
def test_quasi_global_momentum_alone_or_on_the_complete_graph_is_qhm(name, beta, mu, topo):
    problem = Quadratics(n=topo.num_workers)
    opt = run(name, problem, topo, 40, lr=0.02, momentum=beta, qg_momentum=mu)
    power = beta if name == "qg_dsgdm" else beta**2
    b = mu + (1 - mu) * power
    expected = qhm(
        lambda theta: problem.gradient(theta.expand_as(problem.a)).mean(0),
        torch.zeros(3, dtype=F64), 40, alpha=0.02 / (1 - beta), b=b, nu=power / b,
    )  # fmt: skip
    torch.testing.assert_close(opt.x, expected.expand_as(opt.x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["qg_dsgdm", "qg_dsgdm_n"])
def test_quasi_global_momentum_with_zero_momentum_is_dsgd(name):
    problem, topo = Quadratics(), topology.social()
    problem = Quadratics(n=32)
    quasi = run(name, problem, topo, 25, lr=0.05, momentum=0.0, weight_decay=0.01)
    plain = run("dsgd", problem, topo, 25, lr=0.05, weight_decay=0.01)
    assert torch.equal(quasi.x, plain.x)


@pytest.mark.parametrize("name", ["dsgdm", "dsgdm_n"])
def test_zero_momentum_is_dsgd(name):
    problem, topo = Quadratics(), topology.ring(8)
    assert torch.equal(run(name, problem, topo, 25, lr=0.05, momentum=0.0).x, run("dsgd", problem, topo, 25, lr=0.05).x)


@pytest.mark.parametrize("name", ["qg_dsgdm", "qg_dsgdm_n"])
def test_mean_obeys_the_single_worker_recursion_on_any_graph(name):
    problem = Quadratics(n=32)
    opt = StackedOptimizer(torch.zeros_like(problem.a), topology.social(), name, lr=0.05)
    single = StackedOptimizer(torch.zeros(1, 3, dtype=F64), topology.ring(1), name, lr=0.05)
    for _ in range(50):
        g = problem.gradient(opt.x)
        opt.step(g)
        single.step(g.mean(0, keepdim=True))
        torch.testing.assert_close(opt.x.mean(0), single.x[0], rtol=1e-11, atol=1e-12)


def consensus_error(n: int, name: str, steps: int) -> float:
    """Squared distance to the mean after gossip steps with g = 0 on a ring, relative to the start.

    The start is the identity matrix: every eigenvector of W has the same share in it.
    """
    x = torch.eye(n, dtype=F64)
    centre, zero = x.mean(0), torch.zeros_like(x)
    opt = StackedOptimizer(x, topology.ring(n), name, lr=0.1)
    for _ in range(steps):
        opt.step(zero)
    return float((opt.x - centre).square().sum() / (n - 1))


@pytest.mark.parametrize("steps", [10, 50, 100])
@pytest.mark.parametrize("n", [16, 64])
def test_consensus_averaging_decays_as_its_eigenvalues_say(n, steps):
    """Per eigenvalue l of W: x <- l x - l beta m, m <- (1 - mu)(1 - l) x + (mu + (1 - mu) l beta) m."""
    beta = mu = 0.9
    eigenvalues = np.linalg.eigvalsh(topology.ring(n).matrix())[:-1]
    modes = [
        np.linalg.matrix_power(np.array([[e, -e * beta], [(1 - mu) * (1 - e), mu + (1 - mu) * e * beta]]), steps)[0, 0]
        for e in eigenvalues
    ]
    assert consensus_error(n, "qg_dsgdm", steps) == pytest.approx(np.square(modes).mean(), rel=1e-9)
    assert consensus_error(n, "dsgd", steps) == pytest.approx((eigenvalues ** (2 * steps)).mean(), rel=1e-9)


def test_quasi_global_momentum_speeds_up_consensus_on_long_rings_only():
    assert consensus_error(16, "qg_dsgdm", 10) < consensus_error(16, "dsgd", 10)
    assert consensus_error(16, "qg_dsgdm", 100) > 10 * consensus_error(16, "dsgd", 100)
    assert consensus_error(64, "qg_dsgdm", 500) < 0.01 * consensus_error(64, "dsgd", 500)


@pytest.mark.parametrize("name", ROWS)
def test_permuting_the_workers_permutes_the_result(name):
    problem, order = Quadratics(n=6), torch.tensor([3, 0, 5, 1, 4, 2])
    w = topology.erdos_renyi(6, 0.8, seed=1).matrix()
    permuted = Quadratics(n=6)
    permuted.a, permuted.b = problem.a[order], problem.b[order]
    hyper = ROWS[name].hyper
    straight = run(name, problem, topology.from_matrix(w), 20, **hyper)
    shuffled = run(name, permuted, topology.from_matrix(w[np.ix_(order, order)]), 20, **hyper)
    torch.testing.assert_close(shuffled.x, straight.x[order], rtol=1e-12, atol=1e-13)


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
