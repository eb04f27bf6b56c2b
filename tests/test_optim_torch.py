"""What every torch.optim.Optimizer must do: groups, schedulers, closures, hooks, tools; checkpoints are elsewhere.

The list of what must hold is PyTorch's own test/test_optim.py.
"""

from __future__ import annotations

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from qgm_ext.algorithms import Algorithm, get
from qgm_ext.optim import QGSGD, DecentralizedOptimizer, DSGDm
from small_training import assert_same, batch, every_optimizer, mlp, train

# Groups and hyper-parameters ------------------------------------------------------------------------------------------


def test_groups_have_their_own_hyperparameters() -> None:
    model = mlp(torch.float64)
    options = [{"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1}, {"nesterov": True, "maximize": True}]
    groups = [{"params": list(model[i].parameters()), **some} for i, some in zip((0, 2), options, strict=True)]
    optimizer = DSGDm(groups, 0.05, 0.8)
    other = copy.deepcopy(model)
    expected = torch.optim.SGD(
        [{"params": list(other[i].parameters()), **some} for i, some in zip((0, 2), options, strict=True)], 0.05, 0.8
    )
    train(model, optimizer, 6)
    train(other, expected, 6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_hyperparameters_may_change_between_steps() -> None:
    model, other = mlp(torch.float64), mlp(torch.float64)
    optimizer = DSGDm(model.parameters(), 0.05, 0.8)
    expected = torch.optim.SGD(other.parameters(), 0.05, 0.8)
    for step in range(6):
        for o in (optimizer, expected):
            o.param_groups[0].update(momentum=0.1 * (step + 1), weight_decay=0.01 * step, nesterov=step % 2 == 1)
            o.param_groups[0]["maximize"] = step == 3
        train(model, optimizer, 1, start=step)
        train(other, expected, 1, start=step)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_local_step_may_change_between_steps() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["local_step"] = 2
    train(model, optimizer, 3, start=2)
    assert all("difference_sum" in optimizer.state[p] for p in model.parameters())
    optimizer.param_groups[0]["local_step"] = 1
    train(model, optimizer, 1, start=5)
    assert all(list(optimizer.state[p]) == ["qg_momentum_buffer", "step"] for p in model.parameters())


@every_optimizer
def test_add_param_group_after_steps(make) -> None:
    model, other = mlp(), mlp()
    optimizer = make(model[0].parameters())
    train(model, optimizer, 3)
    optimizer.add_param_group({"params": model[2].parameters(), "weight_decay": 0.1})
    train(model, optimizer, 3, start=3)

    first, second = make(other[0].parameters()), make(other[2].parameters(), weight_decay=0.1)
    train(other, first, 3)
    for step in range(3, 6):
        second.zero_grad()
        train(other, first, 1, start=step)
        second.step()
    assert_same(model, other)


def test_named_parameters() -> None:
    model = mlp()
    optimizer = QGSGD(model.named_parameters(), 0.05)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    train(model, optimizer, 2)
    unnamed = QGSGD(mlp().parameters(), 0.05)
    unnamed.load_state_dict(optimizer.state_dict())
    assert unnamed.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]
    saved = QGSGD(model.parameters(), 0.05).state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"


@every_optimizer
def test_tensor_lr_is_a_number(make) -> None:
    results = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64), np.float64(0.1)):
        model = mlp()
        optimizer = make(model.parameters(), lr=lr)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(3):
            train(model, optimizer, 1, start=step)
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 * 0.5**3)
        results.append(model)
    for model in results[1:]:
        assert_same(model, results[0])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_tested() -> None:
    names = {
        name
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert names - {"LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_drives_it_like_torch_sgd(name: str) -> None:
    models = [mlp(torch.float64) for _ in range(2)]
    optimizers = [DSGDm(models[0].parameters(), 0.05), torch.optim.SGD(models[1].parameters(), 0.05, 0.9)]
    trace: list[list[float]] = []
    for model, optimizer in zip(models, optimizers, strict=True):
        scheduler = SCHEDULERS[name](optimizer)
        rates = []
        for step in range(7):
            train(model, optimizer, 1, start=step)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates += [optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]]
        trace.append(rates)
    assert trace[0] == trace[1]
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@every_optimizer
def test_closure_is_evaluated_once_with_gradients(make) -> None:
    model, other = mlp(), mlp()
    optimizer, plain = make(model.parameters()), make(other.parameters())
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch(0)).square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    train(other, plain, 1)
    assert_same(model, other)
    assert plain.step() is None


