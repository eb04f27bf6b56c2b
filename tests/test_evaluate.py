"""Evaluation of a Simulator's workers and of the average of their models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgm_ext import topology
from qgm_ext.evaluate import accuracy_and_loss
from qgm_ext.simulator import Simulator
from simulator_runs import FEATURES, assert_unchanged, batch_norm, data, everything, mlp


def test_average_model_has_mean_parameters_and_the_buffers_of_one_worker():
    sim = Simulator(batch_norm(), topology.ring(4), "dsgd", lr=0.3)
    for step in range(3):
        sim.step(F.cross_entropy, data(step, 4))
    for worker in (0, 2):
        average = sim.average_model(worker)
        for k, p in enumerate(average.parameters()):
            expected = sum(list(m.parameters())[k].detach() for m in sim.models) / 4
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
            assert p.requires_grad
            assert p.untyped_storage().nbytes() == p.numel() * 8
        assert all(torch.equal(a, b) for a, b in zip(average.buffers(), sim.models[worker].buffers(), strict=True))
    before = sim.opt.x.clone()
    with torch.no_grad():
        next(average.parameters()).zero_()
        next(average.buffers()).zero_()
    assert torch.equal(sim.opt.x, before)
    assert sim.models[2][1].running_mean.abs().sum() > 0
    with pytest.raises(ValueError, match="buffers_of must be a worker from 0 to 3, got 4"):
        sim.average_model(4)


def test_evaluation_numbers_by_hand():
    # Scores of worker i are x * w_i: with w > 0 the sign of the sample decides; w = 0 ties, and argmax takes class 0.
    model = nn.Linear(1, 2, bias=False).double()
    sim = Simulator(model, topology.ring(2), "dsgd", lr=0.1)
    with torch.no_grad():
        sim.models[0].weight.copy_(torch.tensor([[1.0], [0.0]]))
        sim.models[1].weight.copy_(torch.tensor([[-3.0], [0.0]]))
    x = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    found = sim.evaluate(x, y, batch_size=2)

    def loss(weight):
        logits = [(weight * value, 0.0) for value in (1.0, 2.0, -1.0)]
        log_sums = [torch.tensor(pair).double().logsumexp(0).item() for pair in logits]
        return sum(s - pair[label] for s, pair, label in zip(log_sums, logits, (0, 1, 1), strict=True)) / 3

    assert found.accuracy_local == pytest.approx((2 / 3, 1 / 3))
    assert (found.accuracy_local_mean, found.accuracy_local_min) == pytest.approx((1 / 2, 1 / 3))
    assert found.accuracy_local_max == pytest.approx(2 / 3)
    assert found.accuracy_average == pytest.approx(1 / 3)
    assert found.loss_local == pytest.approx((loss(1.0), loss(-3.0)), rel=1e-6)
    assert found.loss_local_mean == pytest.approx((loss(1.0) + loss(-3.0)) / 2, rel=1e-6)
    assert found.loss_average == pytest.approx(loss(-1.0), rel=1e-6)
    assert found.consensus_distance == pytest.approx(2.0)
    assert found.num_samples == 3


def test_evaluate_asks_equal_workers_once():
    # A buffer that differs makes a worker differ; the average of equal rows is another model only by its rounding.
    sim = Simulator(batch_norm(), topology.ring(4), "dsgd", lr=0.1)
    x, y = (t.flatten(0, 1) for t in data(0, 2))
    asked = []
    for worker, model in enumerate(sim.models):
        model.eval()
        model.register_forward_hook(lambda *_, worker=worker: asked.append(worker))
    sim.evaluate(x, y)
    assert set(asked) == {0}
    with torch.no_grad():
        dict(sim.models[2].named_buffers())["1.running_mean"] += 1.0
    asked.clear()
    found = sim.evaluate(x, y)
    assert set(asked) == {0, 2}
    assert found.loss_local[2] != found.loss_local[0]
    assert found.loss_local[1] == found.loss_local[3] == found.loss_local[0]


def test_evaluate_uses_evaluation_mode_and_puts_every_mode_back():
    sim = Simulator(nn.Sequential(nn.Dropout(0.5), batch_norm()), topology.ring(2), "dsgd", lr=0.1)
    sim.models[1][1].eval()
    before, generator = everything(sim), torch.get_rng_state()
    x, y = (t.flatten(0, 1) for t in data(0, 2))
    first = sim.evaluate(x, y)
    assert first == sim.evaluate(x, y)
    assert_unchanged(sim, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert sim.models[0].training
    assert sim.models[1].training
    assert sim.models[1][0].training
    assert not sim.models[1][1].training
    assert sim.timings.evaluation > 0


def test_evaluation_does_not_depend_on_the_batch_size():
    model = mlp()
    x, y = (t.flatten(0, 1) for t in data(0, 7))
    results = [accuracy_and_loss(model, x, y, size, F.cross_entropy) for size in (1, 5, 42, 100)]
    for accuracy, loss in results[1:]:
        assert accuracy == results[0][0]
        assert loss == pytest.approx(results[0][1], rel=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor, got list"),
        (
            {"x": torch.ones(3, FEATURES).double()},
            ValueError,
            r"equally many samples, at least 1, got \[3, 5\] and \[6\]",
        ),
        ({"x": torch.ones(0, 5), "y": torch.ones(0)}, ValueError, "at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"y": torch.zeros(6, 2, dtype=torch.int64)}, ValueError, r"class scores \[B, C, ...\].*\[6, 3\] for \[6, 2\]"),
        ({"y": torch.zeros(6, device="meta")}, ValueError, "y is on meta, the models on cpu"),
    ],
)
def test_evaluate_refuses(change, error, message):
    sim = Simulator(mlp(), topology.ring(2), "dsgd", lr=0.1)
    x, y = (t[0] for t in data(0, 1))
    with pytest.raises(error, match=message):
        sim.evaluate(**{"x": x, "y": y, **change})
    assert all(model.training for model in sim.models)
