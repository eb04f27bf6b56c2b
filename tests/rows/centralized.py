"""The centralised methods."""

from __future__ import annotations

from typing import Any

from rows.adam import ADAM, ADAM_RULE, DAdam
from rows.base import AlgorithmRow, Array, Digits, RuleRow, optimum, scalars


class Csgd:
    form = "plain"
    messages = 1

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        self.eta, self.beta, self.wd = scalars(dtype, *hyper)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [g]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        u = decayed = mixed[0] + self.wd * x
        if self.form != "plain":
            state[0][:] = self.beta * state[0] + decayed
            u = decayed + self.beta * state[0] if self.form == "nesterov" else state[0]
        return x - self.eta * u


class Csgdm(Csgd):
    form = "heavy ball"


class CsgdmN(Csgd):
    form = "nesterov"


class Cadam(DAdam):
    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [g]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        return x - self.moments(mixed[0] + self.wd * x, state)


ALL_REDUCE = 14 * 400  # 2 (n - 1) vectors
MOMENTUM = {"lr": 0.01, "momentum": 0.8}
ALGORITHMS = {
    "csgd": AlgorithmRow({"lr": 0.05}, optimum, Digits(0.1), bytes_sent=ALL_REDUCE),
    "csgdm": AlgorithmRow(MOMENTUM, optimum, Digits(0.1), bytes_sent=ALL_REDUCE),
    "csgdm_n": AlgorithmRow(MOMENTUM, optimum, Digits(0.1), bytes_sent=ALL_REDUCE),
    "cadam": AlgorithmRow(ADAM, None, Digits(0.01), bytes_sent=ALL_REDUCE),
}
RULES = {
    "csgd": RuleRow(Csgd, (0.1, 0.9, 1e-2)),
    "csgdm": RuleRow(Csgdm, (0.1, 0.9, 1e-2)),
    "csgdm_n": RuleRow(CsgdmN, (0.1, 0.9, 1e-2)),
    "cadam": RuleRow(Cadam, ADAM_RULE, not_negative=(1,)),
}
