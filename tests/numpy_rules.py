"""The compiled rules once more, in numpy, operation by operation in the order of csrc/rules: the oracle for bits.

numpy rounds every float32 operation, as the kernels must: no contraction, no re-association. Messages and state are in
the compute dtype (float32, or float64 for float64 parameters); parameters are rounded once, when they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Array = Any  # an ndarray of float32 or float64


def scalars(dtype: Any, *values: float) -> list[Any]:
    return [dtype(value) for value in values]


class Dsgd:
    messages = 1

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        self.eta, self.wd = scalars(dtype, *hyper)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x - self.eta * (g + self.wd * x)]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        return mixed[0]


class Dsgdm(Dsgd):
    nesterov = False

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        self.eta, self.beta, self.wd = scalars(dtype, *hyper)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        decayed = g + self.wd * x
        state[0][:] = self.beta * state[0] + decayed
        u = decayed + self.beta * state[0] if self.nesterov else state[0]
        return [x - self.eta * u]


class DsgdmN(Dsgdm):
    nesterov = True


class QgDsgdm(Dsgd):
    nesterov = False

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        eta, beta, mu, wd = hyper
        keep, gain = (1.0, 0.0) if eta == 0 else (mu, (1.0 - mu) / eta)
        self.eta, self.beta, self.wd, self.keep, self.gain = scalars(dtype, eta, beta, wd, keep, gain)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        decayed = g + self.wd * x
        m = self.beta * state[0] + decayed
        u = decayed + self.beta * m if self.nesterov else m
        return [x - self.eta * u]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = self.keep * state[0] + self.gain * (x - mixed[0])
        return mixed[0]


class QgDsgdmN(QgDsgdm):
    nesterov = True


class QgDsgdmMultistep(QgDsgdm):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        super().__init__(dtype, hyper[:4])
        eta, mu, k, update = hyper[0], hyper[2], hyper[4], hyper[5]
        self.per_eta, self.mu, self.share = scalars(dtype, 0.0 if eta == 0 else 1.0 / eta, mu, (1.0 - mu) / k)
        self.update = bool(update) and eta != 0

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        v = state[1] + self.per_eta * (x - mixed[0])
        if self.update:
            state[0][:] = self.mu * state[0] + self.share * v
            v = np.zeros_like(v)
        state[1][:] = v
        return mixed[0]


class QgDsgdmNMultistep(QgDsgdmMultistep):
    nesterov = True


RULES: dict[str, Callable[[Any, list[float]], Any]] = {
    "dsgd": Dsgd,
    "dsgdm": Dsgdm,
    "dsgdm_n": DsgdmN,
    "qg_dsgdm": QgDsgdm,
    "qg_dsgdm_n": QgDsgdmN,
    "qg_dsgdm_multistep": QgDsgdmMultistep,
    "qg_dsgdm_n_multistep": QgDsgdmNMultistep,
}


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


def gossip_step(
    x: torch.Tensor, g: torch.Tensor, state: list[torch.Tensor], mixing: Any, rule: str, hyper: list[float]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The new x and state of one fused step, bit by bit; arguments are not changed."""
    dtype = np.float64 if x.dtype == torch.float64 else np.float32
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    arithmetic = RULES[rule](dtype, hyper)
    xs, gs = x.to(wide).numpy(), g.to(wide).numpy()
    states = [vector.clone() for vector in state]
    rows = [[vector[i].numpy() for vector in states] for i in range(len(xs))]
    messages = [arithmetic.local(xs[i], gs[i], rows[i]) for i in range(len(xs))]
    mixed = [mix([message[k] for message in messages], mixing) for k in range(arithmetic.messages)]
    new = [arithmetic.merge(xs[i], gs[i], rows[i], [part[i] for part in mixed]) for i in range(len(xs))]
    return torch.from_numpy(np.stack(new)).to(x.dtype), states
