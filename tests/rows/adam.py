"""Adam with gossip, and DAMSGrad."""

from __future__ import annotations

from typing import Any

import numpy as np

from rows.base import AlgorithmRow, Array, Digits, NumpyRule, RuleRow, scalars


class DAdam(NumpyRule):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        eta, b1, b2, eps, wd, c1, c2 = hyper
        self.size, self.b1, self.one_b1, self.b2, self.one_b2 = scalars(dtype, eta / c1, b1, 1.0 - b1, b2, 1.0 - b2)
        self.eps, self.wd, self.scale = scalars(dtype, eps, wd, 1.0 / c2)

    def moments(self, decayed: Array, state: list[Array]) -> Array:
        state[0][:] = self.b1 * state[0] + self.one_b1 * decayed
        state[1][:] = self.b2 * state[1] + self.one_b2 * (decayed * decayed)
        return self.size * state[0] / (np.sqrt(state[1]) * self.scale + self.eps)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x - self.moments(g + self.wd * x, state)]


class DAmsgrad(NumpyRule):
    messages = 2

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        eta, b1, b2, eps, wd = hyper
        self.eta, self.b1, self.one_b1, self.b2, self.one_b2 = scalars(dtype, eta, b1, 1.0 - b1, b2, 1.0 - b2)
        self.eps, self.wd = scalars(dtype, eps, wd)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x, state[3].copy()]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        decayed, before = g + self.wd * x, state[2].copy()
        state[0][:] = self.b1 * state[0] + self.one_b1 * decayed
        state[1][:] = self.b2 * state[1] + self.one_b2 * (decayed * decayed)
        state[2][:] = np.maximum(before, state[1])
        state[3][:] = mixed[1] - before + state[2]
        return mixed[0] - self.eta * state[0] / np.sqrt(np.maximum(mixed[1], self.eps))


ADAM = {"lr": 0.002, "betas": (0.9, 0.99), "eps": 1e-6}
ADAM_RULE = (0.1, 0.9, 0.99, 1e-3, 1e-2, 0.3, 0.2)
ALGORITHMS = {
    "d_adam": AlgorithmRow(ADAM, None, Digits(0.03)),
    "damsgrad": AlgorithmRow({"lr": 0.02}, None, Digits(0.01), variants=({"betas": (0.5, 0.6), "eps": 0.5},)),
}
RULES = {
    "d_adam": RuleRow(DAdam, ADAM_RULE, not_negative=(1,)),
    "damsgrad": RuleRow(DAmsgrad, (0.1, 0.9, 0.99, 1e-3, 1e-2), not_negative=(1, 2, 3)),
}
