"""CCL: which simpler methods it equals, where its gossip diverges, what its terms do and what they need."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cross_gradient_runs import ROWS, STEPS, advance, assert_equals_slow_text, plain_mlp, simulator
from qgm_ext import algorithms, models, topology
from rows.slow import CLASSES, F64, FEATURES, batches, flat, smooth_mlp
from simulator_runs import everything


@pytest.mark.parametrize("topo", [topology.ring(5), topology.torus(9)], ids=lambda t: t.name)
def test_ccl_with_heavy_ball_and_no_terms_is_quasi_global_momentum_with_mu_zero(topo):
    ccl = simulator("ccl", topo, nesterov=False, lambda_m=0.0, lambda_d=0.0, weight_decay=0.01, momentum=0.8)
    plain = simulator("qg_dsgdm", topo, weight_decay=0.01, momentum=0.8, qg_momentum=0.0)
    advance(ccl, STEPS), advance(plain, STEPS)
    torch.testing.assert_close(ccl.opt.x, plain.opt.x, rtol=1e-11, atol=1e-12)


def test_ccl_with_nesterov_is_not_quasi_global_momentum_with_mu_zero():
    ccl = simulator("ccl", topology.ring(5), lambda_m=0.0, lambda_d=0.0)
    plain = simulator("qg_dsgdm_n", topology.ring(5), qg_momentum=0.0)
    advance(ccl, STEPS), advance(plain, STEPS)
    assert (ccl.opt.x - plain.opt.x).abs().max() > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
def test_ccl_without_momentum_and_terms_takes_the_gradient_at_the_mixed_point(nesterov):
    ccl = simulator("ccl", topology.ring(5), lambda_m=0.0, lambda_d=0.0, momentum=0.0, nesterov=nesterov)
    plain = simulator("dsgd", topology.ring(5))
    advance(ccl, STEPS), advance(plain, STEPS)
    torch.testing.assert_close(ccl.opt.x, plain.opt.x, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("factor", [0.97, 1.02])
def test_ccl_warns_where_its_gossip_diverges(nesterov, factor):
    """Below and above the limit that the smallest eigenvalue of the social network sets for gamma; no gradients."""
    limit = algorithms.get("ccl", lr=0.1, nesterov=nesterov).stable_above
    gamma = factor * (1 - limit) / (1 - topology.social().lambda_n)
    hyper = {"lambda_m": 0.0, "lambda_d": 0.0, "nesterov": nesterov, "gamma": gamma}
    model = nn.Sequential(nn.Linear(1, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sim = simulator("ccl", topology.social(), model=model.to(F64), **hyper)
    assert ["diverges on topology 'social'" in str(warning.message) for warning in caught] == [True] * (factor > 1)
    with torch.no_grad():
        for k, worker in enumerate(sim.models):
            worker[0].weight += (-1.0) ** k
    for _ in range(150):
        sim.step_closure(lambda model, batch: 0.0 * model[0].weight.sum(), [None] * 32)
    before = sim.consensus_distance()
    for _ in range(50):
        sim.step_closure(lambda model, batch: 0.0 * model[0].weight.sum(), [None] * 32)
    assert (sim.consensus_distance() > before) == (factor > 1)


def test_ccl_pulls_features_together():
    def spread(**hyper):
        sim = simulator("ccl", topology.ring(8), model=plain_mlp(), momentum=0.5, gamma=0.2, **hyper)
        for t in range(40):
            sim.step(F.cross_entropy, batches(t, 8), lr=0.1)
        x = batches(0, 8)[0].flatten(0, 1)
        return torch.stack([model[:-1](x).detach() for model in sim.models]).std(0).mean()

    assert spread(lambda_m=1.0, lambda_d=0.0) < 0.8 * spread(lambda_m=0.0, lambda_d=0.0)


def test_ccl_takes_workers_without_neighbours_and_batches_of_different_sizes():
    topo = topology.random_matching(5, seed=1)
    sims = [simulator("ccl", topo, engine, plain_mlp()) for engine in ("loop", "threads")]
    sims.append(simulator("ccl", topo, "vmap", plain_mlp()))
    for t in range(3):
        pairs = [(x[: 2 + i], y[: 2 + i]) for i, (x, y) in enumerate(zip(*batches(t, 5), strict=True))]
        for sim in sims[:2]:
            sim.step(F.cross_entropy, pairs)
        sims[2].step(F.cross_entropy, batches(t, 5))
    torch.testing.assert_close(sims[0].opt.x, sims[1].opt.x, rtol=1e-9, atol=1e-11)
    alone = simulator("ccl", topology.ring(1), lambda_m=0.5)
    advance(alone, 3)
    assert_equals_slow_text(alone, ROWS["ccl"], alone.opt.algorithm, [flat(smooth_mlp().parameters())], 3)


def test_ccl_says_what_it_needs_of_models_and_batches():
    with pytest.raises(ValueError, match="Sequential does not say which layer's output are its features"):
        simulator("ccl", topology.ring(3), model=nn.Sequential(nn.Linear(FEATURES, CLASSES)).to(F64))
    x, y = batches(0, 3)
    sim = simulator("ccl", topology.ring(3))
    before = everything(sim)
    y[1, 0] = -100
    with pytest.raises(ValueError, match=r"classes must be in \[0, 3\), the batch of worker 1 has -100 to"):
        sim.step(F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match=r"needs batches \(inputs, classes \[B\] of integers\), that of worker 0"):
        sim.step_closure(lambda model, batch: model(batch["x"]).square().mean(), [{"x": part} for part in x])
    model = models.declare_feature_layer(nn.Sequential(smooth_mlp(), nn.Unflatten(1, (3, 1))), "0.4")
    deep = simulator("ccl", topology.ring(3), model=model)
    with pytest.raises(ValueError, match=r"needs a model that returns class scores \[B, C\], got \[6, 3, 1\]"):
        deep.step(lambda z, y: z.square().mean(), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(everything(sim), before, strict=True))
    sim = simulator("ccl", topology.ring(3), lambda_d=0.0)
    sim.step_closure(lambda model, batch: model(batch["x"]).square().mean(), [{"x": part} for part in x])
    assert sim.num_steps == 1
