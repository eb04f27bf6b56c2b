"""Momentum tracking and DecentLaM."""

from __future__ import annotations

from typing import Any

from rows.base import AlgorithmRow, Array, Digits, NumpyRule, RuleRow, dsgd_point, optimum, scalars
from rows.dsgd import Dsgdm


class MomentumTracking(Dsgdm):
    messages = 2

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        state[0][:] = self.beta * state[0] + (g + self.wd * x)
        return [x, state[1] - state[0]]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        x_new = mixed[0] - self.eta * (state[0] - state[1])
        state[1][:] = mixed[1] + state[0]
        return x_new


class MomentumTrackingStart(NumpyRule):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        (self.gain,) = scalars(dtype, 1.0 / (1.0 - hyper[0]))

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [g]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = state[1][:] = self.gain * (g - mixed[0])
        return x


class DecentLam(NumpyRule):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        eta, beta, wd = hyper
        self.eta, self.wd, self.keep, self.eta_beta = scalars(dtype, eta, wd, 1.0 if eta == 0 else beta, eta * beta)
        (self.per_eta,) = scalars(dtype, 0.0 if eta == 0 else 1.0 / eta)

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        x_new = mixed[0] - self.eta_beta * state[0]
        state[0][:] = self.keep * state[0] + self.per_eta * (x - mixed[0])
        return x_new


ALGORITHMS = {
    "momentum_tracking": AlgorithmRow(
        {"lr": 0.005, "momentum": 0.6},
        optimum,
        Digits(0.1),
        variants=({"init": "zero"},),
        bytes_sent=(2 * 16 + 14) * 400,  # the first step: an all-reduce of the gradient before it
    ),
    # Momentum does not amplify its bias.
    "decentlam": AlgorithmRow({"lr": 0.05, "momentum": 0.6}, dsgd_point(0.05), Digits(0.1)),
}
RULES = {
    "momentum_tracking": RuleRow(MomentumTracking, (0.1, 0.9, 1e-2)),
    "momentum_tracking_start": RuleRow(MomentumTrackingStart, (0.9,)),
    "decentlam": RuleRow(DecentLam, (0.1, 0.9, 1e-2)),
}
