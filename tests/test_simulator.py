"""Simulator: training as by hand, resuming, clipping, and that a failed step changes nothing."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgm_ext as qgm
from qgm_ext import reference, topology
from qgm_ext.simulator import Simulator
from qgm_ext.stacked import NonFiniteGradientError
from simulator_runs import FEATURES, assert_unchanged, batch_norm, data, everything, mlp


def parameters_of(model):
    return [p.detach() for p in model.parameters()]


def assert_same_parameters(mine, theirs, **tolerance):
    for a, b in zip(parameters_of(mine), parameters_of(theirs), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# Training as by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["loop", "threads", "vmap"])
def test_one_worker_with_dsgdm_equals_torch_sgd(engine):
    model = mlp()
    sim = Simulator(model, topology.ring(1), "dsgdm_n", lr=0.1, momentum=0.9, weight_decay=1e-2, engine=engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    for step in range(10):
        x, y = data(step, 1)
        losses = sim.step(F.cross_entropy, (x, y))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[0]), y[0])
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(losses, loss.detach()[None], rtol=1e-12, atol=0)
    assert_same_parameters(sim.models[0], model, rtol=1e-11, atol=1e-13)


def test_one_worker_with_qg_dsgdm_equals_quasi_hyperbolic_momentum():
    # algorithms.md section 6: with one worker QG-DSGDm is QHM: buffer b = a mean of steps, step = beta b + g.
    model, beta, mu, lr = mlp(), 0.9, 0.8, 0.1
    sim = Simulator(model, topology.ring(1), "qg_dsgdm", lr=lr, momentum=beta, qg_momentum=mu)
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(10):
        x, y = data(step, 1)
        sim.step(F.cross_entropy, [(x[0], y[0])])
        gradients = torch.autograd.grad(F.cross_entropy(model(x[0]), y[0]), list(model.parameters()))
        with torch.no_grad():
            for p, g, b in zip(model.parameters(), gradients, buffers, strict=True):
                direction = beta * b + g
                p -= lr * direction
                b.mul_(mu).add_(direction, alpha=1 - mu)
    assert_same_parameters(sim.models[0], model, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ["loop", "threads", "vmap"])
@pytest.mark.parametrize("algorithm", ["dsgd", "dsgdm", "qg_dsgdm_n"])
def test_workers_equal_a_hand_written_loop_over_models_and_the_reference(engine, algorithm):
    n = 5
    sim = Simulator(batch_norm(), topology.ring(n), algorithm, lr=0.2, weight_decay=1e-3, engine=engine)
    plain = [batch_norm() for _ in range(n)]
    w = torch.tensor(topology.ring(n).matrix())
    flat = torch.stack([torch.cat([p.flatten() for p in parameters_of(m)]) for m in plain])
    state = reference.initial_state(sim.opt.algorithm, flat)
    for step in range(6):
        x, y = data(step, n)
        lr = 0.2 if step < 3 else 0.05
        losses = sim.step(F.cross_entropy, (x, y), lr=lr)
        gradients = []
        for i, model in enumerate(plain):
            loss = F.cross_entropy(model(x[i]), y[i])
            torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-11, atol=0)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        flat, state = reference.step(sim.opt.algorithm, flat, torch.stack(gradients), state, w, step, lr)
        for row, model in zip(flat, plain, strict=True):
            nn.utils.vector_to_parameters(row, model.parameters())
    for mine, theirs in zip(sim.models, plain, strict=True):
        assert_same_parameters(mine, theirs, rtol=1e-9, atol=1e-11)
        for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert sim.num_steps == 6
    assert sim.consensus_distance() == pytest.approx(float(reference.consensus_distance(flat)), rel=1e-9)


def test_batches_of_different_sizes():
    n = 3
    sim = Simulator(mlp(), topology.complete(n), "dsgd", lr=0.5)
    batches = [tuple(t[0] for t in data(i, 1, batch=i + 2)) for i in range(n)]
    model = mlp()
    gradients = [torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())) for x, y in batches]
    sim.step(F.cross_entropy, batches)
    for k, p in enumerate(model.parameters()):
        expected = p.detach() - 0.5 * sum(g[k] for g in gradients) / n
        torch.testing.assert_close(list(sim.models[1].parameters())[k].detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_training_twice_gives_equal_bits(engine):
    def train():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Dropout(0.2), batch_norm(torch.float32))
        sim = Simulator(model, topology.ring(4), "qg_dsgdm_n", lr=0.1, engine=engine, clip_grad_norm=0.5)
        for step in range(5):
            sim.step(F.cross_entropy, data(step, 4, dtype=torch.float32))
        return everything(sim)

    assert all(torch.equal(a, b) for a, b in zip(train(), train(), strict=True))


def test_stacked_and_separate_batches_give_equal_bits():
    stacked, separate = (Simulator(mlp(), topology.ring(2), "dsgdm", lr=0.1) for _ in range(2))
    x, y = data(0, 2)
    assert torch.equal(
        stacked.step(F.cross_entropy, (x, y)), separate.step(F.cross_entropy, [(x[0], y[0]), (x[1], y[1])])
    )
    assert torch.equal(stacked.opt.x, separate.opt.x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_half_precision_models_train_as_double_ones_do(dtype, engine):
    def train(dtype):
        sim = Simulator(mlp(), topology.ring(3), "qg_dsgdm", lr=0.2, dtype=dtype, engine=engine, clip_grad_norm=10.0)
        assert sim.models[0][1].weight.dtype == dtype
        x, y = data(0, 3, batch=32, dtype=dtype)
        losses = torch.stack([sim.step(F.cross_entropy, (x, y)).double().mean() for _ in range(20)])
        return losses, sim.opt.state["qg_momentum_buffer"].dtype

    losses, state_dtype = train(dtype)
    exact, _ = train(torch.float64)
    assert state_dtype == torch.float32
    assert exact[-1] < exact[0] - 0.05
    torch.testing.assert_close(losses, exact, rtol=0, atol=0.02)


# Modules and memory ---------------------------------------------------------------------------------------------------


def test_models_are_views_and_the_given_model_is_left_alone():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    sim = Simulator(model, topology.ring(3), "dsgd", lr=0.1)
    sim.step(F.cross_entropy, data(0, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    row = sim.opt.x[1]
    for p, g in zip(sim.models[1].parameters(), sim._workers.gradients[1], strict=True):
        assert row.data_ptr() <= p.data_ptr() < row.data_ptr() + row.numel() * 8
        assert p.grad.data_ptr() == g.data_ptr()
        assert p.grad.abs().sum() > 0


def test_num_parameters_does_not_count_padding():
    sim = Simulator(mlp(), topology.ring(2), "dsgd", lr=0.1)
    assert sim.num_parameters == 5 * 8 + 8 + 8 * 3 + 3
    assert sim.opt.x.shape[1] == 4 * 64


def test_values_put_into_a_worker_are_taken_over_however_they_came():
    sim = Simulator(mlp(), topology.ring(3), "dsgd", lr=0.0)
    other = mlp()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    sim.models[0].load_state_dict(other.state_dict())
    sim.models[1][1].weight.data = other[1].weight.detach().clone()
    sim.models[2][1].weight = nn.Parameter(other[1].weight.detach().clone())
    sim.consensus_distance()
    for worker in range(3):
        assert torch.equal(sim._workers.stacked_parameters[0][worker], other[1].weight)
        assert sim.models[worker][1].weight.data_ptr() == sim._workers.stacked_parameters[0][worker].data_ptr()
    assert torch.equal(sim._workers.stacked_parameters[1][0], other[1].bias)
    assert not torch.equal(sim._workers.stacked_parameters[1][1], other[1].bias)


def test_parameter_of_another_shape_or_gone_is_refused():
    sim = Simulator(mlp(), topology.ring(3), "dsgd", lr=0.1)
    sim.models[2].to(torch.float32)
    with pytest.raises(ValueError, match=r"parameter 1.weight of worker 2 must be \[8, 5\] torch.float64 on cpu, got"):
        sim.step(F.cross_entropy, data(0, 3))
    sim = Simulator(mlp(), topology.ring(3), "dsgd", lr=0.1)
    sim.models[1][1].bias = None
    with pytest.raises(ValueError, match=r"worker 1 has lost its parameter 1\.bias"):
        sim.step(F.cross_entropy, data(0, 3))


def test_frozen_parameters_are_shared_and_stay():
    model = mlp()
    model[1].weight.requires_grad_(False)
    sim = Simulator(model, topology.ring(3), "dsgd", lr=0.1)
    assert sim.models[0][1].weight is sim.models[2][1].weight
    assert sim.models[0][1].weight is not model[1].weight
    sim.step(F.cross_entropy, data(0, 3))
    assert torch.equal(sim.models[0][1].weight, model[1].weight)
    assert not torch.equal(sim.models[0][1].bias, model[1].bias)
    assert torch.equal(sim.average_model()[1].weight, model[1].weight)
    assert sim.num_parameters == 8 + 8 * 3 + 3


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_tied_parameters_are_one_parameter(engine):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    model = Tied().double()
    sim = Simulator(model, topology.complete(2), "dsgd", lr=0.1, engine=engine)
    assert sim.models[1].second.weight is sim.models[1].first.weight
    assert sim.num_parameters == FEATURES * FEATURES + 2 * FEATURES
    x = data(0, 2)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sim.step(lambda output, targets: (output - targets).square().mean(), (x, x))
    sum((model(x[i]) - x[i]).square().mean() / 2 for i in range(2)).backward()
    optimizer.step()
    assert_same_parameters(sim.models[1], model, rtol=1e-11, atol=1e-13)
    assert sim.average_model().second.weight is not sim.models[0].first.weight


def test_memory_does_not_grow():
    sim = Simulator(batch_norm(), topology.ring(3), "qg_dsgdm_n", lr=0.01, clip_grad_norm=1.0)
    batches = data(0, 3)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for _ in range(5):
        sim.step(F.cross_entropy, batches)
    before = tensors()
    for _ in range(200):
        sim.step(F.cross_entropy, batches)
    assert tensors() <= before


def test_train_and_eval_mode():
    sim = Simulator(batch_norm(), topology.ring(2), "dsgd", lr=0.1)
    sim.eval()
    assert not any(module.training for model in sim.models for module in model.modules())
    before = [b.clone() for b in sim.models[0].buffers()]
    sim.step(F.cross_entropy, data(0, 2))
    assert all(torch.equal(a, b) for a, b in zip(sim.models[0].buffers(), before, strict=True))
    sim.train()
    sim.step(F.cross_entropy, data(1, 2))
    assert sim.models[0][1].num_batches_tracked == 1
    assert not torch.equal(sim.models[0][1].running_mean, sim.models[1][1].running_mean)


# Clipping and non-finite gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clipping_equals_torch_per_worker(dtype):
    n, max_norm = 4, 0.7
    model = mlp(dtype)
    sim = Simulator(model, topology.ring(n), "dsgd", lr=0.0, clip_grad_norm=max_norm)
    x, y = data(0, n, dtype=dtype)
    x = x * torch.tensor([0.0, 0.5, 3.0, 10.0], dtype=dtype)[:, None, None]
    sim.step(F.cross_entropy, (x, y))
    clipped = 0
    for worker in range(n):
        model.zero_grad()
        F.cross_entropy(model(x[worker]), y[worker]).backward()
        clipped += bool(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm) > max_norm)
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]  # torch rounds the norm
        for mine, p in zip(sim._workers.gradients[worker], model.parameters(), strict=True):
            torch.testing.assert_close(mine, p.grad, rtol=tolerance, atol=tolerance * 1e-2)
    assert 0 < clipped < n


def test_without_clipping_a_long_gradient_stays():
    sims = [Simulator(mlp(), topology.ring(2), "dsgd", lr=0.1, clip_grad_norm=c) for c in (None, 1e6, 1e-3)]
    for sim in sims:
        sim.step(F.cross_entropy, data(0, 2))
    assert torch.equal(sims[0].g, sims[1].g)
    torch.testing.assert_close(sims[2].g.norm(dim=1), torch.full((2,), 1e-3).double(), rtol=1e-2, atol=0)


def poisoned(step, n):
    x, y = data(step, n)
    x[1, 0, 0] = float("nan")
    return x, y


def test_clipping_goes_on_after_a_gradient_that_is_not_finite():
    """NaN as a factor must not stay in the gaps between parameters, where no later gradient replaces it."""
    sims = [
        Simulator(mlp(torch.float32), topology.ring(3), "dsgdm", lr=0.1, clip_grad_norm=0.1, on_nonfinite="skip")
        for _ in range(2)
    ]
    x, y = poisoned(0, 3)
    sims[1].step(F.cross_entropy, (x.float(), y))
    for sim in sims:
        x, y = data(1, 3)
        sim.step(F.cross_entropy, (x.float(), y))
    assert [sim.opt.skipped_steps for sim in sims] == [0, 1]
    assert torch.equal(sims[0].opt.x, sims[1].opt.x)


def test_nonfinite_gradient_is_skipped_with_all_its_traces():
    sim = Simulator(batch_norm(), topology.ring(3), "qg_dsgdm", lr=0.1, on_nonfinite="skip", clip_grad_norm=1.0)
    sim.step(F.cross_entropy, data(0, 3))
    before = everything(sim)
    losses = sim.step(F.cross_entropy, poisoned(1, 3))
    assert losses.isnan().tolist() == [False, True, False]
    assert_unchanged(sim, before)
    assert (sim.num_steps, sim.opt.num_steps, sim.opt.skipped_steps) == (2, 1, 1)
    sim.step(F.cross_entropy, data(1, 3))
    assert sim.opt.x.isfinite().all()


def test_nonfinite_gradient_raises_and_leaves_all_as_it_was():
    sim = Simulator(batch_norm(), topology.ring(3), "qg_dsgdm", lr=0.1, on_nonfinite="raise")
    before = everything(sim)
    with pytest.raises(NonFiniteGradientError, match="worker 1 is not finite in step 0"):
        sim.step(F.cross_entropy, poisoned(0, 3))
    assert_unchanged(sim, before)
    assert sim.num_steps == 0


def test_nonfinite_gradient_is_ignored_by_default():
    sim = Simulator(mlp(), topology.ring(4), "dsgd", lr=0.1)
    sim.step(F.cross_entropy, poisoned(0, 4))
    assert sim.opt.x.isnan().any(1).tolist() == [True, True, True, False]


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["loop", "threads", "vmap"])
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(engine):
    def new(seed):
        torch.manual_seed(seed)
        model = batch_norm(torch.float32)
        nn.init.normal_(model[0].weight)
        return Simulator(model, topology.one_peer_exponential(4), "qg_dsgdm_n", lr=0.1, local_step=2, engine=engine)

    through = new(0)
    for step in range(7):
        through.step(F.cross_entropy, data(step, 4, dtype=torch.float32))
    first = new(0)
    first.opt.lr = 0.1
    for step in range(3):
        first.step(F.cross_entropy, data(step, 4, dtype=torch.float32))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = new(1)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.num_steps == 3
    for step in range(second.num_steps, 7):
        second.step(F.cross_entropy, data(step, 4, dtype=torch.float32))
    assert_unchanged(second, everything(through))


def test_frozen_parameters_are_part_of_the_state():
    def new(value):
        model = mlp()
        model[1].weight.requires_grad_(False).fill_(value)
        return Simulator(model, topology.ring(2), "dsgd", lr=0.1)

    second = new(2.0)
    second.load_state_dict(new(1.0).state_dict())
    assert (second.models[1][1].weight == 1.0).all()


def test_auto_takes_the_engine_of_the_saved_run_and_an_explicit_engine_stays():
    saved = Simulator(mlp(), topology.ring(2), "dsgd", lr=0.1, engine="vmap").state_dict()
    assert saved["engine"] == "vmap"
    for engine, expected in (("auto", "vmap"), ("loop", "loop")):
        sim = Simulator(mlp(), topology.ring(2), "dsgd", lr=0.1, engine=engine)
        sim.load_state_dict(saved)
        assert sim.engine == expected


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    sim = Simulator(batch_norm(), topology.ring(3), "qg_dsgdm", lr=0.1)
    other = Simulator(batch_norm(), topology.ring(3), "qg_dsgdm", lr=0.1)
    other.step(F.cross_entropy, data(0, 3))
    good = other.state_dict()
    narrow = {**good["parameters"], "0.weight": torch.zeros(3, 2, 2)}
    cases = [
        ({k: v for k, v in good.items() if k != "buffers"}, "state_dict lacks buffers"),
        ({**good, "parameters": narrow}, r"parameter 0.weight must be \[3, 8, 5\] torch.float64, got \[3, 2, 2\]"),
        ({**good, "parameters": {}}, "of another model: parameters 0.bias, 0.weight"),
        ({**good, "buffers": good["buffers"][:2]}, "state_dict is of 2 workers, this simulator has 3"),
        ({**good, "buffers": [{}, *good["buffers"][1:]]}, "worker 0's buffers 1.num_batches_tracked"),
        ({**good, "optimizer": {**good["optimizer"], "state": {}}}, "state_dict must hold the state vectors"),
        ({**good, "engine": "lop"}, "engine 'lop' is not known, did you mean 'loop'"),
        (Simulator(batch_norm(), topology.ring(3), "qg_dsgdm", lr=0.2).state_dict(), "lr is 0.2 there and 0.1 here"),
    ]
    before = everything(sim)
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            sim.load_state_dict(state)
        assert_unchanged(sim, before)
        assert sim.num_steps == 0
    sim.load_state_dict(good)
    assert_unchanged(sim, everything(other))


# Bookkeeping ----------------------------------------------------------------------------------------------------------


def test_timings_and_names():
    sim = Simulator(mlp(), topology.ring(3), "dsgd", lr=0.1)
    assert sim.timings == (0.0, 0.0, 0.0)
    sim.step(F.cross_entropy, data(0, 3))
    spent = sim.timings
    assert spent.gradient > 0
    assert spent.optimizer > 0
    assert spent.evaluation == 0
    assert repr(sim).startswith("Simulator(Sequential, StackedOptimizer(3 workers")
    assert sim.num_workers == 3
    assert sim.device == torch.device("cpu")


def test_training_on_separated_classes_succeeds():
    # Every worker holds one class only: without averaging none could tell the classes apart.
    centres = torch.eye(3, FEATURES)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3)[:, None].expand(3, 32)
    sim = Simulator(mlp(torch.float32), qgm.topology.ring(3), "qg_dsgdm_n", lr=0.1)
    for _ in range(100):
        x = centres[labels] + 0.1 * torch.randn(3, 32, FEATURES, generator=generator)
        sim.step(F.cross_entropy, (x, labels))
    found = sim.evaluate(x.flatten(0, 1), labels.flatten())
    assert found.accuracy_local_min > 0.95
    assert found.accuracy_average > 0.95
