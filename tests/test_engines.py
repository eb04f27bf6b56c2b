"""Gradient engines: equal gradients, what each refuses, and that measuring them leaves no trace."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgm_ext import engines, models, topology
from qgm_ext.simulator import Simulator

N, BATCH, FEATURES, CLASSES = 4, 6, 5, 3


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return models.mlp((FEATURES,), CLASSES, (8,)).to(dtype)


def batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, CLASSES)
    ).double()


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 1, FEATURES)), nn.Conv2d(1, 4, (1, 3)), nn.GroupNorm(2, 4), nn.Flatten(),
                         nn.Linear(12, CLASSES)).double()  # fmt: skip


def data(n=N, batch=BATCH, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, batch, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (n, batch), generator=generator)


def simulator(model, n=N, spread=0.1, **options):
    """A simulator whose workers have different parameters."""
    sim = Simulator(model, topology.ring(n), "dsgd", lr=0.1, **options)
    noise = torch.randn(sim.opt.x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for stacked, shift in zip(sim._workers.stacked_parameters, noise.sum(1), strict=False):
        stacked += spread * (torch.arange(n).to(stacked).view(-1, *[1] * (stacked.dim() - 1)) + float(shift) * 0.01)
    return sim


def by_hand(sim, closure, batches):
    """Gradients and losses by zero_grad and backward on copies of the workers' models."""
    gradients, losses, buffers = [], [], []
    for model, batch in zip(sim.models, batches, strict=True):
        own = copy.deepcopy(model)
        loss = closure(own, batch)
        loss.backward()
        gradients.append([p.grad if p.grad is not None else torch.zeros_like(p) for p in own.parameters()])
        losses.append(loss.detach())
        buffers.append(list(own.buffers()))
    return gradients, losses, buffers


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("engine", engines.NAMES)
@pytest.mark.parametrize("make_model", [mlp, batch_norm, small_cnn])
def test_gradients_losses_and_buffers_equal_those_of_plain_backward(engine, make_model):
    sim = simulator(make_model(), engine=engine)
    x, y = data()
    batches = list(zip(x, y, strict=True))
    gradients, losses, buffers = by_hand(sim, cross_entropy, batches)
    got = sim._engine.gradients(cross_entropy, batches)
    torch.testing.assert_close(got, torch.stack(losses), rtol=1e-12, atol=1e-12)
    for worker in range(N):
        for mine, theirs in zip(sim._workers.gradients[worker], gradients[worker], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(sim.models[worker].buffers(), buffers[worker], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_loop_gradients_equal_plain_backward_to_the_bit():
    sim = simulator(mlp(torch.float32))
    batches = list(zip(*data(dtype=torch.float32), strict=True))
    gradients, losses, _ = by_hand(sim, cross_entropy, batches)
    assert torch.equal(sim._engine.gradients(cross_entropy, batches), torch.stack(losses))
    for worker in range(N):
        for mine, theirs in zip(sim._workers.gradients[worker], gradients[worker], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("engine", engines.NAMES)
def test_gradients_are_written_not_accumulated(engine):
    sim = simulator(mlp(), engine=engine)
    batches = list(zip(*data(), strict=True))
    sim._engine.gradients(cross_entropy, batches)
    first = sim.g.clone()
    sim._engine.gradients(cross_entropy, batches)
    assert torch.equal(sim.g, first)
    assert first.abs().sum() > 0


@pytest.mark.parametrize("engine", engines.NAMES)
def test_parameter_that_the_loss_does_not_use_has_zero_gradient(engine):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(FEATURES, CLASSES), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    sim = simulator(Unused().double(), engine=engine)
    sim.g.fill_(7.0)
    sim._engine.gradients(cross_entropy, list(zip(*data(), strict=True)))
    assert all((view == 0).all() for view in sim._workers.stacked_gradients[2:])
    assert all((view != 7).all() for view in sim._workers.stacked_gradients)


def test_threads_give_the_bits_of_the_loop_on_one_thread(two_threads):
    batches = list(zip(*data(16, 8, torch.float32), strict=True))
    sim = simulator(mlp(torch.float32), 16, engine="threads")
    sim._engine.gradients(cross_entropy, batches)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    loop = engines.LoopEngine(sim._workers)
    found = sim.g.clone()
    loop.gradients(cross_entropy, batches)
    assert torch.equal(found, sim.g)


def test_threads_use_one_thread_inside_operators_and_follow_a_change_of_the_number(two_threads):
    seen = []

    def closure(model, batch):
        seen.append(torch.get_num_threads())
        return cross_entropy(model, batch)

    sim = simulator(mlp(), engine="threads")
    batches = list(zip(*data(), strict=True))
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        sim._engine.gradients(closure, batches)
        assert torch.get_num_threads() == threads
    assert seen == [1] * (3 * N)


def test_threads_leave_the_setting_that_new_threads_take_over(two_threads):
    simulator(mlp(), engine="threads").step(F.cross_entropy, data())
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]


def test_threads_report_the_error_of_a_worker_and_work_again(two_threads):
    sim = simulator(mlp(), engine="threads")
    batches = list(zip(*data(), strict=True))

    def closure(model, batch):
        if model is sim.models[2]:
            raise KeyError("no such thing")
        return cross_entropy(model, batch)

    with pytest.raises(KeyError, match="no such thing"):
        sim._engine.gradients(closure, batches)
    sim._engine.gradients(cross_entropy, batches)


def test_threads_refuse_random_numbers_and_leave_the_generator_as_it_was(two_threads):
    sim = Simulator(nn.Sequential(nn.Dropout(), mlp()), topology.ring(N), "dsgd", lr=0.1, engine="threads")
    torch.manual_seed(3)
    before, x = torch.get_rng_state(), sim.opt.x.clone()
    with pytest.raises(ValueError, match="engine='threads' can't run a model or loss that draws random numbers"):
        sim.step(F.cross_entropy, data())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(sim.opt.x, x)
    sim.eval()
    sim.step(F.cross_entropy, data())


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_dropout_differs_between_workers(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, CLASSES, bias=False)).double()
    sim = Simulator(model, topology.complete(N), "dsgd", lr=0.1, engine=engine)
    x, y = torch.ones(N, BATCH, FEATURES, dtype=torch.float64), torch.zeros(N, BATCH, dtype=torch.int64)
    losses = sim.step(F.cross_entropy, (x, y))
    assert len(set(losses.tolist())) == N
    sim.eval()
    losses = sim.step(F.cross_entropy, (x, y))
    assert len(set(losses.tolist())) == 1


@pytest.mark.parametrize("engine", ["loop", "threads"])
def test_autocast_sees_new_parameters_in_every_step_of_one_context(engine, two_threads):
    def train(outside):
        sim = simulator(mlp(torch.float32), engine=engine)
        for step in range(3):
            if outside:
                sim.step(F.cross_entropy, data(dtype=torch.float32, seed=step))
            else:
                with torch.autocast("cpu", torch.bfloat16):
                    sim.step(F.cross_entropy, data(dtype=torch.float32, seed=step))
        return sim.opt.x

    with torch.autocast("cpu", torch.bfloat16):
        one_context = train(True)
    assert torch.equal(one_context, train(False))
    assert not torch.equal(one_context, train(True))


def test_vmap_names_the_module_it_can_not_run():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    sim = simulator(nn.Sequential(nn.Linear(FEATURES, CLASSES), Branching()).double(), engine="vmap")
    before = sim.opt.x.clone()
    with pytest.raises(ValueError, match=r"engine='vmap' can't run Branching \(1\): .*data-dependent control flow"):
        sim.step(F.cross_entropy, data())
    assert torch.equal(sim.opt.x, before)
    simulator(sim.models[0]).step(F.cross_entropy, data())


class ReplacesBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x


def test_vmap_refuses_a_buffer_that_is_replaced_and_the_loop_keeps_it():
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES), ReplacesBuffer()).double()
    sim = simulator(model, engine="vmap")
    with pytest.raises(ValueError, match=r"can't run ReplacesBuffer \(1\): it replaces its buffer '1.count'"):
        sim.step(F.cross_entropy, data())
    assert sim.num_steps == 0
    assert all(worker[1].count == 0 for worker in sim.models)
    loop = simulator(model)
    loop.step(F.cross_entropy, data())
    loop.step(F.cross_entropy, data())
    assert [worker[1].count.item() for worker in loop.models] == [2.0] * N
    assert model[1].count == 0


