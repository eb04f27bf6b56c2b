"""The algorithms that take gradients elsewhere, against slow texts of their equations, one worker after the other.

The texts are in rows, beside what else is known of each algorithm. More on CCL is in test_ccl.py.
"""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgm_ext as qgm
from cross_gradient_runs import ROWS, STEPS, advance, assert_equals_slow_text, plain_mlp, rows_of, simulator
from qgm_ext import algorithms, topology
from qgm_ext.cross_gradients import Links
from qgm_ext.cross_optimizer import CrossOptimizer
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.train import run as train
from qgm_ext.stacked import NonFiniteGradientError
from rows.base import Quadratics
from rows.slow import F64, LR, batches, flat, lr_at, smooth_mlp
from simulator_runs import everything

CASES = [(name, case) for name, row in ROWS.items() for case in row.cases]


class Parabola(nn.Module):
    """x, to be used on the losses of Quadratics: a batch is one row with a and b."""

    def __init__(self, dim):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(dim, dtype=F64))

    def forward(self, batch):
        a, b = batch.chunk(2, dim=1)
        return (a * self.x.square() / 2 - b * self.x).sum(1, keepdim=True)


@pytest.mark.parametrize("name", ROWS)
def test_heterogeneous_quadratic_reaches_the_predicted_point(name):
    row, problem = ROWS[name], Quadratics()
    topo, batch = row.graph(row.n), torch.cat([problem.a, problem.b], 1)[:, None]
    sim = qgm.Simulator(Parabola(3), topo, name, engine="vmap", **row.hyper)
    for _ in range(700):
        sim.step(lambda loss, _: loss.sum(), (batch, batch))
    expected, found = row.point(problem, torch.tensor(topo.matrix())), rows_of(sim, sim.opt.x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (found.mean(0) - problem.optimum).abs().max() < 0.5 * problem.optimum.abs().max()
    assert (expected - problem.optimum).abs().max() > 0.01  # the point is biased, not the optimum


@pytest.mark.parametrize(("name", "case"), CASES)
def test_steps_on_a_ring_equal_the_slow_text(name, case):
    row, topo = ROWS[name], topology.ring(5)
    sim = simulator(name, topo, **row.cases[case])
    start = [flat(smooth_mlp().parameters())] * 5
    advance(sim, STEPS)
    assert_equals_slow_text(sim, row, sim.opt.algorithm, start, STEPS)


@pytest.mark.parametrize("name", ROWS)
def test_steps_on_the_social_network_equal_the_slow_text(name):
    row, topo = ROWS[name], topology.social()
    hyper = {**next(iter(row.cases.values())), "gamma": 0.5}
    if not hasattr(algorithms.get_class(name), "gamma"):
        del hyper["gamma"]
    sim = simulator(name, topo, **hyper)
    advance(sim, 2)
    assert_equals_slow_text(sim, row, sim.opt.algorithm, [flat(smooth_mlp().parameters())] * 32, 2)


def apart(sim):
    """Give the workers parameters of their own, as a user may before the first step; returns them."""
    base, rng = flat(smooth_mlp().parameters()), np.random.RandomState(5)
    start = [base + torch.tensor(0.1 * rng.randn(len(base))) for _ in sim.models]
    for model, values in zip(sim.models, start, strict=True):
        copied = copy.deepcopy(model)
        nn.utils.vector_to_parameters(values, copied.parameters())
        model.load_state_dict(copied.state_dict())
    return start


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in CASES if n != "comp_q_saddle"])
def test_workers_that_start_apart_mix_before_the_first_gradient(name, case):
    sim = simulator(name, topology.ring(4), **ROWS[name].cases[case])
    start = apart(sim)
    advance(sim, 3)
    assert_equals_slow_text(sim, ROWS[name], sim.opt.algorithm, start, 3)


@pytest.mark.parametrize("name", ["q_saddle", "ngc", "n_saddle", "ccl"])
def test_neighbours_may_change_from_step_to_step(name):
    row, topo = ROWS[name], topology.random_matching(6, seed=2)
    sim = simulator(name, topo, **next(iter(row.cases.values())))
    advance(sim, 5)
    assert_equals_slow_text(sim, row, sim.opt.algorithm, [flat(smooth_mlp().parameters())] * 6, 5)


