"""RelaySGD and RelaySGD/Grad."""

from __future__ import annotations

from typing import Any

from qgm_ext import topology
from rows.base import AlgorithmRow, Array, Digits, NumpyRule, RuleRow, optimum, scalars


class RelayGrad(NumpyRule):
    form = "plain"

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        self.eta, self.wd = scalars(dtype, hyper[0], hyper[-1])
        (self.beta,) = scalars(dtype, hyper[1])

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        direction = decayed = g + self.wd * x
        if self.form != "plain":
            state[0][:] = self.beta * state[0] + decayed
            direction = decayed + self.beta * state[0] if self.form == "nesterov" else state[0]
        return [x.dtype.type(0) - self.eta * direction]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        return x + mixed[0]


class RelayGradM(RelayGrad):
    form = "heavy ball"


class RelayGradMN(RelayGrad):
    form = "nesterov"


ALGORITHMS = {
    "relaysgd": AlgorithmRow(
        {"lr": 0.02, "momentum": 0.5},
        optimum,
        Digits(0.1, "chain"),
        variants=({"fill": "current", "nesterov": False}, {"momentum": 0.0}),
        graph=topology.chain,
    ),
    # Nothing averages its models: they stay as far apart as the steps that were under way took them.
    "relaysgd_grad": AlgorithmRow(
        {"lr": 0.005, "momentum": 0.5},
        None,
        Digits(0.1, "chain"),
        variants=({"nesterov": False}, {"momentum": 0.0}),
        graph=topology.chain,
    ),
}
RULES = {
    "relay_grad": RuleRow(RelayGrad, (0.1, 1e-2)),
    "relay_grad_m": RuleRow(RelayGradM, (0.1, 0.9, 1e-2)),
    "relay_grad_m_n": RuleRow(RelayGradMN, (0.1, 0.9, 1e-2)),
}
