"""Steps of qgm_ext.optim: against QHM (algorithms.md 6.4), torch.optim.SGD, StackedOptimizer and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qgm_ext import StackedOptimizer, algorithms, reference, topology
from qgm_ext.flat import FlatLayout
from qgm_ext.optim import DSGD, QGSGD, DecentralizedOptimizer, DSGDm
from qgm_ext.optim import flat_parameters as flat_module
from qgm_ext.stacked import NonFiniteGradientError

SHAPES = [(3, 5), (), (7,), (2, 3, 4), (1,), (65,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_params(seed: int = 0, dtype: torch.dtype = torch.float64, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(step: int, dtype: torch.dtype = torch.float64, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def set_gradients(params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.clone()


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        set_gradients(params, gradients(step, params[0].dtype, [p.shape for p in params]))
        optimizer.step()


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"parameter {i}: largest difference {(a - b).abs().max()}"


# QHM ------------------------------------------------------------------------------------------------------------------


def qhm(x: Tensor, grads: list[Tensor], alphas: list[float], discount: float, nu: float) -> tuple[Tensor, Tensor]:
    """Quasi-hyperbolic momentum (Ma and Yarats 2019, equations 3 and 4), independent of this package."""
    buffer = torch.zeros_like(x)
    for grad, alpha in zip(grads, alphas, strict=True):
        buffer = discount * buffer + (1 - discount) * grad
        x = x - alpha * ((1 - nu) * grad + nu * buffer)
    return x, buffer


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize(("beta", "mu"), [(0.9, 0.9), (0.9, 0.5), (0.6, 0.99)])
@pytest.mark.parametrize("schedule", [False, True], ids=["constant-lr", "changing-lr"])
def test_qgsgd_alone_is_qhm(beta: float, mu: float, nesterov: bool, schedule: bool) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = [g[0] for g in (gradients(t, shapes=[(50,)]) for t in range(60))]
    etas = [0.05 * (0.5 + (t % 7) if schedule else 1.0) for t in range(60)]
    b = beta**2 if nesterov else beta
    discount = mu + (1 - mu) * b
    expected, buffer = qhm(x, grads, [eta / (1 - beta) for eta in etas], discount, b / discount)

    p = nn.Parameter(x.clone())
    optimizer = QGSGD([p], lr=etas[0], momentum=beta, qg_momentum=mu, nesterov=nesterov)
    for eta, grad in zip(etas, grads, strict=True):
        optimizer.param_groups[0]["lr"] = eta
        p.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    m_hat = optimizer.state[p]["qg_momentum_buffer"]
    torch.testing.assert_close((1 - beta) * m_hat, buffer, rtol=1e-12, atol=1e-12)


def test_qgsgd_is_not_sgd_with_momentum() -> None:
    ours, theirs = make_params(), make_params()
    run(QGSGD(ours, lr=0.1, nesterov=False), ours, 3)
    run(torch.optim.SGD(theirs, lr=0.1, momentum=0.9), theirs, 3)
    assert not torch.allclose(ours[0], theirs[0], atol=1e-3)


def test_qgsgd_without_memory_is_sgd_with_momentum() -> None:
    """algorithms.md 6.3: mu = 0 makes m_hat the last step, which is heavy-ball momentum."""
    ours, theirs = make_params(), make_params()
    run(QGSGD(ours, lr=0.1, qg_momentum=0.0, nesterov=False), ours, 20)
    run(torch.optim.SGD(theirs, lr=0.1, momentum=0.9), theirs, 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# torch.optim.SGD ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("kind", ["dsgd", "dsgdm", "dsgdm_n"])
def test_alone_is_torch_sgd(kind: str, weight_decay: float, maximize: bool) -> None:
    ours, theirs = make_params(), make_params()
    if kind == "dsgd":
        optimizer: DecentralizedOptimizer = DSGD(ours, 0.05, weight_decay=weight_decay, maximize=maximize)
        other = torch.optim.SGD(theirs, lr=0.05, weight_decay=weight_decay, maximize=maximize)
    else:
        n = kind == "dsgdm_n"
        optimizer = DSGDm(ours, 0.05, 0.8, nesterov=n, weight_decay=weight_decay, maximize=maximize)
        other = torch.optim.SGD(theirs, lr=0.05, momentum=0.8, nesterov=n, weight_decay=weight_decay, maximize=maximize)
    run(optimizer, ours, 25)
    run(other, theirs, 25)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if kind != "dsgd":
        mine = [optimizer.state[p]["momentum_buffer"] for p in ours]
        torch.testing.assert_close(mine, [other.state[p]["momentum_buffer"] for p in theirs], rtol=1e-12, atol=1e-12)


def test_training_a_model_follows_torch_sgd() -> None:
    """The whole loop, default zero_grad and backward included, in float64."""
    losses = []
    for make in (
        lambda params: DSGDm(params, 0.1, 0.9, nesterov=True, weight_decay=1e-3),
        lambda params: torch.optim.SGD(params, 0.1, 0.9, nesterov=True, weight_decay=1e-3),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()
        x, y = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64)
        optimizer = make(model.parameters())
        trace = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            trace.append(loss.item())
        losses.append(trace)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][-1] < 0.5 * losses[0][0]


# The same bits as the stacked step ------------------------------------------------------------------------------------

CASES = [
    (DSGD, {"weight_decay": 0.01}, "dsgd", {"weight_decay": 0.01}),
    (DSGDm, {"momentum": 0.7}, "dsgdm", {"momentum": 0.7}),
    (DSGDm, {"nesterov": True, "weight_decay": 0.01}, "dsgdm_n", {"weight_decay": 0.01}),
    (QGSGD, {"weight_decay": 0.01}, "qg_dsgdm_n", {"weight_decay": 0.01}),
    (QGSGD, {"nesterov": False, "qg_momentum": 0.3}, "qg_dsgdm", {"qg_momentum": 0.3}),
    (QGSGD, {"local_step": 3}, "qg_dsgdm_n", {"local_step": 3}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "arguments", "name", "hyper"), CASES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("large", [None, 8], ids=["gathered", "read-in-place"])
def test_equals_stacked_optimizer_of_one_worker(cls, arguments, name, hyper, dtype, large, monkeypatch) -> None:
    if large is not None:
        monkeypatch.setitem(flat_module.LARGE, "cpu", large)
    params = make_params(dtype=dtype)
    layout = FlatLayout(p.shape for p in params)
    x = layout.allocate(1, dtype=dtype, device="cpu")
    for view, p in zip(layout.views(x), params, strict=True):
        view[0].copy_(p.detach())
    stacked = StackedOptimizer(x, topology.complete(1), name, lr=0.1, **hyper)
    optimizer = cls(params, 0.1, **arguments)
    for step in range(8):
        grads = gradients(step, dtype)
        g = torch.zeros_like(x)
        for view, grad in zip(layout.views(g), grads, strict=True):
            view[0].copy_(grad)
        stacked.step(g)
        set_gradients(params, grads)
        optimizer.step()
    assert_equal(params, [view[0] for view in layout.views(x)])
    for state_name, vectors in stacked.state.items():
        mine = [optimizer.state[p][state_name] for p in params]
        assert_equal(mine, [view[0] for view in layout.views(vectors)])
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(vector.dtype == expected for vector in mine)
    assert all(optimizer.state[p]["step"].item() == 8 for p in params)


@pytest.mark.parametrize("local_step", [1, 4])
def test_matches_the_reference(local_step: int) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
    algorithm = algorithms.get("qg_dsgdm_n", lr=0.1, weight_decay=0.05, local_step=local_step)
    x = p.detach().clone()[None]
    state, w = reference.initial_state(algorithm, x), torch.ones(1, 1, dtype=torch.float64)
    optimizer = QGSGD([p], 0.1, weight_decay=0.05, local_step=local_step)
    for step in range(11):
        grad = gradients(step, shapes=[(9,)])[0]
        x, state = reference.step(algorithm, x, grad[None], state, w, step)
        p.grad = grad
        optimizer.step()
    torch.testing.assert_close(p.detach(), x[0], rtol=1e-13, atol=1e-13)
    for name, value in state.items():
        torch.testing.assert_close(optimizer.state[p][name], value[0], rtol=1e-13, atol=1e-13)


def test_zero_lr_changes_nothing_but_the_step_count() -> None:
    params = make_params(dtype=torch.float32)
    optimizer = QGSGD(params, 0.1, weight_decay=0.1)
    run(optimizer, params, 3)
    before = [p.detach().clone() for p in params]
    momentum = [optimizer.state[p]["qg_momentum_buffer"].clone() for p in params]
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, 2, start=3)
    assert_equal(params, before)
    assert_equal([optimizer.state[p]["qg_momentum_buffer"] for p in params], momentum)


# Parameters without a gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [None, 20], ids=["gathered", "some-read-in-place"])
@pytest.mark.parametrize("local_step", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partial_gradients_step_each_parameter_as_if_alone(dtype, local_step, large, monkeypatch) -> None:
    if large is not None:
        monkeypatch.setitem(flat_module.LARGE, "cpu", large)
    rng = torch.Generator().manual_seed(5)
    params = make_params(dtype=dtype)
    alone = make_params(dtype=dtype)
    options = {"weight_decay": 0.1, "local_step": local_step}
    optimizer = QGSGD(params, 0.1, **options)
    separate = [QGSGD([p], 0.1, **options) for p in alone]
    for step in range(25):
        present = (torch.rand(len(params), generator=rng) < 0.6).tolist()
        grads = [g if here else None for g, here in zip(gradients(step, dtype), present, strict=True)]
        set_gradients(params, grads)
        set_gradients(alone, grads)
        optimizer.step()
        for other in separate:
            other.step()
    assert_equal(params, alone)
    for p, q, other in zip(params, alone, separate, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][name]), name


def test_parameter_without_gradient_keeps_value_and_state() -> None:
    params = make_params(dtype=torch.float32)
    optimizer = QGSGD(params, 0.1, weight_decay=0.5)
    run(optimizer, params, 2)
    value = params[2].detach().clone()
    state = {name: v.clone() for name, v in optimizer.state[params[2]].items()}
    grads: list[Tensor | None] = list(gradients(2, torch.float32))
    grads[2] = None
    set_gradients(params, grads)
    optimizer.step()
    assert torch.equal(params[2], value)
    assert all(torch.equal(optimizer.state[params[2]][name], v) for name, v in state.items())
    assert optimizer.state[params[3]]["step"].item() == 3


def test_zero_gradient_is_not_no_gradient() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = DSGDm([p], 0.1, weight_decay=0.5)
    p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(p, torch.full((3,), 0.95))


def test_no_gradient_at_all_is_a_step_of_nothing() -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = QGSGD(params, 0.1, weight_decay=0.1)
    optimizer.step()
    assert_equal(params, before)
    assert not optimizer.state


# Non-finite gradients -------------------------------------------------------------------------------------------------


def poisoned(value: float) -> tuple[list[nn.Parameter], DecentralizedOptimizer, list[Tensor], list[Tensor]]:
    params = make_params(dtype=torch.float32)
    optimizer = QGSGD([{"params": params[:3]}, {"params": params[3:], "lr": 0.2}], 0.1)
    run(optimizer, params, 2)
    values = [p.detach().clone() for p in params]
    state = [v.clone() for p in params for v in optimizer.state[p].values()]
    grads = gradients(2, torch.float32)
    grads[4][0] = value
    set_gradients(params, grads)
    return params, optimizer, values, state


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradient_raise_leaves_everything(value: float) -> None:
    params, optimizer, values, state = poisoned(value)
    optimizer.on_nonfinite = "raise"
    with pytest.raises(NonFiniteGradientError, match=r"parameter 1 of group 1 \[1\] is not finite"):
        optimizer.step()
    assert_equal(params, values)
    assert_equal([v for p in params for v in optimizer.state[p].values()], state)


def test_nonfinite_gradient_skip_leaves_everything_and_counts() -> None:
    params, optimizer, values, state = poisoned(math.nan)
    optimizer.on_nonfinite = "skip"
    optimizer.step()
    assert_equal(params, values)
    assert_equal([v for p in params for v in optimizer.state[p].values()], state)
    assert optimizer.skipped_steps == 1
    run(optimizer, params, 1, start=3)
    assert optimizer.skipped_steps == 1
    assert not torch.equal(params[0], values[0])


def test_nonfinite_gradient_ignore_steps_as_torch_does() -> None:
    params, optimizer, values, _ = poisoned(math.nan)
    optimizer.step()
    assert params[4].isnan().all()
    assert not torch.equal(params[0], values[0])
    assert all(p.isfinite().all() for i, p in enumerate(params) if i != 4)


def test_on_nonfinite_is_checked() -> None:
    with pytest.raises(ValueError, match="on_nonfinite must be one of raise, skip, ignore, got 'warn'"):
        QGSGD(make_params(), 0.1, on_nonfinite="warn")  # type: ignore[arg-type]
