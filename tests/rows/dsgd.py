"""DSGD in both orders, and with local momentum."""

from __future__ import annotations

from typing import Any

import torch

from rows.base import F64, AlgorithmRow, Array, Digits, NumpyRule, Point, Quadratics, RuleRow, dsgd_point, scalars


def cta_point(lr: float) -> Point:
    """x = W x - lr (a x - b)."""

    def solve(problem: Quadratics, w: torch.Tensor) -> torch.Tensor:
        eye = torch.eye(len(w), dtype=F64)
        return problem.solve(lambda a, b: torch.linalg.solve(eye - w + lr * torch.diag(a), lr * b))

    return solve


class Dsgdm(NumpyRule):
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


class DsgdCta(NumpyRule):
    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        return mixed[0] - self.eta * (g + self.wd * x)


ALGORITHMS = {
    "dsgd": AlgorithmRow({"lr": 0.05}, dsgd_point(0.05), Digits(0.5)),
    "dsgd_cta": AlgorithmRow({"lr": 0.05}, cta_point(0.05), Digits(0.5)),
    # Momentum amplifies the bias by 1 / (1 - beta).
    "dsgdm": AlgorithmRow({"lr": 0.01, "momentum": 0.8}, dsgd_point(0.01 / (1 - 0.8)), Digits(0.1)),
    "dsgdm_n": AlgorithmRow({"lr": 0.01, "momentum": 0.8}, dsgd_point(0.01 / (1 - 0.8)), Digits(0.1)),
}
RULES = {
    "dsgd": RuleRow(NumpyRule, (0.1, 1e-2)),
    "dsgd_cta": RuleRow(DsgdCta, (0.1, 1e-2)),
    "dsgdm": RuleRow(Dsgdm, (0.1, 0.9, 1e-2)),
    "dsgdm_n": RuleRow(DsgdmN, (0.1, 0.9, 1e-2)),
}
