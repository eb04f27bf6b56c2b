"""D2, D2+ and exact diffusion."""

from __future__ import annotations

from typing import Any

from rows.base import AlgorithmRow, Array, Digits, NumpyRule, RuleRow, optimum, scalars


class D2(NumpyRule):
    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x + state[0] - self.eta * (g + self.wd * x - state[1])]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = mixed[0] - x
        state[1][:] = g + self.wd * x
        return mixed[0]


class D2Plus(NumpyRule):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        super().__init__(dtype, hyper)
        self.moves = hyper[0] != 0
        (self.per_eta,) = scalars(dtype, 1.0 / hyper[0] if self.moves else 0.0)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x - self.eta * (g + self.wd * x + state[0])]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        if self.moves:
            state[0][:] = self.per_eta * (x - mixed[0]) - (g + self.wd * x)
        return mixed[0]


class ExactDiffusion(NumpyRule):
    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x - self.eta * (g + self.wd * x) + state[0]]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = mixed[0] - (x - self.eta * (g + self.wd * x))
        return mixed[0]


ALGORITHMS = {
    # A ring with an odd number of workers: at an even one the smallest eigenvalue is -1/3, where D2 is at its limit.
    "d2": AlgorithmRow({"lr": 0.05}, optimum, Digits(0.1), n=7),
    "d2_plus": AlgorithmRow({"lr": 0.05}, optimum, Digits(0.1), n=7),
    "exact_diffusion": AlgorithmRow({"lr": 0.05}, optimum, Digits(0.1)),
}
RULES = {
    "d2": RuleRow(D2, (0.1, 1e-2)),
    "d2_plus": RuleRow(D2Plus, (0.1, 1e-2)),
    "exact_diffusion": RuleRow(ExactDiffusion, (0.1, 1e-2)),
}
