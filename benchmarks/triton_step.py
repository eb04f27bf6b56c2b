"""QG-DSGDm-N of n stacked workers as one Triton kernel, the usual way to write it: a block of columns of all workers,
the mixing as a dense product. A baseline for the GPU benchmarks; TRITON_INTERPRET=1 runs it without a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(x_ptr, g_ptr, m_ptr, w_ptr, d, stride, eta, beta, mu, wd, n: tl.constexpr, block: tl.constexpr):
    rows = tl.arange(0, n)
    columns = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    at = rows[:, None].to(tl.int64) * stride + columns[None, :]
    inside = (columns < d)[None, :]
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    g = tl.load(g_ptr + at, inside, 0.0).to(tl.float32)
    m_hat = tl.load(m_ptr + at, inside, 0.0)
    w = tl.load(w_ptr + rows[:, None] * n + rows[None, :])
    decayed = g + wd * x
    half = x - eta * (decayed + beta * (beta * m_hat + decayed))
    new = tl.dot(w, half, input_precision="ieee")
    tl.store(m_ptr + at, mu * m_hat + (1.0 - mu) / eta * (x - new), inside)
    tl.store(x_ptr + at, new.to(x_ptr.dtype.element_ty), inside)


def step(x: Tensor, g: Tensor, m_hat: Tensor, w: Tensor, lr: float, momentum: float, mu: float, wd: float) -> None:
    """One step in place. n must be a power of two, 16 or more (tl.dot).

    Args:
        x, g: [n, D], one row stride; m_hat: like x, float32; w: mixing matrix, [n, n], float32, contiguous.
    """
    n, d = x.shape
    if n < 16 or n & (n - 1):
        raise ValueError(f"n must be a power of two, 16 or more, got {n}")
    block = max(16, 2048 // n)
    _kernel[(triton.cdiv(d, block),)](x, g, m_hat, w, d, x.stride(0), lr, momentum, mu, wd, n=n, block=block)
