"""Flat buffers under the optimizers: what throws views away, moves or reshapes parameters keeps their values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qgm_ext.optim import QGSGD, DecentralizedOptimizer, DSGDm
from qgm_ext.optim import flat_parameters as flat_module


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0, dtype=torch.float32) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 5, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert left.dtype == right.dtype
        assert torch.equal(left, right), f"parameter {i}"


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
        train(model, optimizer, steps, dtype=torch.float64)
        change(model, optimizer)
        train(model, optimizer, steps, start=steps, dtype=torch.float64)
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


# Odd parameters -------------------------------------------------------------------------------------------------------


def test_zero_element_and_scalar_parameters() -> None:
    params = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0))]
    optimizer = QGSGD(params, 0.5)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert params[0].shape == (0, 3)
    assert params[1].shape == ()
    assert params[1].item() < 2.0
    assert optimizer.state[params[0]]["qg_momentum_buffer"].shape == (0, 3)

    only = [nn.Parameter(torch.zeros(0, 3))]
    optimizer = QGSGD(only, 0.5)
    only[0].grad = torch.zeros(0, 3)
    optimizer.step()
    assert only[0].shape == (0, 3)


@pytest.mark.parametrize("large", [None, 50], ids=["gathered", "read-in-place"])
def test_channels_last_is_kept(large, monkeypatch) -> None:
    if large is not None:
        monkeypatch.setitem(flat_module.LARGE, "cpu", large)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
        model.to(memory_format=memory_format)
        optimizer = QGSGD(model.parameters(), 0.01)
        for step in range(3):
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            model(x.to(memory_format=memory_format)).square().sum().backward()
            optimizer.step()
            if step == 1:  # in the middle of a run
                model.to(memory_format=memory_format)
        assert model[0].weight.is_contiguous(memory_format=memory_format)
        momentum = optimizer.state[model[0].weight]["qg_momentum_buffer"]
        assert momentum.stride() == model[0].weight.stride()
        results.append(values(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_change_to_channels_last_in_the_middle_keeps_momentum() -> None:
    results = []
    for change in (False, True):
        p = nn.Parameter(torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4))
        optimizer = QGSGD([p], 0.01)
        for step in range(4):
            if change and step == 2:
                p.data = p.data.to(memory_format=torch.channels_last)
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        assert p.is_contiguous(memory_format=torch.channels_last) is change
        results += [[p.detach(), optimizer.state[p]["qg_momentum_buffer"]]]
    assert_equal(*results)


def test_parameter_with_gaps_in_memory() -> None:
    base = torch.arange(12.0)
    p = nn.Parameter(base.view(3, 4)[:, :2])
    optimizer = DSGDm([p], 1.0, 0.0)
    p.grad = torch.ones(3, 2)
    optimizer.step()
    assert p.tolist() == [[-1, 0], [3, 4], [7, 8]]
    assert base.tolist() == list(range(12))


@pytest.mark.parametrize("order", [1, -1])
def test_mixed_dtypes(order: int) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32][::order]
    params = [nn.Parameter(torch.ones(7, dtype=dtype)) for dtype in dtypes]
    alone = [nn.Parameter(torch.ones(7, dtype=dtype)) for dtype in dtypes]
    together, separate = QGSGD(params, 0.1), [QGSGD([p], 0.1) for p in alone]
    for step in range(4):
        for p, q in zip(params, alone, strict=True):
            p.grad = torch.full_like(p, 0.3 + step)
            q.grad = p.grad.clone()
        together.step()
        for optimizer in separate:
            optimizer.step()
    assert_equal([p.detach() for p in params], [p.detach() for p in alone])
    assert [p.dtype for p in params] == dtypes


def test_model_to_other_dtype_keeps_float32_momentum() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    train(model, optimizer, 3)
    before = [optimizer.state[p]["qg_momentum_buffer"].clone() for p in model.parameters()]
    model.to(torch.bfloat16)
    optimizer.param_groups[0]["lr"] = 0.0  # leaves momentum as it is
    train(model, optimizer, 1, start=3, dtype=torch.bfloat16)
    assert_equal([optimizer.state[p]["qg_momentum_buffer"] for p in model.parameters()], before)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_parameter_shared_between_modules_is_stepped_once() -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head).double()
    other = copy.deepcopy(model)
    assert other[0].weight is other[1].weight
    optimizer = DSGDm(model.parameters(), 0.1)
    expected = torch.optim.SGD(other.parameters(), 0.1, 0.9)
    for m, o in ((model, optimizer), (other, expected)):
        for _ in range(3):
            o.zero_grad()
            m(torch.arange(6)).square().sum().backward()
            o.step()
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model[0].weight, other[0].weight, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_keep_their_memory_and_have_no_state() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    pointer = model[0].weight.data_ptr()
    optimizer = QGSGD(model.parameters(), 0.05, weight_decay=0.1)
    frozen = model[0].weight.detach().clone()
    train(model, optimizer, 2)
    assert model[0].weight.data_ptr() == pointer
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight not in optimizer.state
    model[0].requires_grad_(True)
    train(model, optimizer, 2, start=2)
    assert not torch.equal(model[0].weight, frozen)
    assert optimizer.state[model[0].weight]["step"].item() == 2
    assert optimizer.state[model[2].weight]["step"].item() == 4


def test_lazy_module_is_bound_when_it_has_a_shape() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    optimizer = QGSGD(model.parameters(), 0.1)
    optimizer.step()
    model(torch.ones(2, 4)).sum().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_state_takes_one_vector_of_float32() -> None:
    params = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)) for _ in range(10)]
    optimizer = QGSGD(params, 0.1)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = {
        v.untyped_storage().data_ptr(): v.untyped_storage().nbytes()
        for s in optimizer.state.values()
        for v in s.values()
    }
    padded = 10 * 1024
    assert sum(held.values()) == 4 * padded + 8 * len(params)


# Refused --------------------------------------------------------------------------------------------------------------


def test_sparse_gradient_is_refused_and_nothing_lost() -> None:
    dense, embedding = nn.Linear(2, 2), nn.Embedding(5, 3, sparse=True)
    optimizer = QGSGD([*dense.parameters(), *embedding.parameters()], 0.1)
    before = [dense.weight.detach().clone(), embedding.weight.detach().clone()]
    (dense(torch.ones(1, 2)).sum() + embedding(torch.tensor([1])).sum()).backward()
    with pytest.raises(TypeError, match=r"gradients must be dense, .* shape \[5, 3\] is sparse"):
        optimizer.step()
    assert_equal([dense.weight.detach(), embedding.weight.detach()], before)


def test_parameters_that_share_memory_are_refused() -> None:
    base = torch.zeros(10)
    params = [nn.Parameter(base[:6]), nn.Parameter(base[5:])]
    optimizer = QGSGD(params, 0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"parameters of shapes \[6\] and \[5\] share memory"):
        optimizer.step()
    assert torch.equal(base, torch.zeros(10))


def test_parameters_tied_by_data_after_a_step_are_refused() -> None:
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    optimizer = DSGDm([{"params": [a]}, {"params": [b]}], 0.1)
    for p in (a, b):
        p.grad = torch.ones(3)
    optimizer.step()
    a.data = b.data
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()


def test_expanded_parameter_is_refused() -> None:
    p = nn.Parameter(torch.zeros(1).expand(4))
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match="overlaps itself"):
        QGSGD([p], 0.1).step()


def test_parameter_in_shared_memory_is_refused() -> None:
    model = nn.Linear(2, 2).share_memory()
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="shared with other processes"):
        QGSGD(model.parameters(), 0.1).step()


def test_meta_parameter_is_refused_at_the_step() -> None:
    p = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = QGSGD([p], 0.1)
    with pytest.raises(TypeError, match="must be on cpu or cuda, got a parameter of shape \\[3\\] on meta"):
        optimizer.step()


def test_tensor_subclass_is_refused() -> None:
    class Tagged(torch.Tensor):
        pass

    p = nn.Parameter(torch.zeros(3).as_subclass(Tagged))
    p.grad = torch.ones(3).as_subclass(Tagged)
    with pytest.raises(TypeError, match="must be plain tensors, got a parameter of shape \\[3\\] of type Tagged"):
        QGSGD([p], 0.1).step()


def test_new_shape_with_old_state_is_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = QGSGD([p], 0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    p.grad = None
    p.data = torch.zeros(4)
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"'qg_momentum_buffer' .* must have its shape \[4\], got \[3\]"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(4))
    del optimizer.state[p]
    optimizer.step()
    assert p.detach().ne(0).all()


def test_stale_gradient_of_another_shape_is_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    p.data = torch.zeros(4)
    with pytest.raises(ValueError, match=r"must have its shape and device, got \[3\]"):
        QGSGD([p], 0.1).step()