def test_the_model_variant_needs_links_in_one_direction_only():
    topo = topology.one_peer_exponential(4)
    sim = simulator("ngc", topo, alpha=0.0)
    advance(sim, 5)
    assert_equals_slow_text(sim, ROWS["ngc"], sim.opt.algorithm, [flat(smooth_mlp().parameters())] * 4, 5)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_engines_agree(name, case):
    found = []
    for engine in ("loop", "threads", "vmap"):
        for make in (plain_mlp, smooth_mlp):
            sim = simulator(name, topology.star(4), engine, make(), **ROWS[name].cases[case])
            losses = advance(sim, 2)
            found.append([sim.opt.x, losses, *sim.opt.state.values(), *(b for m in sim.models for b in m.buffers())])
    for kind in (0, 1):
        for other in (found[2 + kind], found[4 + kind]):
            for a, b in zip(found[kind], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["ngc", "ccl"])
def test_engine_auto_leaves_no_trace_of_its_measurement(name):
    auto, loop = (simulator(name, topology.ring(4), engine) for engine in ("auto", "loop"))
    advance(auto, 2), advance(loop, 2)
    assert auto.engine != "auto"
    torch.testing.assert_close(auto.opt.x, loop.opt.x, rtol=1e-9, atol=1e-11)


# Facts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_q_saddle_with_rho_zero_is_quasi_global_momentum_to_the_bit(nesterov):
    hyper = {"momentum": 0.8, "qg_momentum": 0.7, "weight_decay": 0.01}
    flat_slope = simulator("q_saddle", topology.social(), rho=0.0, nesterov=nesterov, **hyper)
    plain = simulator("qg_dsgdm_n" if nesterov else "qg_dsgdm", topology.social(), **hyper)
    assert torch.equal(advance(flat_slope, 4), advance(plain, 4))
    assert torch.equal(flat_slope.opt.x, plain.opt.x)


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_compression_the_compressed_forms_are_the_plain_ones(nesterov):
    for name in ("q_saddle", "ngc", "n_saddle"):
        plain = simulator(name, topology.ring(5), nesterov=nesterov)
        packed = simulator(f"comp_{name}", topology.ring(5), nesterov=nesterov, compressor="none")
        advance(plain, 6), advance(packed, 6)
        torch.testing.assert_close(packed.opt.x, plain.opt.x, rtol=1e-11, atol=1e-13)
        if name != "q_saddle":
            assert packed.opt.state["link_error_memory"].abs().max() == 0


@pytest.mark.parametrize("compressed", [False, True])
def test_n_saddle_with_rho_zero_is_ngc_to_the_bit(compressed):
    prefix = "comp_" if compressed else ""
    more = {"compressor": "sign"} if compressed else {}
    sharp = simulator(f"{prefix}n_saddle", topology.ring(5), rho=0.0, **more)
    plain = simulator(f"{prefix}ngc", topology.ring(5))
    advance(sharp, 4), advance(plain, 4)
    assert torch.equal(sharp.opt.x, plain.opt.x)


