"""Gradient tracking."""

from __future__ import annotations

from rows.base import AlgorithmRow, Array, Digits, NumpyRule, RuleRow, optimum
from rows.dsgd import Dsgdm


class GradientTracking(NumpyRule):
    messages = 2

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x, state[0] + (g + self.wd * x)]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        decayed = g + self.wd * x
        x_new = mixed[0] - self.eta * (state[0] + decayed)
        state[0][:] = mixed[1] - decayed
        return x_new


class GradientTrackingM(Dsgdm):
    messages = 2

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x, state[0] + (g + self.wd * x)]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        decayed = g + self.wd * x
        y = state[0] + decayed
        state[1][:] = self.beta * state[1] + y
        state[0][:] = mixed[1] - decayed
        return mixed[0] - self.eta * (y + self.beta * state[1] if self.nesterov else state[1])


class GradientTrackingMN(GradientTrackingM):
    nesterov = True


class GradientTrackingAtc(NumpyRule):
    messages = 2

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        v = state[0] - self.eta * (g + self.wd * x)
        return [x + v, v]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = mixed[1] + self.eta * (g + self.wd * x)
        return mixed[0]


MOMENTUM = {"lr": 0.005, "momentum": 0.6}
ALGORITHMS = {
    "gradient_tracking": AlgorithmRow({"lr": 0.02}, optimum, Digits(0.1)),
    "gradient_tracking_atc": AlgorithmRow({"lr": 0.05}, optimum, Digits(0.1)),
    "gradient_tracking_m": AlgorithmRow(MOMENTUM, optimum, Digits(0.1)),
    "gradient_tracking_m_n": AlgorithmRow(MOMENTUM, optimum, Digits(0.1)),
}
RULES = {
    "gradient_tracking": RuleRow(GradientTracking, (0.1, 1e-2)),
    "gradient_tracking_atc": RuleRow(GradientTrackingAtc, (0.1, 1e-2)),
    "gradient_tracking_m": RuleRow(GradientTrackingM, (0.1, 0.9, 1e-2)),
    "gradient_tracking_m_n": RuleRow(GradientTrackingMN, (0.1, 0.9, 1e-2)),
}