@every_optimizer
def test_every_optimizer_goes_downhill(make) -> None:
    """Rosenbrock's function with two parameters, as in PyTorch's tests."""
    p = nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = make([p], lr=1e-3)
    start = ((p - 1).square().sum()).item()
    for _ in range(500):
        optimizer.zero_grad()
        (((1 - p[0]) ** 2) + 100 * (p[1] - p[0] ** 2) ** 2).backward()
        optimizer.step()
    assert (p - 1).square().sum().item() < 0.8 * start


@every_optimizer
def test_zero_grad_frees_gradients_by_default(make) -> None:
    model = mlp()
    optimizer = make(model.parameters())
    train(model, optimizer, 1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# Hooks and tools ------------------------------------------------------------------------------------------------------


def test_step_hooks_are_called_in_order() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    calls = []
    before = optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    after = optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda o, a, k: calls.append("global"))
    try:
        train(model, optimizer, 1)
    finally:
        everywhere.remove()
    before.remove()
    after.remove()
    train(model, optimizer, 1)
    assert calls == ["before", "after", "global"]


def test_step_pre_hook_may_replace_arguments() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 42), {}))
    assert optimizer.step() == 42


def test_state_dict_hooks_are_called() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    train(model, optimizer, 1)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 1})
    saved = optimizer.state_dict()
    assert saved["extra"] == 1

    def in_place(o: torch.optim.Optimizer, state: dict) -> None:
        calls.append("in place")
        state["param_groups"] = [{**state["param_groups"][0], "lr": 0.3}]

    def replaced(o: torch.optim.Optimizer, state: dict) -> dict:
        calls.append("replaced")
        return {**state, "param_groups": [{**state["param_groups"][0], "momentum": 0.2}]}

    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.register_load_state_dict_pre_hook(replaced)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(saved)
    assert calls == ["save", "in place", "replaced", "loaded"]
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["momentum"] == 0.2
    assert saved["param_groups"][0]["lr"] == 0.05


def test_profiler_shows_the_step_by_class_name() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, 1)
    names = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#QGSGD.step" in names
    assert "Optimizer.zero_grad#QGSGD.zero_grad" in names


def test_repr_shows_groups() -> None:
    text = repr(QGSGD(mlp().parameters(), 0.05))
    assert text.startswith("QGSGD (\nParameter Group 0\n")
    assert "    qg_momentum: 0.9\n" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_scaler_skips_overflow_and_unscales(dtype: torch.dtype) -> None:
    model, other = mlp(dtype), mlp(dtype)
    optimizer, plain = QGSGD(model.parameters(), 0.05), QGSGD(other.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    for step in range(5):
        optimizer.zero_grad()
        loss = model(batch(step, dtype)).square().sum()
        scaler.scale(loss).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            train(other, plain, 1, start=step)
    assert scaler.get_scale() == 128.0
    assert_same(model, other)
    assert optimizer.state[model[0].weight]["step"].item() == 4


def test_autocast_with_grad_scaler_and_clipping() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch(0)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_averaged_model_and_clipping_tools_work_on_views() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(3):
        train(model, optimizer, 1, start=step)
        average.update_parameters(model)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(2 * vector, model.parameters())
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()).detach(), 2 * vector)


@pytest.mark.slow
def test_compiled_model_trains() -> None:
    model, other = mlp(), mlp()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer, plain = QGSGD(compiled.parameters(), 0.05), QGSGD(other.parameters(), 0.05)
    train(compiled, optimizer, 4)
    train(other, plain, 4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.slow
def test_step_inside_a_compiled_function() -> None:
    model, other = mlp(), mlp()
    optimizer, plain = QGSGD(model.parameters(), 0.05), QGSGD(other.parameters(), 0.05)

    @torch.compile(backend="eager")
    def compiled_step() -> None:
        optimizer.step()

    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).square().sum().backward()
        compiled_step()
    train(other, plain, 3)
    assert_same(model, other)


def test_another_algorithm_costs_a_few_lines() -> None:
    class Heavy(DecentralizedOptimizer):
        family = "heavy"

        def __init__(self, params, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        def make_algorithm(self, group) -> Algorithm:
            return get("dsgdm", lr=group["lr"], momentum=0.5)

    model, other = mlp(), mlp()
    train(model, Heavy(model.parameters(), 0.05), 3)
    train(other, DSGDm(other.parameters(), 0.05, 0.5), 3)
    assert_same(model, other)
