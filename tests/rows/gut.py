"""GUT and QG-GUTm."""

from __future__ import annotations

from typing import Any

import torch

from rows.base import F64, AlgorithmRow, Array, Digits, NumpyRule, Point, Quadratics, RuleRow, scalars


def gut_point(lr: float, mu: float, b_sum: float, gamma: float = 1.0, beta: float = 0.0) -> Point:
    """Where p stands still, lr y / (1 - beta) = (gamma - gamma^2) r with r = (W - I) p, and x = p + gamma r:

    g(x) = (1 + (mu B + (1 - beta) (gamma - gamma^2)) / (1 - mu)) r / lr.
    """
    kappa = (1 + (mu * b_sum + (1 - beta) * (gamma - gamma**2)) / (1 - mu)) / lr

    def solve(problem: Quadratics, w: torch.Tensor) -> torch.Tensor:
        eye = torch.eye(len(w), dtype=F64)
        mix = eye + gamma * (w - eye)
        return problem.solve(lambda a, b: mix @ torch.linalg.solve(torch.diag(a) @ mix - kappa * (w - eye), b))

    return solve


class Gut(NumpyRule):
    form = "plain"

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        eta, before, beta, mu, wd, gamma = hyper
        self.moves = eta != 0
        self.gamma, self.one_gamma, self.back = scalars(dtype, gamma, 1.0 - gamma, gamma - gamma * gamma)
        b = 1.0 + beta + beta * beta if self.form == "nesterov" else 1.0 + beta
        self.eta, self.beta, self.mu, self.wd, self.b = scalars(dtype, eta, beta, mu, wd, b)
        self.per_eta, self.mu_per_eta = scalars(dtype, *((1.0 / eta, mu / eta) if self.moves else (0.0, 0.0)))
        (self.per_before,) = scalars(dtype, 0.0 if before == 0 else 1.0 / before)

    def descend(self, x: Array, g: Array, state: list[Array]) -> tuple[Array, Array]:
        y = g + self.wd * x + state[1]
        m = None if self.form == "plain" else self.beta * state[2] + y
        d = y if m is None else (m if self.form == "heavy ball" else y + self.beta * m)
        return x - self.gamma * state[0] - self.eta * d + self.back * state[0], m

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [self.descend(x, g, state)[0]]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        own, m = self.descend(x, g, state)
        delta = g + self.wd * x - self.per_before * state[0]
        r = mixed[0] - own
        moved = mixed[0] - (x + self.one_gamma * state[0])
        carried = self.mu_per_eta * (moved + self.b * state[0])
        s = x.dtype.type(0) - self.per_eta * r - carried - self.mu * delta
        if not self.moves:
            return x
        state[0][:], state[1][:] = r, s
        if m is not None:
            state[2][:] = m
        return self.gamma * mixed[0] + self.one_gamma * own


class QgGutm(Gut):
    form = "heavy ball"


class QgGutmN(Gut):
    form = "nesterov"


ALGORITHMS = {
    "gut": AlgorithmRow(
        {"lr": 0.02},
        gut_point(0.02, 0.9, 1.0),
        Digits(0.1),
        variants=({"scaling": 0.3}, {"scaling": 0.3, "gamma": 0.7}),
    ),
    "qg_gutm": AlgorithmRow(
        {"lr": 0.01},
        gut_point(0.01, 0.06, 1.9),
        Digits(0.1),
        variants=({"nesterov": True}, {"gamma": 0.6}, {"nesterov": True, "gamma": 0.9}),
    ),
}
HYPER = (0.1, 0.2, 0.9, 0.5, 1e-2, 0.8)
RULES = {"gut": RuleRow(Gut, HYPER), "qg_gutm": RuleRow(QgGutm, HYPER), "qg_gutm_n": RuleRow(QgGutmN, HYPER)}
