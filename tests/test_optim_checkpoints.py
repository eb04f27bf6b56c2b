"""The optimizers' state_dict, load_state_dict and copies: the same bits afterwards, and what is refused.

The list of what must hold is PyTorch's own test/test_optim.py.
"""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from qgm_ext import topology
from qgm_ext.optim import DSGD, QGSGD, DSGDm
from small_training import assert_same, every_optimizer, mlp, train


def through_file(obj: object) -> object:
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
