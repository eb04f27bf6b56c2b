"""GUT and QG-GUTm against their equations, their fixed points, and where their gossip diverges."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from qgm_ext import StackedOptimizer, algorithms, topology
from quadratic_runs import F64, RING, run
from rows.base import Quadratics
from rows.gut import gut_point


def test_gut_without_tracking_takes_the_gradient_at_the_mixed_point():
    problem, w = Quadratics(), torch.tensor(RING.matrix())
    opt = StackedOptimizer(torch.zeros_like(problem.a), RING, "gut", lr=0.05, scaling=0.0)
    p = torch.zeros_like(problem.a)
    for _ in range(30):
        opt.step(problem.gradient(opt.x))
        p = w @ p - 0.05 * problem.gradient(w @ p)
        torch.testing.assert_close(opt.x, w @ p, rtol=1e-12, atol=1e-13)
    # The second momentum rule of those codes: y+ = W (y - eta g(y)) + beta (y - y_prev).
    opt = StackedOptimizer(torch.zeros_like(problem.a), RING, "qg_gutm", lr=0.05, scaling=0.0, momentum=0.9)
    y = y_before = torch.zeros_like(problem.a)
    for _ in range(30):
        opt.step(problem.gradient(opt.x))
        y, y_before = w @ (y - 0.05 * problem.gradient(y)) + 0.9 * (y - y_before), y
        torch.testing.assert_close(opt.x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.filterwarnings("ignore:qg_gutm.*diverges")
@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("name", ["gut", "qg_gutm", "qg_gutm_n"])
def test_gut_follows_its_equations_in_terms_of_own_models(name, gamma):
    """The authors' order: mix what has been received, take the gradient there, then move the own model."""
    problem, w, mu, wd = Quadratics(), torch.tensor(RING.matrix()), 0.3, 0.01
    beta, b = {"gut": (0.0, 1.0), "qg_gutm": (0.8, 1.8), "qg_gutm_n": (0.8, 1.8 + 0.64)}[name]
    hyper = {} if name == "gut" else {"momentum": beta, "nesterov": name == "qg_gutm_n"}
    base = name.removesuffix("_n")
    opt = StackedOptimizer(
        torch.ones_like(problem.a), RING, base, lr=0.05, scaling=mu, gamma=gamma, weight_decay=wd, **hyper
    )
    p = before = torch.ones_like(problem.a)
    delta_before = m = torch.zeros_like(p)
    lr_before = 0.05
    for t in range(12):
        lr = 0.05 if t < 6 else 0.005
        r = w @ p - p
        x = p + gamma * r
        torch.testing.assert_close(opt.x, x, rtol=1e-11, atol=1e-12)
        delta = problem.gradient(x) + wd * x - r / lr_before
        y = delta - mu / lr_before * (w @ (p - before) + b * (w @ before - before)) - mu * delta_before
        m = beta * m + y
        d = {"gut": y, "qg_gutm": m, "qg_gutm_n": y + beta * m}[name]
        opt.step(problem.gradient(opt.x), lr=lr)
        p, before, delta_before, lr_before = p - lr * d + (gamma - gamma**2) * r, p, delta, lr


@pytest.mark.parametrize(("gamma", "beta"), [(0.7, None), (0.6, 0.9)])
def test_gut_with_partial_averaging_has_the_fixed_point_of_its_equations(gamma, beta):
    problem, w = Quadratics(), torch.tensor(RING.matrix())
    name, mu, b = ("gut", 0.3, 1.0) if beta is None else ("qg_gutm", 0.06, 1.0 + beta)
    opt = run(name, problem, RING, 4000, lr=0.01, scaling=mu, gamma=gamma)
    expected = gut_point(0.01, mu, b, gamma, beta or 0.0)(problem, w)
    torch.testing.assert_close(opt.x, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("hyper", "limit"),
    [({}, -0.357), ({"gamma": 0.9}, -0.315), ({"momentum": 0.9, "nesterov": True}, -0.452), ({"momentum": 0.9}, None)],
    ids=["gut", "gut-0.9", "qg_gutm_n", "qg_gutm"],
)
def test_gut_knows_where_its_gossip_diverges(hyper, limit):
    name = "qg_gutm" if "momentum" in hyper else "gut"
    algorithm = algorithms.get(name, lr=0.1, **hyper)
    grows = [algorithm.gossip_growth(value) > 1 + 1e-6 for value in np.linspace(-1.0, 0.999, 2000)]
    assert sum(grows) == pytest.approx(0 if limit is None else 1000 * (1 + limit), abs=3)
    if limit is not None:
        assert algorithm.gossip_growth(limit - 0.005) > 1 + 1e-6
        assert algorithm.gossip_growth(limit + 0.005) < 1 + 1e-9
    social, start = topology.social(), torch.ones(32, 4, dtype=F64)
    diverges = limit is not None and limit > social.lambda_n
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = StackedOptimizer(start, social, algorithm)
    assert [f"{name} with scaling" in str(warning.message) for warning in caught] == [True] * diverges
    # A small push apart, then gossip alone: it grows without bound, or dies away.
    opt.step(torch.randn(32, 4, dtype=F64, generator=torch.Generator().manual_seed(0)), lr=0.1)
    for _ in range(3000):
        opt.step(torch.zeros_like(start))
    assert bool(opt.x.isfinite().all() and opt.consensus_distance() < 1e-6) != diverges
