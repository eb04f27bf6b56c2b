"""What every torch.optim.Optimizer must do: groups, schedulers, closures, checkpoints, copies, hooks, errors.

The list of what must hold is PyTorch's own test/test_optim.py.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from qgm_ext import topology
from qgm_ext.algorithms import Algorithm, get
from qgm_ext.optim import DSGD, QGSGD, DecentralizedOptimizer, DSGDm

OPTIMIZERS = [
    pytest.param(lambda params, **kw: DSGD(params, **{"lr": 0.05, **kw}), id="dsgd"),
    pytest.param(lambda params, **kw: DSGDm(params, **{"lr": 0.05, **kw}), id="dsgdm"),
    pytest.param(lambda params, **kw: QGSGD(params, **{"lr": 0.05, **kw}), id="qgsgd"),
    pytest.param(lambda params, **kw: QGSGD(params, **{"lr": 0.05, "local_step": 3, **kw}), id="qgsgd-local-step"),
]
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(batch(step, dtype)).square().sum().backward()
        optimizer.step()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def through_file(obj: object) -> object:
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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


# Checkpoints ----------------------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("at", [0, 1, 4])
def test_resumed_run_equals_uninterrupted_one(make, dtype: torch.dtype, at: int) -> None:
    model = mlp(dtype)
    optimizer = make(model.parameters(), weight_decay=0.01)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 9)
    stopped, saved = None, None
    for step in range(9):
        if step == at:
            saved = through_file([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
        train(model, optimizer, 1, start=step)
        scheduler.step()

    stopped = mlp(dtype)
    again = make(stopped.parameters(), weight_decay=0.01)
    schedule = lr_scheduler.CosineAnnealingLR(again, 9)
    for target, state in zip((stopped, again, schedule), saved, strict=True):
        target.load_state_dict(state)
    for step in range(at, 9):
        train(stopped, again, 1, start=step)
        schedule.step()
    assert_same(stopped, model)
    for p, q in zip(stopped.parameters(), model.parameters(), strict=True):
        assert again.state[p].keys() == optimizer.state[q].keys()
        for name, value in again.state[p].items():
            assert value.dtype == optimizer.state[q][name].dtype
            assert torch.equal(value, optimizer.state[q][name])


def test_state_dict_has_the_layout_of_torch() -> None:
    model = mlp(torch.bfloat16)
    optimizer = QGSGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}], 0.1, local_step=2
    )
    assert optimizer.state_dict()["state"] == {}
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3]]
    assert [group["lr"] for group in saved["param_groups"]] == [0.1, 0.2]
    assert saved["param_groups"][0].keys() == {
        "params",
        "lr",
        "momentum",
        "qg_momentum",
        "nesterov",
        "weight_decay",
        "local_step",
        "maximize",
        "algorithm",
    }
    for index, p in enumerate(model.parameters()):
        entry = saved["state"][index]
        assert entry.keys() == {"qg_momentum_buffer", "difference_sum", "step"}
        assert entry["qg_momentum_buffer"].shape == p.shape
        assert entry["qg_momentum_buffer"].dtype == torch.float32
        assert entry["step"].item() == 2


def test_state_dict_is_alive_and_loading_copies() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other = QGSGD(mlp().parameters(), 0.05)
    other.load_state_dict(saved)
    train(model, optimizer, 1, start=2)
    assert not torch.equal(saved["state"][0]["qg_momentum_buffer"], kept["state"][0]["qg_momentum_buffer"])
    loaded = other.state[other.param_groups[0]["params"][0]]
    assert torch.equal(loaded["qg_momentum_buffer"], kept["state"][0]["qg_momentum_buffer"])
    assert loaded["step"].item() == 2


def test_state_of_float64_loads_into_other_dtypes_without_touching_hyperparameters() -> None:
    model = mlp(torch.float64)
    optimizer = QGSGD(model.parameters(), 0.05)
    train(model, optimizer, 2)
    other = QGSGD(mlp(torch.bfloat16).parameters(), 0.5, momentum=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.05
    assert other.param_groups[0]["momentum"] == 0.9
    loaded = other.state[other.param_groups[0]["params"][0]]["qg_momentum_buffer"]
    assert torch.equal(loaded, optimizer.state[model[0].weight]["qg_momentum_buffer"].float())


def test_step_count_loads_as_number() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05, local_step=2)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = 3
    optimizer.load_state_dict(saved)
    assert optimizer.state[model[0].weight]["step"].item() == 3
    saved["state"][0]["step"] = 2.5
    with pytest.raises(ValueError, match=r"state\[0\]\['step'\] .* whole number of at least 0, got 2.5"):
        optimizer.load_state_dict(saved)


def broken(saved: dict, how: str) -> dict:
    if how == "no state":
        del saved["state"]
    elif how == "one group less":
        saved["param_groups"].pop()
    elif how == "one parameter less":
        saved["param_groups"][0]["params"].pop()
    elif how == "other shape":
        saved["state"][0]["qg_momentum_buffer"] = torch.zeros(3)
    elif how == "integers":
        saved["state"][0]["qg_momentum_buffer"] = torch.zeros(8, 5, dtype=torch.int64)
    elif how == "no vector":
        del saved["state"][1]["qg_momentum_buffer"]
    elif how == "no hyper-parameter":
        del saved["param_groups"][0]["qg_momentum"]
    elif how == "nan":
        saved["param_groups"][0]["lr"] = math.nan
    elif how == "local_step":
        saved["param_groups"][0]["local_step"] = 4
    return saved


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no state", "state_dict lacks state"),
        ("one group less", "loaded state dict has a different number of parameter groups: it has 0, the optimizer 1"),
        (
            "one parameter less",
            "doesn't match the size of optimizer's group: group 0 has 3 parameters there and 4 here",
        ),
        ("other shape", r"state\[0\]\['qg_momentum_buffer'\] .* \[8, 5\], like its parameter, got torch.float32 \[3\]"),
        ("integers", r"must be floating-point \[8, 5\]"),
        ("no vector", r"state\[1\] of the state_dict lacks qg_momentum_buffer; it has step"),
        ("no hyper-parameter", r"param_groups\[0\] of the state_dict lacks qg_momentum"),
        ("nan", "lr must be a finite number of at least 0, got nan"),
        ("local_step", r"state\[0\] of the state_dict lacks difference_sum"),
    ],
)
def test_damaged_state_dict_is_refused_and_nothing_lost(how: str, message: str) -> None:
    model, other = mlp(), mlp()
    optimizer, undisturbed = QGSGD(model.parameters(), 0.05), QGSGD(other.parameters(), 0.05)
    train(model, optimizer, 3)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(copy.deepcopy(optimizer.state_dict()), how))
    train(model, optimizer, 2, start=3)
    train(other, undisturbed, 5)
    assert_same(model, other)


FOREIGN = [
    lambda p: torch.optim.SGD(p, 0.1),
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p, 0.1),
    lambda p: DSGD(p, 0.1),
    lambda p: DSGDm(p, 0.1),
    lambda p: QGSGD(p, 0.1),
]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("mine", range(3, 6), ids=["dsgd", "dsgdm", "qgsgd"])
@pytest.mark.parametrize("theirs", range(6), ids=["sgd", "sgd-momentum", "adam", "dsgd", "dsgdm", "qgsgd"])
def test_state_dict_of_another_optimizer_is_refused(mine: int, theirs: int, steps: int) -> None:
    if mine == theirs:
        return
    model = mlp()
    other = FOREIGN[theirs](model.parameters())
    train(model, other, steps)
    optimizer = FOREIGN[mine](model.parameters())
    with pytest.raises(
        ValueError, match=r"state_dict is of (another optimizer|algorithm '\w+'): \w+ needs one of its own"
    ):
        optimizer.load_state_dict(other.state_dict())


def test_state_dict_must_be_a_dict() -> None:
    with pytest.raises(TypeError, match="state_dict must be a dict, got list"):
        QGSGD(mlp().parameters(), 0.1).load_state_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@every_optimizer
def test_copy_of_model_and_optimizer_goes_on_alone(make, how: str) -> None:
    model = mlp()
    optimizer = make(model.parameters(), weight_decay=0.01, on_nonfinite="skip")
    train(model, optimizer, 4)
    if how == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        other, copied = torch.load(file, weights_only=False)
    assert copied.on_nonfinite == "skip"
    assert all(p is q for p, q in zip(other.parameters(), copied.param_groups[0]["params"], strict=True))
    train(other, copied, 3, start=4)
    after_copy = [p.detach().clone() for p in other.parameters()]
    train(model, optimizer, 3, start=4)
    assert_same(other, model)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), after_copy, strict=True))


def test_deepcopy_copies_all_public_attributes() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05, topology=topology.complete(1))
    train(model, optimizer, 1)
    copied = copy.deepcopy(optimizer)
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    assert public == {name for name in dir(copied) if not name.startswith("_")}
    assert copied.topology == optimizer.topology
    assert copied.defaults == optimizer.defaults


def test_pickled_optimizer_is_not_larger_than_its_state() -> None:
    params = [nn.Parameter(torch.zeros(1000)) for _ in range(20)]
    optimizer = QGSGD(params, 0.1)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.__getstate__()["state"]
    assert all(v.untyped_storage().nbytes() == 4000 for s in state.values() for k, v in s.items() if k != "step")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() < 1.2 * 4000 * 20 + 30_000


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


# Wrong arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr must be a finite number of at least 0, got -0.1"),
        ({"lr": math.nan}, ValueError, "lr must be a finite number of at least 0, got nan"),
        ({"lr": math.inf}, ValueError, "lr must be a finite number"),
        ({"lr": "0.1"}, ValueError, "lr must be a finite number of at least 0, got '0.1'"),
        ({"lr": None}, ValueError, "lr must be a finite number of at least 0, got None"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, r"lr must be a number or a tensor of one element, .* \[2\]"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.5}, ValueError, r"momentum must be in \[0, 1\), got -0.5"),
        ({"qg_momentum": 1.1}, ValueError, r"qg_momentum must be in \[0, 1\], got 1.1"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be a finite number of at least 0, got -1"),
        ({"local_step": 0}, ValueError, "local_step must be an integer of at least 1, got 0"),
        ({"local_step": 1.5}, ValueError, "local_step must be an integer of at least 1, got 1.5"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
        ({"maximize": "yes"}, TypeError, "maximize must be True or False, got 'yes'"),
        ({"topology": "ring"}, TypeError, "topology must be a qgm_ext.topology.Topology or None, got str"),
        ({"foreach": True}, TypeError, "foreach"),
        ({"fused": True}, TypeError, "fused"),
        ({"differentiable": True}, TypeError, "differentiable"),
        ({"capturable": True}, TypeError, "capturable"),
    ],
    ids=str,
)
def test_wrong_argument(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QGSGD([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, **arguments})
    if "topology" not in arguments and "f" not in message[:1] and error is ValueError:
        with pytest.raises(error, match=message):
            QGSGD([{"params": [nn.Parameter(torch.zeros(2))], **arguments}], 0.1)


@every_optimizer
def test_wrong_parameters(make) -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        make([])
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts, but got"):
        make(p)
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors, but one of the params is int"):
        make([p, 3])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        make([p * 2])
    with pytest.raises(TypeError, match="ordered collections"):
        make([{"params": {p}}])
    with pytest.raises(ValueError, match="must not hold a parameter twice"):
        make([p, q, p])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        make([{"params": p}, {"params": [q, p]}])
    with pytest.raises(ValueError, match="all optimizer params should be with/without names"):
        make([("a", p), q])
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        make([{"params": [p]}, {"params": [("q", q)]}])
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"parameters must be float64, float32, bfloat16 or float16, got"):
            make([nn.Parameter(torch.zeros(2, dtype=dtype))])
    with pytest.raises(TypeError, match=r"must be float64, float32, bfloat16 or float16, got torch\.int64"):
        make([torch.zeros(2, dtype=torch.int64)])


def test_failed_add_param_group_leaves_the_optimizer() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    extra = nn.Parameter(torch.zeros(2))
    for group in ({"params": extra, "momentum": 2.0}, {"params": extra, "algorithm": "dsgd"}):
        with pytest.raises(ValueError, match=r"momentum must be|algorithm of a parameter group must be 'qg_dsgdm'"):
            optimizer.add_param_group(group)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([extra])  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, 1)


def test_hyperparameter_spoilt_between_steps_is_refused_and_nothing_lost() -> None:
    model = mlp()
    optimizer = QGSGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], 0.05)
    train(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    for name, value in (("lr", math.nan), ("lr", -1.0), ("momentum", 1.5), ("nesterov", None)):
        old = optimizer.param_groups[1][name]
        optimizer.param_groups[1][name] = value
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            train(model, optimizer, 1)
        optimizer.param_groups[1][name] = old
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# One worker or many ---------------------------------------------------------------------------------------------------


def test_topology_of_one_worker_is_accepted() -> None:
    model, other = mlp(), mlp()
    train(model, QGSGD(model.parameters(), 0.05, topology=topology.ring(1)), 3)
    train(other, QGSGD(other.parameters(), 0.05), 3)
    assert_same(model, other)


def test_topology_of_many_workers_needs_processes() -> None:
    with pytest.raises(ValueError, match=r"16 workers, but this is a single process: .*torchrun --nproc-per-node 16"):
        QGSGD(mlp().parameters(), 0.05, topology=topology.ring(16))


def test_group_needs_torch_distributed() -> None:
    with pytest.raises(ValueError, match=r"group needs torch.distributed, which is not initialised, got object"):
        QGSGD(mlp().parameters(), 0.05, group=object())  # type: ignore[arg-type]


@pytest.fixture
def process_group():
    """The default process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_process_group_of_one_process_is_one_worker(process_group) -> None:
    model, other = mlp(), mlp()
    train(model, QGSGD(model.parameters(), 0.05, topology=topology.ring(1), group=process_group), 3)
    train(other, QGSGD(other.parameters(), 0.05), 3)
    assert_same(model, other)
    with pytest.raises(ValueError, match="topology has 4 workers, but the process group has 1"):
        QGSGD(mlp().parameters(), 0.05, topology=topology.ring(4))


def test_process_group_of_many_processes_needs_a_topology(process_group, monkeypatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    with pytest.raises(ValueError, match=r"the process group has 4 workers, so topology must say .* got None"):
        QGSGD(mlp().parameters(), 0.05)


def test_process_group_of_others_is_refused(process_group) -> None:
    with pytest.raises(ValueError, match="group must have this process as a member"):
        QGSGD(mlp().parameters(), 0.05, group=dist.GroupMember.NON_GROUP_MEMBER)


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