def test_vmap_refuses_batches_of_different_shapes_and_different_modes():
    sim = simulator(mlp(), engine="vmap")
    x, y = data()
    batches = list(zip(x, y, strict=True))
    batches[2] = (x[2][:3], y[2][:3])
    with pytest.raises(ValueError, match=r"batch\[0\] of worker 2 is \[3, 5\] torch.float64, of worker 0 \[6, 5\]"):
        sim.step(F.cross_entropy, batches)
    sim.models[1].eval()
    with pytest.raises(ValueError, match="one training mode for all workers, but worker 1 differs"):
        sim.step(F.cross_entropy, (x, y))


@pytest.mark.parametrize("engine", engines.NAMES)
def test_closure_gets_the_module_and_batches_of_any_structure(engine):
    def closure(model, batch):
        return F.cross_entropy(model[0](batch["x"]) if len(model) == 1 else model(batch["x"]), batch["more"][0])

    x, y = data()
    batches = [{"x": x[i], "more": [y[i]]} for i in range(N)]
    sim, plain = simulator(mlp(), engine=engine), simulator(mlp())
    torch.testing.assert_close(sim.step_closure(closure, batches), plain.step(F.cross_entropy, (x, y)))
    torch.testing.assert_close(sim.opt.x, plain.opt.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"x": 1.0}] * N, "takes batches of tensors, tuples, lists and dicts, got float"),
        ([{"x": torch.ones(1)}, *[{"y": torch.ones(1)}] * (N - 1)], "the same keys in the batch of every worker"),
        ([(torch.ones(1),), *[(torch.ones(1), torch.ones(1))] * (N - 1)], "as many entries in the batch"),
    ],
)
def test_vmap_refuses_batches_it_can_not_stack(batches, message):
    with pytest.raises((TypeError, ValueError), match=message):
        simulator(mlp(), engine="vmap").step_closure(cross_entropy, batches)


