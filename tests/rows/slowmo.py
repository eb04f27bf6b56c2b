"""SlowMo."""

from __future__ import annotations

from typing import Any

from rows.base import AlgorithmRow, Array, Digits, NumpyRule, RuleRow, optimum, scalars


class SlowmoOuter(NumpyRule):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        eta, beta, alpha = hyper
        self.eta_beta, self.alpha, self.per_eta = scalars(dtype, eta * beta, alpha, 0.0 if eta == 0 else 1.0 / eta)
        self.moves = eta != 0

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        displacement = self.eta_beta * state[1] + (state[0] - mixed[0])
        state[0][:] = state[0] - self.alpha * displacement
        if self.moves:
            state[1][:] = self.per_eta * displacement
        return state[0].copy()


ALGORITHMS = {
    # With an exact mean in every step SlowMo has no bias; with longer periods it moves in a cycle.
    "slowmo": AlgorithmRow(
        {"lr": 0.01, "momentum": 0.8, "slowmo_period": 1, "slowmo_momentum": 0.3},
        optimum,
        Digits(0.1),
        variants=({"slowmo_period": 5, "slowmo_lr": 0.7},),
        bytes_sent=(16 + 14) * 400,
    ),
}
RULES = {"slowmo_outer": RuleRow(SlowmoOuter, (0.1, 0.6, 0.9))}
