"""Quasi-global momentum: which simpler methods it equals, its mean over the workers, how it averages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qgm_ext import StackedOptimizer, topology
from quadratic_runs import F64, RING, run, same_path
from rows.base import Quadratics


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


def test_quasi_global_momentum_on_the_complete_graph_is_momentum_sgd_for_mu_zero_only():
    complete, hyper = topology.complete(8), {"lr": 0.02, "momentum": 0.8}
    same_path(("qg_dsgdm", {**hyper, "qg_momentum": 0.0}), ("csgdm", hyper), complete)
    other = run("qg_dsgdm", Quadratics(), complete, 30, **hyper, qg_momentum=0.5)
    assert (other.x - run("csgdm", Quadratics(), complete, 30, **hyper).x).abs().max() > 1e-3


def test_decentlam_has_the_fixed_point_of_quasi_global_momentum():
    problem = Quadratics()
    a = run("decentlam", problem, RING, 4000, lr=0.05, momentum=0.6)
    b = run("qg_dsgdm", problem, RING, 4000, lr=0.05, momentum=0.6)
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-9)