@pytest.mark.parametrize(("nesterov", "alpha"), [(False, 0.3), (True, 1.0)])
def test_ngc_with_equal_models_and_data_is_dsgdm(nesterov, alpha):
    ngc = simulator("ngc", topology.ring(5), nesterov=nesterov, alpha=alpha, weight_decay=0.01)
    plain = simulator("dsgdm_n" if nesterov else "dsgdm", topology.ring(5), weight_decay=0.01)
    for t in range(6):
        x, y = batches(t, 1)
        for sim in (ngc, plain):
            sim.step(F.cross_entropy, (x.expand(5, -1, -1), y.expand(5, -1)), lr=lr_at(t))
    torch.testing.assert_close(ngc.opt.x, plain.opt.x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", ["ngc", "qg"])
def test_ngc_alone_is_a_plain_method_in_terms_of_the_mixed_points(name, nesterov):
    """With one worker there are no cross-gradients: momentum SGD, or QG-DSGDm with mu = beta."""
    quasi = name == "qg"
    plain = ("qg_dsgdm" if quasi else "dsgdm") + ("_n" if nesterov else "")
    ngc = simulator("ngc", topology.ring(1), nesterov=nesterov, quasi_global=quasi, momentum=0.8)
    other = simulator(plain, topology.ring(1), momentum=0.8, **({"qg_momentum": 0.8} if quasi else {}))
    advance(ngc, 6), advance(other, 6)
    torch.testing.assert_close(ngc.opt.x, other.opt.x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
def test_quasi_global_ngc_is_quasi_global_momentum_on_its_combined_gradients(nesterov):
    ngc = simulator("ngc", topology.ring(5), nesterov=nesterov, quasi_global=True, momentum=0.8, weight_decay=0.01)
    plain = qgm.StackedOptimizer(
        ngc.opt.x.clone(), topology.ring(5), "qg_dsgdm_n" if nesterov else "qg_dsgdm", lr=LR, momentum=0.8,
        qg_momentum=0.8, weight_decay=0.01,
    )  # fmt: skip
    for t in range(STEPS):
        ngc.step(F.cross_entropy, batches(t, 5), lr=lr_at(t))
        plain.step(ngc.g, lr=lr_at(t))
        torch.testing.assert_close(ngc.opt.x, plain.x, rtol=1e-11, atol=1e-12)


def test_climbing_a_hill_of_known_slope():
    """Loss |w|^2 / 2 at w = (3, 4): slope w, norm 5; a step rho up is w (1 + rho / 5)."""
    model = nn.Linear(2, 1, bias=False).to(F64)
    sim = qgm.Simulator(model, topology.ring(1), "q_saddle", lr=0.5, rho=0.5, momentum=0.0)
    with torch.no_grad():
        sim.models[0].weight.copy_(torch.tensor([[3.0, 4.0]]))
    loss = sim.step_closure(lambda model, batch: model.weight.square().sum() / 2, [None])
    assert loss.item() == 12.5
    torch.testing.assert_close(sim.g[0, :2], torch.tensor([3.3, 4.4], dtype=F64), rtol=1e-12, atol=0)
    torch.testing.assert_close(sim.models[0].weight.detach(), torch.tensor([[1.35, 1.8]], dtype=F64))


def test_error_feedback_loses_nothing():
    """What has been sent plus what is remembered is the sum of all gradients: two equal models, constant slope."""
    sim = qgm.Simulator(
        nn.Linear(3, 1).to(F64), topology.complete(2), "comp_ngc", lr=0.0, momentum=0.0, nesterov=False, alpha=1.0
    )
    slope = torch.tensor([[1.0, -2.0, 0.5]], dtype=F64)
    sent = torch.zeros_like(sim.opt.x)
    for _ in range(7):
        sim.step_closure(lambda model, scale: scale * (model.weight * slope).sum(), [1.0, 3.0])
        sent += sim.g
    memory = (sim.opt.state["own_error_memory"] + sim.opt.state["link_error_memory"].flip(0)) / 2
    torch.testing.assert_close((sent + memory)[:, :3], 7 * 2.0 * slope.expand(2, 3), rtol=1e-12, atol=1e-12)
    assert memory.abs().max() > 0.1


# Messages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hyper", "per_link"),
    [
        ("q_saddle", {}, lambda d, tensors: 8 * d),
        ("comp_q_saddle", {"compressor": "sign"}, lambda d, tensors: sum(-(-t // 8) + 8 for t in tensors)),
        ("comp_q_saddle", {"bits": 3}, lambda d, tensors: sum(-(-t // 2) + 8 for t in tensors)),
        ("ngc", {}, lambda d, tensors: 2 * 8 * d),
        ("ngc", {"alpha": 0.0}, lambda d, tensors: 8 * d),
        ("comp_ngc", {}, lambda d, tensors: 8 * d + sum(-(-t // 8) + 8 for t in tensors)),
        ("n_saddle", {}, lambda d, tensors: 2 * 8 * d),
        ("ccl", {}, lambda d, tensors: 8 * d + 8 * 3 * (4 + 1)),
        ("ccl", {"lambda_d": 0.0}, lambda d, tensors: 8 * d),
        ("comp_n_saddle", {}, lambda d, tensors: 8 * d + sum(t + 8 for t in tensors)),
    ],
)
def test_bytes_sent_count_every_message_over_every_link(name, hyper, per_link):
    topo = topology.star(4)  # 6 links
    sim = simulator(name, topo, **hyper)
    tensors = [p.numel() for p in smooth_mlp().parameters()]
    advance(sim, 3)
    assert sim.opt.bytes_sent_per_step == 6 * per_link(sum(tensors), tensors)
    assert sim.opt.bytes_sent == 3 * sim.opt.bytes_sent_per_step


def test_a_worker_uses_its_neighbours_only():
    """Two steps on a chain: what worker 3 holds can't have reached worker 0, nor its gradients."""
    for name in ROWS:
        sims = [simulator(name, topology.chain(5), model=plain_mlp()) for _ in range(2)]
        for t in range(2):
            for sim, scale in zip(sims, (1.0, 3.0), strict=True):
                x, y = batches(t, 5)
                x[4] *= scale
                sim.step(F.cross_entropy, (x, y))
        assert torch.equal(sims[0].opt.x[0], sims[1].opt.x[0]), name
        assert not torch.equal(sims[0].opt.x[3], sims[1].opt.x[3]), name


def test_links_are_numbered_by_receiver_and_sender():
    links = Links(topology.star(4).mixing())
    assert list(zip(links.receivers, links.senders, strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0)]
    assert links.rounds == [[0, 3, 4, 5], [1], [2]]
    assert links.degrees == [3, 1, 1, 1]
    assert len(links) == 6
    assert len(Links(topology.ring(1).mixing())) == 0


# Resuming and failing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_continues_to_the_same_bits(name, case, dtype):
    def build():
        return simulator(name, topology.ring(4), dtype=dtype, **ROWS[name].cases[case])

    def go(sim, begin, end):
        for t in range(begin, end):
            x, y = batches(t, 4)
            sim.step(F.cross_entropy, (x.to(dtype), y), lr=lr_at(t))

    whole, first, second = build(), build(), build()
    go(whole, 0, 6)
    go(first, 0, 3)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second.load_state_dict(torch.load(stream, weights_only=True))
    go(second, 3, 6)
    assert torch.equal(second.opt.x, whole.opt.x)
    assert all(torch.equal(v, whole.opt.state[key]) for key, v in second.opt.state.items())
    assert second.opt.bytes_sent == whole.opt.bytes_sent
    assert torch.isfinite(whole.opt.x).all()


def test_random_compression_differs_from_step_to_step_and_seed_to_seed():
    def trained(**hyper):
        sim = simulator("comp_q_saddle", topology.ring(4), bits=1, gamma=0.3, **hyper)
        advance(sim, 3)
        return sim.opt.x

    assert torch.equal(trained(), trained(seed=0))
    assert not torch.equal(trained(), trained(seed=1))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("failure", ["closure", "nonfinite", "skip", "lr"])
def test_a_failed_step_changes_nothing(name, taken, failure):
    sim = simulator(name, topology.ring(4), on_nonfinite="skip" if failure == "skip" else "raise")
    if taken:
        advance(sim, taken)
    else:
        apart(sim)
    before, sent = everything(sim), sim.opt.bytes_sent
    x, y = batches(9, 4)
    calls = 0

    def break_down(model, batch):
        nonlocal calls
        calls += 1
        if calls == 6:  # among the cross-gradients, or the second gradients
            raise RuntimeError("broken")
        return F.cross_entropy(model(batch[0]), batch[1])

    if failure == "closure":
        with pytest.raises(RuntimeError, match="broken"):
            sim.step_closure(break_down, list(zip(x, y, strict=True)))
    elif failure == "lr":
        with pytest.raises(ValueError, match="lr must be a finite number"):
            sim.step(F.cross_entropy, (x, y), lr=-1.0)
    elif failure == "skip":
        sim.step(F.cross_entropy, (x * float("inf"), y))
        assert sim.opt.skipped_steps == 1
    else:
        with pytest.raises(NonFiniteGradientError):
            sim.step(F.cross_entropy, (x * float("inf"), y))
    assert all(torch.equal(a, b) for a, b in zip(everything(sim), before, strict=True))
    assert sim.opt.bytes_sent == sent
    sim.step(F.cross_entropy, (x, y))
    assert sim.opt.num_steps == taken + 1


@pytest.mark.parametrize("name", ROWS)
def test_a_step_of_size_zero_mixes_and_stays_finite(name):
    sim = simulator(name, topology.ring(4))
    apart(sim)
    before, mean = sim.consensus_distance(), sim.opt.x.mean(0)
    for t in range(3):
        sim.step(F.cross_entropy, batches(t, 4), lr=0.0)
    assert sim.consensus_distance() < 0.5 * before
    torch.testing.assert_close(sim.opt.x.mean(0), mean, rtol=1e-12, atol=1e-13)
    advance(sim, 1)
    assert all(torch.isfinite(v).all() for v in everything(sim))


def test_clipping_is_of_the_combined_gradient():
    sim = simulator("ngc", topology.ring(4), clip_grad_norm=0.01)
    advance(sim, 1)
    torch.testing.assert_close(sim.g.norm(dim=1), torch.full((4,), 0.01, dtype=F64), rtol=1e-3, atol=0)


# Wrong arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_stacked_optimizer_names_the_simulator(name):
    with pytest.raises(ValueError, match=rf"{name} needs more than one gradient a step.*use qgm_ext.Simulator"):
        qgm.StackedOptimizer(torch.zeros(4, 3), topology.ring(4), name, lr=0.1)


@pytest.mark.parametrize(
    ("name", "hyper", "error", "message"),
    [
        ("q_saddle", {"rho": -0.1}, ValueError, "rho must be a finite number of at least 0, got -0.1"),
        ("n_saddle", {"rho": float("inf")}, ValueError, "rho must be a finite number of at least 0, got inf"),
        ("comp_n_saddle", {"rho": "up"}, ValueError, "rho must be a finite number of at least 0, got 'up'"),
        ("q_saddle", {"qg_momentum": 2.0}, ValueError, r"qg_momentum must be in \[0, 1\], got 2.0"),
        ("q_saddle", {"nesterov": 1}, TypeError, "nesterov must be a bool, got 1"),
        ("ngc", {"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ("ngc", {"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ("ngc", {"gamma": 0.0}, ValueError, r"gamma must be in \(0, 1\], got 0"),
        ("ngc", {"gamma": 1.1}, ValueError, r"gamma must be in \[0, 1\], got 1.1"),
        ("ngc", {"quasi_global": "yes"}, TypeError, "quasi_global must be a bool, got 'yes'"),
        ("ccl", {"lambda_m": -1.0}, ValueError, "lambda_m must be a finite number of at least 0, got -1.0"),
        ("ccl", {"lambda_d": None}, ValueError, "lambda_d must be a finite number of at least 0, got None"),
        ("comp_ngc", {"compressor": "signs"}, ValueError, "compressor 'signs' is not known, did you mean 'sign'?"),
        ("comp_ngc", {"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
        ("comp_q_saddle", {"bits": 0}, ValueError, "bits must be an integer from 1 to 16, got 0"),
        ("comp_q_saddle", {"ratio": 1.0}, ValueError, r"ratio must be in \[0, 1\), got 1.0"),
        ("comp_q_saddle", {"gamma": 0}, ValueError, r"gamma must be in \(0, 1\], got 0"),
    ],
)
def test_wrong_hyper_parameters_are_named(name, hyper, error, message):
    with pytest.raises(error, match=message):
        algorithms.get(name, lr=0.1, **hyper)


def test_topologies_that_do_not_fit_are_refused():
    for name in ("ngc", "comp_ngc", "n_saddle", "ccl"):
        with pytest.raises(ValueError, match=f"{name} sends answers back.*'exponential' has one-way links"):
            simulator(name, topology.exponential(8))
    with pytest.raises(ValueError, match="comp_ngc keeps an error memory for each neighbour.*time-varying"):
        simulator("comp_ngc", topology.random_matching(4))


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_every_algorithm_learns_digits(name):
    config = TrainConfig(algorithm=name, workers=8, alpha=0.1, lr=0.1, steps=60, batch=16, model="mlp", threads=1)
    result = train(config)
    assert isinstance(result.simulator.opt, CrossOptimizer)
    assert result.metrics[0]["accuracy_local_mean"] < 0.2
    assert result.summary["accuracy_local_mean"] > 0.6
