"""CHOCO-SGD."""

from __future__ import annotations

from typing import Any

from rows.base import AlgorithmRow, Array, Digits, NumpyRule, RuleRow, dsgd_point, scalars


class ChocoSend(NumpyRule):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        self.eta, self.beta, self.wd, self.gamma = scalars(dtype, *hyper[:4])
        self.nesterov = hyper[4] != 0

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        decayed = g + self.wd * x
        state[0][:] = self.beta * state[0] + decayed
        u = decayed + self.beta * state[0] if self.nesterov else state[0]
        return [x - self.eta * u + self.gamma * (state[2] - state[1])]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        # The pass is mixed with the identity; x is what is stored, in the compute dtype.
        state[3][:] = mixed[0] - state[1]
        return mixed[0]


class ChocoReceive(NumpyRule):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        (self.gamma,) = scalars(dtype, *hyper)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [state[2].copy()]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = state[0] + state[2]
        state[1][:] = state[1] + mixed[0]
        return x + self.gamma * (state[1] - state[0])


ALGORITHMS = {
    "choco_sgd": AlgorithmRow(
        {"lr": 0.05, "gamma": 1.0, "compressor": "none"},
        dsgd_point(0.05),
        Digits(0.5),
        variants=(
            {"order": "cta"},
            {"compressor": "top_k", "ratio": 0.5, "momentum": 0.8, "gamma": 0.6},
            {"compressor": "sign", "order": "cta", "momentum": 0.8, "nesterov": True, "gamma": 0.3},
        ),
        bytes_sent=16 * (13 + 4),
    ),
}
RULES = {"choco_send": RuleRow(ChocoSend, (0.1, 0.9, 1e-2, 0.7, 1.0)), "choco_receive": RuleRow(ChocoReceive, (0.9,))}
