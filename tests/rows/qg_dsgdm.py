"""Quasi-global momentum."""

from __future__ import annotations

from typing import Any

import numpy as np

from rows.base import AlgorithmRow, Array, Digits, NumpyRule, RuleRow, dsgd_point, scalars


class QgDsgdm(NumpyRule):
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


# Quasi-global momentum does not amplify the bias: its buffer vanishes where x stands still. With Nesterov's form the
# step there is (1 + beta) g.
HYPER = {"lr": 0.05, "momentum": 0.9, "qg_momentum": 0.8}
ALGORITHMS = {
    "qg_dsgdm": AlgorithmRow(HYPER, dsgd_point(0.05), Digits(0.1), variants=({"local_step": 3},)),
    "qg_dsgdm_n": AlgorithmRow(HYPER, dsgd_point(0.05 * 1.9), Digits(0.1), variants=({"local_step": 3},)),
}
RULES = {
    "qg_dsgdm": RuleRow(QgDsgdm, (0.1, 0.9, 0.8, 1e-2)),
    "qg_dsgdm_n": RuleRow(QgDsgdmN, (0.1, 0.9, 0.8, 1e-2)),
    "qg_dsgdm_multistep": RuleRow(QgDsgdmMultistep, (0.1, 0.9, 0.8, 1e-2, 3.0, 1.0)),
    "qg_dsgdm_n_multistep": RuleRow(QgDsgdmNMultistep, (0.1, 0.9, 0.8, 1e-2, 3.0, 1.0)),
}
