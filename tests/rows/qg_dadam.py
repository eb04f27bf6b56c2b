"""QG-DAdam."""

from __future__ import annotations

import numpy as np

from rows.adam import ADAM, ADAM_RULE, DAdam
from rows.base import AlgorithmRow, Array, Digits, RuleRow


class QgDadam(DAdam):
    row_scalars = 1

    def set_row(self, values: Array) -> None:
        (self.q,) = values

    def decayed(self, x: Array, g: Array, state: list[Array]) -> Array:
        return g + self.wd * x

    def first_moment(self, state: list[Array], d: Array, decayed: Array) -> Array:
        state[0][:] = self.b1 * state[0] + self.one_b1 * d
        return self.b1 * state[0] + decayed

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        d, decayed = self.q * state[2], self.decayed(x, g, state)
        m = self.first_moment(state, d, decayed)
        state[1][:] = self.b2 * state[1] + self.one_b2 * (d * d)
        v = self.b2 * state[1] + self.one_b2 * (decayed * decayed)
        return [x - self.size * m / (np.sqrt(v) * self.scale + self.eps)]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[2][:] = x - mixed[0]
        return mixed[0]


class QgDadamV1(QgDadam):
    def decayed(self, x: Array, g: Array, state: list[Array]) -> Array:
        return state[3] * g + self.wd * x

    def first_moment(self, state: list[Array], d: Array, decayed: Array) -> Array:
        state[0][:] = self.b1 * state[0] + self.one_b1 * d
        return self.b1 * state[0] + self.one_b1 * decayed


class QgDadamV2(QgDadam):
    def first_moment(self, state: list[Array], d: Array, decayed: Array) -> Array:
        state[0][:] = self.b1 * state[0] + self.one_b1 * decayed
        return state[0]


ALGORITHMS = {
    "qg_dadam": AlgorithmRow(
        ADAM, None, Digits(0.01), variants=({"variant": "v1"}, {"variant": "v2"}, {"normalization_eps": 0.1})
    ),
}
RULES = {
    "qg_dadam": RuleRow(QgDadam, ADAM_RULE, not_negative=(1,)),
    "qg_dadam_v1": RuleRow(QgDadamV1, ADAM_RULE, not_negative=(1,)),
    "qg_dadam_v2": RuleRow(QgDadamV2, ADAM_RULE, not_negative=(1,)),
}
