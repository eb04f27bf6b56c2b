"""Flat buffers under the optimizers: lost views keep values, changes count, gradients may come any way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qgm_ext.optim import QGSGD, DecentralizedOptimizer, DSGDm
from qgm_ext.optim import flat_parameters as flat_module
from small_training import assert_equal, mlp, train, values


def undisturbed(steps: int) -> list[Tensor]:
    model = mlp()
    train(model, QGSGD(model.parameters(), 0.05, weight_decay=0.01), steps)
    return values(model)


def storages(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


# Disturbances that change no value: the run must go on with the same bits ---------------------------------------------


def clone_data(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def clone_one(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    model[2].weight.data = model[2].weight.data.clone()


def reload_model(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def to_and_back(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    model.to(torch.float64)
    model.to(torch.float32)


def state_cloned(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    for entry in optimizer.state.values():
        for name in entry:
            entry[name] = entry[name].clone()


def state_replaced(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    for p in list(optimizer.state):
        optimizer.state[p] = {name: value.clone() for name, value in optimizer.state.pop(p).items()}


def own_state_dict(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def freeze_and_thaw(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer.zero_grad()
    optimizer.step()
    for p in model.parameters():
        p.requires_grad_(True)


def shared_memory(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    model.share_memory()


def other_optimizer(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    """Another optimizer takes the parameters into its own buffer, and steps with lr 0."""
    other = QGSGD(model.parameters(), 0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    other.step()


def shuffled_group(model: nn.Module, optimizer: DecentralizedOptimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


DISTURBANCES = [
    clone_data,
    clone_one,
    reload_model,
    to_and_back,
    state_cloned,
    state_replaced,
    own_state_dict,
    freeze_and_thaw,
    shared_memory,
    other_optimizer,
    shuffled_group,
]


@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("large", [None, 20], ids=["gathered", "some-read-in-place"])
def test_disturbance_keeps_bits(disturb, large, monkeypatch) -> None:
    if large is not None:
        monkeypatch.setitem(flat_module.LARGE, "cpu", large)
    expected = undisturbed(7)
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05, weight_decay=0.01)
    if disturb is not shared_memory:
        disturb(model, optimizer)  # before anything is bound
    train(model, optimizer, 4)
    disturb(model, optimizer)
    train(model, optimizer, 1, start=4)
    disturb(model, optimizer)
    train(model, optimizer, 2, start=5)
    assert_equal(values(model), expected)
    assert len(storages(model)) == 1, "parameters are views of one buffer again"


def test_parameters_become_views_and_small_changes_stay_in_place() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    assert len(storages(model)) == 4
    train(model, optimizer, 1)
    bound = storages(model)
    assert len(bound) == 1
    with torch.no_grad():
        model[0].weight.mul_(2.0)  # in place: the view stays
    reload_model(model, optimizer)
    train(model, optimizer, 3, start=1)
    assert storages(model) == bound


# Disturbances that change values: they must count ---------------------------------------------------------------------


def run_both(change, steps: int = 3) -> None:
    """The same change made to a run on flat buffers and to one of torch.optim.SGD, in float64."""
    models = [mlp(dtype=torch.float64) for _ in range(2)]
    optimizers = [
        DSGDm(models[0].parameters(), 0.05, 0.9, weight_decay=0.01),
        torch.optim.SGD(models[1].parameters(), 0.05, 0.9, weight_decay=0.01),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, steps)
        change(model, optimizer)
        train(model, optimizer, steps, start=steps)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def load_other_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict(mlp(seed=7, dtype=torch.float64).state_dict())


def load_other_model_assign(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p, q in zip(model.parameters(), mlp(seed=7, dtype=torch.float64).parameters(), strict=True):
        p.data = q.data


def write_in_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.1, 0.1)


def other_layout(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in (model[0].weight, model[2].weight):
        p.data = p.data.t().contiguous().t()


def swap_equal_shapes(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    a, b = model[0].weight, model[2].weight
    first = a.data.view(-1)[:24].view(3, 8)
    a.data = torch.cat([b.data.view(-1), torch.ones(16, dtype=b.dtype)]).view(8, 5)
    b.data = first


def delete_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[model[0].weight]


def clear_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def zero_momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["momentum_buffer"].zero_()


def double_momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["momentum_buffer"] = entry["momentum_buffer"] * 2


def replace_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As codes do that grow a model: a new Parameter takes the place and the state of an old one."""
    old = model[2].weight
    new = nn.Parameter(old.detach() * 0.5)
    model[2].weight = new
    optimizer.state[new] = optimizer.state.pop(old)
    params = optimizer.param_groups[0]["params"]
    params[next(i for i, p in enumerate(params) if p is old)] = new