@pytest.mark.parametrize("engine", engines.NAMES)
@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda model, batch: 1.0, "the loss must be a torch.Tensor, got float"),
        (
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
            r"a scalar, got shape \[6\]",
        ),
        (lambda model, batch: batch[1].sum(), "must be a floating-point number, got torch.int64"),
    ],
)
def test_a_wrong_loss_is_refused(engine, closure, message):
    sim = simulator(mlp(), engine=engine)
    before = sim.opt.x.clone()
    with pytest.raises((TypeError, ValueError), match=message):
        sim.step_closure(closure, list(zip(*data(), strict=True)))
    assert torch.equal(sim.opt.x, before)
    assert sim.num_steps == 0


@pytest.mark.parametrize("engine", ["loop", "threads"])  # torch.func gives zero gradients there
def test_a_loss_without_gradient_is_refused(engine):
    sim = simulator(mlp(), engine=engine)
    with pytest.raises(ValueError, match="does not depend on the trainable parameters"):
        sim.step_closure(lambda model, batch: batch[0].sum(), list(zip(*data(), strict=True)))


def test_sparse_gradient_is_refused_with_its_name():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, CLASSES))
    sim = Simulator(model, topology.ring(2), "dsgd", lr=0.1)
    with pytest.raises(ValueError, match=r"the gradient of 0.weight is torch.sparse_coo; only dense"):
        sim.step(F.cross_entropy, (torch.ones(2, 3, 2, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)))


def test_auto_leaves_parameters_buffers_and_generators_as_they_were(two_threads):
    model = nn.Sequential(nn.Dropout(0.3), batch_norm(), ReplacesBuffer())
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)

    def closure(model, batch):
        return cross_entropy(model, batch) * (1 + random.random() + np.random.rand())  # noqa: NPY002

    batches = list(zip(*data(), strict=True))
    sim = Simulator(model, topology.ring(N), "qg_dsgdm", lr=0.1, engine="auto")
    assert sim.engine == "auto"
    sim.step_closure(closure, batches)
    assert sim.engine == "loop"  # dropout rules out threads, the replaced buffer vmap
    assert list(sim.engine_seconds) == ["loop"]
    after = torch.get_rng_state()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    plain = Simulator(model, topology.ring(N), "qg_dsgdm", lr=0.1)
    plain.step_closure(closure, batches)
    assert torch.equal(sim.opt.x, plain.opt.x)
    for mine, theirs in zip(sim.models, plain.models, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), theirs.buffers(), strict=True))
    assert torch.equal(torch.get_rng_state(), after)


def test_auto_measures_all_that_can_run_and_keeps_one(two_threads):
    sim = simulator(mlp(), engine="auto")
    sim.step(F.cross_entropy, data())
    assert sorted(sim.engine_seconds) == ["loop", "threads", "vmap"]
    assert sim.engine in engines.NAMES
    assert all(seconds > 0 for seconds in sim.engine_seconds.values())
    assert sim.num_steps == 1


def test_auto_reports_what_the_loop_reports():
    sim = simulator(mlp(), engine="auto")
    with pytest.raises(ValueError, match="the loss must be a scalar"):
        sim.step(lambda output, targets: output, data())
    assert sim.engine == "auto"


def test_threads_are_for_the_cpu():
    sim = Simulator(mlp().to("meta"), topology.ring(2), "dsgd", lr=0.1)
    with pytest.raises(ValueError, match="engine='threads' is for models on the CPU, these are on meta"):
        engines.make("threads", sim._workers)
