"""Tests of qgm_ext.models: shapes, deterministic weights, one training step, torch.func.vmap over workers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from qgm_ext import models

SHAPES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 28, 28), (2, 9, 13)]


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_have_the_right_shape(name: str, shape: tuple[int, int, int]) -> None:
    model = models.get(name, shape, 7)
    assert model(torch.randn(5, *shape)).shape == (5, 7)
    assert not list(model.buffers())


@pytest.mark.parametrize("name", models.names())
def test_the_seed_fixes_the_weights(name: str) -> None:
    built = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        built.append(nn.utils.parameters_to_vector(models.get(name, (1, 8, 8), 10).parameters()))
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


@pytest.mark.parametrize("name", models.names())
def test_steps_of_sgd_learn_one_batch(name: str) -> None:
    torch.manual_seed(0)
    model = models.get(name, (1, 8, 8), 10)
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28)], ids=str)
def test_vmap_over_workers_gives_each_workers_gradient(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    workers = [models.get(name, shape, 10).double() for _ in range(3)]
    x, y = torch.randn(3, 4, *shape, dtype=torch.float64), torch.randint(0, 10, (3, 4))
    params, _ = stack_module_state(workers)

    def loss(p: dict[str, torch.Tensor], batch_x: torch.Tensor, batch_y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(workers[0], p, (batch_x,)), batch_y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns where it has to fall back to a slow loop
        grads = vmap(grad(loss))(params, x, y)
    for i, model in enumerate(workers):
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(grads[key][i], parameter.grad, rtol=1e-10, atol=1e-12)


def test_mlp_has_the_layers_asked_for() -> None:
    model = models.mlp((1, 28, 28), 10)
    linear = [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)]
    assert linear == [(784, 128), (128, 64), (64, 10)]
    assert [type(m).__name__ for m in models.mlp((5,), 2, hidden=())] == ["Flatten", "Linear"]


def test_cnn_has_the_layers_asked_for() -> None:
    model = models.cnn((3, 28, 28), 10, channels=(6, 8, 10), groups=2)
    assert [m.out_channels for m in model if isinstance(m, nn.Conv2d)] == [6, 8, 10]
    assert [m.num_groups for m in model if isinstance(m, nn.GroupNorm)] == [2, 2, 2]
    assert model[-1].in_features == 10 * 3 * 3


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "error", "message"),
    [
        ("cn", (1, 8, 8), 10, {}, ValueError, "unknown model 'cn'; did you mean 'cnn'\\? Known: cnn, mlp"),
        ("resnet", (1, 8, 8), 10, {}, ValueError, "unknown model 'resnet'. Known: cnn, mlp"),
        ("mlp", (1, 0, 8), 10, {}, ValueError, r"input_shape must be integers >= 1, got \(1, 0, 8\)"),
        ("mlp", (1, 8, 8), 10, {"hidden": (64, -1)}, ValueError, r"hidden must be integers >= 1, got \(64, -1\)"),
        ("mlp", (1, 8, 8), 10, {"hidden": (64, 1.5)}, TypeError, r"hidden must be integers >= 1, got \(64, 1.5\)"),
        ("mlp", (1, 8, 8), 10, {"hidden": "64"}, TypeError, "hidden must be integers >= 1, got '64'"),
        ("mlp", (1, 8, 8), 0, {}, ValueError, "num_classes must be integers >= 1, got 0"),
        ("mlp", (1, 8, 8), 10, {"hiden": (64,)}, TypeError, "hiden"),
        ("cnn", (8, 8), 10, {}, ValueError, r"input_shape must be \(channels, height, width\), got \(8, 8\)"),
        ("cnn", (1, 3, 8), 10, {}, ValueError, "2 layers that halve the image need 4x4 or more, got 3x8"),
        (
            "cnn",
            (1, 8, 8),
            10,
            {"groups": 3},
            ValueError,
            r"groups=3 must divide every entry of channels, got \(16, 32\)",
        ),
    ],
)
def test_bad_arguments_are_named(
    name: str, shape: Any, classes: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        models.get(name, shape, classes, **options)
