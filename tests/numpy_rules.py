"""A fused step in numpy, bit by bit, from the texts of the rules (rows): the oracle of the kernels.

Messages and state are in the compute dtype (float32, or float64 for float64 parameters); parameters are rounded once,
when they are stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rows import RULES
from rows.base import Array


def mix(messages: list[Array], mixing: Any) -> list[Array]:
    """sum_j w_ij m_j for every worker, neighbours in ascending order; the complete graph as sum times 1/n."""
    n, dtype = len(messages), messages[0].dtype.type
    if mixing.form == "mean":
        total = messages[0].copy()
        for message in messages[1:]:
            total = total + message
        return [total * (dtype(1) / dtype(n))] * n
    out = []
    for i in range(n):
        columns, weights = mixing.row(i)
        total = dtype(weights[0]) * messages[columns[0]]
        for j, weight in zip(columns[1:], weights[1:], strict=True):
            total = total + dtype(weight) * messages[j]
        out.append(messages[i] if mixing.form == "identity" else total)
    return out


def block_sums(row: Array) -> list[float]:
    """Sums of squares of each block of 4096 numbers: 256 lanes in ascending order, then halves."""
    sums = []
    for block in np.split(row, range(4096, len(row), 4096)):
        lanes = np.zeros(256, row.dtype)
        for begin in range(0, len(block), 256):
            part = block[begin : begin + 256]
            lanes[: len(part)] = lanes[: len(part)] + part * part
        half = 128
        while half:
            lanes[:half] = lanes[:half] + lanes[half : 2 * half]
            half //= 2
        sums.append(float(lanes[0]))
    return sums


def gossip_step(
    x: torch.Tensor,
    g: torch.Tensor,
    state: list[torch.Tensor],
    mixing: Any,
    rule: str,
    hyper: list[float],
    row_scalars: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The new x and state of one fused step, bit by bit; arguments are not changed."""
    dtype = np.float64 if x.dtype == torch.float64 else np.float32
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    each = [RULES[rule].text(dtype, hyper) for _ in range(len(x))]
    if row_scalars is not None:
        for one, values in zip(each, row_scalars.numpy(), strict=True):
            one.set_row(values)
    xs, gs = x.to(wide).numpy(), g.to(wide).numpy()
    states = [vector.clone() for vector in state]
    rows = [[vector[i].numpy() for vector in states] for i in range(len(xs))]
    messages = [each[i].local(xs[i], gs[i], rows[i]) for i in range(len(xs))]
    mixed = [mix([message[k] for message in messages], mixing) for k in range(each[0].messages)]
    new = [each[i].merge(xs[i], gs[i], rows[i], [part[i] for part in mixed]) for i in range(len(xs))]
    return torch.from_numpy(np.stack(new)).to(x.dtype), states
