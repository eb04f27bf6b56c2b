"""Push-sum."""

from __future__ import annotations

from typing import Any

from rows.base import AlgorithmRow, Array, Digits, RuleRow, dsgd_point, scalars
from rows.dsgd import Dsgdm


class Sgp(Dsgdm):
    row_scalars = 2

    def set_row(self, values: Array) -> None:
        self.w, self.w_new = values

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        z = self.w * x
        state[0][:] = self.beta * state[0] + (g + self.wd * z)
        return [z - self.eta * state[0]]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        return mixed[0] / self.w_new


class QgSgp(Sgp):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        super().__init__(dtype, hyper)
        eta, beta, _ = hyper
        self.one_beta, self.gain = scalars(dtype, 1.0 - beta, 0.0 if eta == 0 else (1.0 - beta) / eta)

    def descend(self, x: Array, g: Array, m_hat: Array) -> tuple[Array, Array]:
        z = self.w * x
        decayed = g + self.wd * z
        d = decayed + self.beta * (self.beta * m_hat + decayed)
        return z - self.eta * d, d

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [self.descend(x, g, state[0])[0]]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        z_half, d = self.descend(x, g, state[0])
        if self.eta != 0:
            gossiped = self.gain * ((mixed[0] - z_half) / self.w_new)
            state[0][:] = self.beta * state[0] + self.one_beta * d - gossiped
        return mixed[0] / self.w_new


ALGORITHMS = {
    "sgp": AlgorithmRow(
        {"lr": 0.05}, dsgd_point(0.05), Digits(0.1, "random_directed"), variants=({"momentum": 0.8, "gamma": 0.7},)
    ),
    "qg_sgp": AlgorithmRow(
        {"lr": 0.05, "momentum": 0.8},
        dsgd_point(0.05 * 1.8),
        Digits(0.1, "random_directed"),
        variants=({"gamma": 0.7},),
    ),
}
RULES = {"sgp": RuleRow(Sgp, (0.1, 0.9, 1e-2)), "qg_sgp": RuleRow(QgSgp, (0.1, 0.9, 1e-2))}
