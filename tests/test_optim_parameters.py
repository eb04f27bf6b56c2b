"""Odd parameters under the optimizers: shapes, layouts, dtypes, frozen, tied or lazy ones, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qgm_ext.optim import QGSGD, DSGDm
from qgm_ext.optim import flat_parameters as flat_module
from small_training import assert_equal, mlp, train, values

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
    train(model, optimizer, 1, start=3)
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
