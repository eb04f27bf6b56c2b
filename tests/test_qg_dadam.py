"""QG-DAdam's variant v1, whose gradients are normalised filter by filter, against plain torch on single tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qgm_ext import StackedOptimizer, ops, topology
from qgm_ext.algorithms.qg_dadam import filter_norms
from qgm_ext.flat import FlatLayout

SHAPES = [(3, 2, 3, 1), (5, 4), (7,), (2, 3, 4), (), (0, 3), (40, 300)]
DIMS = {4: (1, 2, 3), 2: (0,)}  # what a norm is taken over, by the number of dimensions; otherwise all
N, LR, BETAS, EPS, WEIGHT_DECAY = 4, 0.05, (0.8, 0.95), 1e-8, 0.1


def normalised(g: Tensor) -> Tensor:
    dims = DIMS.get(g.dim(), tuple(range(g.dim())))
    return g / ((g.square().sum(dims, keepdim=True) if dims else g.square()).sqrt() + EPS)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    layout = FlatLayout(SHAPES)
    x = layout.allocate(N, dtype=dtype, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for view in layout.views(x):
        view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
    return x


def optimizer(x: Tensor, **more: Any) -> StackedOptimizer:
    hyper = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "variant": "v1"}
    return StackedOptimizer(x, topology.ring(N), "qg_dadam", layout=FlatLayout(SHAPES), **hyper, **more)


def test_steps_are_those_of_plain_torch_tensor_by_tensor() -> None:
    """x' = W (x - lr m / c1 / (sqrt(v / c2) + eps)), m = b1 m_hat + (1 - b1) g', g' = g / (||g|| + eps) + wd x."""
    layout, (b1, b2), w = FlatLayout(SHAPES), BETAS, torch.tensor(topology.ring(N).matrix())
    x = start()
    # Of each worker, the tensors of its model.
    models = [[view[i].clone() for view in layout.views(x)] for i in range(N)]
    moments = [[(torch.zeros_like(p), torch.zeros_like(p)) for p in model] for model in models]
    opt = optimizer(x)
    for t in range(1, 8):
        opt.step(opt.x.sin() + opt.x)
        half = []
        for model, own in zip(models, moments, strict=True):
            half.append([])
            for p, (m_hat, v_hat) in zip(model, own, strict=True):
                g = normalised(p.sin() + p) + WEIGHT_DECAY * p
                m, v = b1 * m_hat + (1 - b1) * g, b2 * v_hat + (1 - b2) * g * g
                half[-1].append(p - LR / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + EPS))
        for i in range(N):
            new = [sum(w[i, j] * half[j][k] for j in range(N)) for k in range(len(SHAPES))]
            deltas = [p - q for p, q in zip(models[i], new, strict=True)]
            length = torch.cat([d.flatten() for d in deltas]).norm() + EPS
            for d, (m_hat, v_hat) in zip(deltas, moments[i], strict=True):
                m_hat.mul_(b1).add_(d / length, alpha=1 - b1)
                v_hat.mul_(b2).add_((d / length).square(), alpha=1 - b2)
            models[i] = new
        for k, view in enumerate(layout.views(opt.x)):
            torch.testing.assert_close(view, torch.stack([model[k] for model in models]), rtol=1e-11, atol=1e-12)


def test_a_row_without_layout_is_one_filter() -> None:
    hyper = {"lr": LR, "variant": "v1"}
    flat = torch.randn(N, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = StackedOptimizer(flat.clone(), topology.ring(N), "qg_dadam", **hyper)
    vector = StackedOptimizer(
        flat.clone(), topology.ring(N), "qg_dadam", layout=FlatLayout([(40,)], alignment=40), **hyper
    )
    matrix = StackedOptimizer(
        flat.clone(), topology.ring(N), "qg_dadam", layout=FlatLayout([(5, 8)], alignment=40), **hyper
    )
    for _ in range(4):  # the first step of Adam does not depend on the gradient's length
        g = plain.x.sin()
        for opt in (plain, vector, matrix):
            opt.step(opt.x.sin())
    assert torch.equal(plain.x, vector.x)
    assert (plain.x - matrix.x).abs().max() > 1e-3
    scale = 1 / g.norm(dim=1, keepdim=True)
    torch.testing.assert_close(plain.state["grad_scale"], scale.expand_as(g), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_norms_have_the_same_bits_for_any_threads_rows_and_memory_order(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in [*SHAPES[:5], SHAPES[6], (64, 32, 3, 3)]:
        g = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)
        norms = filter_norms(g)
        wide = g.to(ops.compute_dtype(dtype)).double()
        dims = [d + 1 for d in DIMS.get(len(shape), range(len(shape)))]
        expected = wide.square().sum(dims, keepdim=True).sqrt() if dims else wide.abs()
        torch.testing.assert_close(norms, expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(filter_norms(g), norms)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(torch.cat([filter_norms(row[None]) for row in g]), norms)
        if len(shape) == 4:
            strides = g[0].contiguous(memory_format=torch.channels_last).stride()
            kept = torch.empty_strided(g.shape, (shape[0] * g[0, 0].numel() + 7, *strides), dtype=dtype).copy_(g)
            assert torch.equal(filter_norms(kept), norms)


def test_a_resumed_run_has_the_bits_of_one_that_went_through() -> None:
    whole, first = optimizer(start(torch.float32)), optimizer(start(torch.float32))
    for _ in range(3):
        whole.step(whole.x.sin())
        first.step(first.x.sin())
    second = optimizer(first.x.clone())
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        whole.step(whole.x.sin())
        second.step(second.x.sin())
    assert torch.equal(whole.x, second.x)
    assert all(torch.equal(vector, second.state[name]) for name, vector in whole.state.items())