def freeze_one(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[0].weight.requires_grad_(False)


def grow_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    extra = nn.Linear(3, 2).double()
    nn.init.ones_(extra.weight)
    nn.init.ones_(extra.bias)
    model.append(extra)
    optimizer.add_param_group({"params": extra.parameters(), "lr": 0.01})


@pytest.mark.parametrize(
    "change",
    [
        load_other_model,
        load_other_model_assign,
        write_in_place,
        other_layout,
        swap_equal_shapes,
        delete_state,
        clear_state,
        zero_momentum,
        double_momentum,
        replace_parameter,
        freeze_one,
        grow_group,
    ],
    ids=lambda f: f.__name__,
)
def test_change_counts_as_in_torch(change) -> None:
    run_both(change)


def test_two_states_exchanged() -> None:
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = DSGDm([a, b], 1.0, 0.5)
    a.grad, b.grad = torch.full((3,), 2.0), torch.full((3,), 4.0)
    optimizer.step()
    state = optimizer.state
    state[a], state[b] = state[b], state[a]
    a.grad, b.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert a.tolist() == [-4, -4, -4]  # 2 + 0.5 * 4
    assert b.tolist() == [-5, -5, -5]  # 4 + 0.5 * 2


def test_two_parameters_exchanged_by_data() -> None:
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    optimizer = DSGDm([a, b], 0.0)
    for p in (a, b):
        p.grad = torch.ones(3)
    optimizer.step()
    a.data, b.data = b.data, a.data
    optimizer.step()
    assert a.tolist() == [1, 1, 1]
    assert b.tolist() == [0, 0, 0]


# Gradients, however they come -----------------------------------------------------------------------------------------


def grad_set_none(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    model(x).square().sum().backward()


def grad_zeroed(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad(set_to_none=False)
    model(x).square().sum().backward()


def grad_zeroed_by_model(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().sum().backward()


def grad_assigned(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    params = list(model.parameters())
    for p, grad in zip(params, torch.autograd.grad(model(x).square().sum(), params), strict=True):
        p.grad = grad


def grad_assigned_transposed(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    grad_assigned(model, optimizer, x)
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad.t().contiguous().t() if p.dim() == 2 else p.grad.repeat_interleave(2)[::2]


def grad_in_two_parts(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    for _ in range(2):
        (0.5 * model(x).square().sum()).backward()


def grad_with_graph(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    params = list(model.parameters())
    for p, grad in zip(params, torch.autograd.grad(model(x).square().sum(), params, create_graph=True), strict=True):
        p.grad = grad


@pytest.mark.parametrize("large", [None, 20, 1], ids=["gathered", "some-read-in-place", "all-read-in-place"])
@pytest.mark.parametrize(
    "make",
    [
        grad_zeroed,
        grad_zeroed_by_model,
        grad_assigned,
        grad_assigned_transposed,
        grad_in_two_parts,
        grad_with_graph,
    ],
    ids=lambda f: f.__name__,
)
def test_gradients_may_come_any_way(make, large, monkeypatch) -> None:
    if large is not None:
        monkeypatch.setitem(flat_module.LARGE, "cpu", large)
    results = []
    for way in (grad_set_none, make):
        model = mlp(dtype=torch.float64)
        optimizer = QGSGD(model.parameters(), 0.05)
        for step in range(5):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            way(model, optimizer, x)
            grads = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            for p, grad in zip(model.parameters(), grads, strict=True):
                assert torch.equal(p.grad, grad), "step must not write gradients"
        results.append(values(model))
    assert_equal(*results)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has gradients of the parameter's dtype only")
@pytest.mark.parametrize("large", [None, 4], ids=["gathered", "large"])
def test_gradient_of_another_dtype_is_rounded_to_the_parameters(large, monkeypatch) -> None:
    if large is not None:
        monkeypatch.setitem(flat_module.LARGE, "cpu", large)
    p, q = (nn.Parameter(torch.ones(9, dtype=torch.bfloat16)) for _ in range(2))
    p.grad_dtype = torch.float32
    p.grad = torch.linspace(0, 1, 9)
    q.grad = p.grad.bfloat16()
    for parameter in (p, q):
        QGSGD([parameter], 0.1).step()
    assert torch.equal(p, q)


def test_maximize_leaves_gradients_alone(monkeypatch) -> None:
    for large in (1 << 18, 4):
        monkeypatch.setitem(flat_module.LARGE, "cpu", large)
        params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(5))]
        optimizer = DSGDm(params, 1.0, maximize=True)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step()
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params)
        assert all(torch.allclose(p, torch.full_like(p, 2.9)) for p in params)


def test_gradient_that_is_the_parameter_itself(monkeypatch) -> None:
    """Nonsense, but torch takes it; in place it would be read after it was overwritten."""
    monkeypatch.setitem(flat_module.LARGE, "cpu", 4)
    p = nn.Parameter(torch.ones(8))
    optimizer = DSGDm([p], 0.5, 0.0)
    for expected in (0.5, 0.25):
        p.grad = p.data
        optimizer.step()
        assert torch.equal(p, torch.full((8,), expected))


def test_gradient_that_is_momentum(monkeypatch) -> None:
    monkeypatch.setitem(flat_module.LARGE, "cpu", 4)
    p = nn.Parameter(torch.ones(8))
    optimizer = DSGDm([p], 0.5, 0.5)
    p.grad = torch.ones(8)
    optimizer.step()
    p.grad = optimizer.state[p]["momentum_buffer"]
    optimizer.step()
    assert torch.equal(p, torch.full((8,), 1 - 0.5 - 0.5 * 1.5))


def test_step_is_seen_by_autograd() -> None:
    """Backward through a graph from before the step must fail, as after torch.optim.SGD."""
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    loss = model(torch.ones(2, 5)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
