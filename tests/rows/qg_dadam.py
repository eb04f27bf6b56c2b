"""QG-DAdam."""

from __future__ import annotations

from typing import Any

import numpy as np

from rows.adam import ADAM, ADAM_RULE, DAdam
from rows.base import AlgorithmRow, Array, Digits, RuleRow, scalars


class QgDadam(DAdam):
    row_scalars = 2
    local_moment = False

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        super().__init__(dtype, hyper[:7])
        (self.gain,) = scalars(dtype, hyper[7])

    def set_row(self, values: Array) -> None:
        self.q, self.s = values

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        d = self.q * state[2]
        decayed = self.s * g + self.wd * x
        state[0][:] = self.b1 * state[0] + self.one_b1 * (decayed if self.local_moment else d)
        state[1][:] = self.b2 * state[1] + self.one_b2 * (d * d)
        m = state[0] if self.local_moment else self.b1 * state[0] + self.gain * decayed
        v = self.b2 * state[1] + self.one_b2 * (decayed * decayed)
        return [x - self.size * m / (np.sqrt(v) * self.scale + self.eps)]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[2][:] = x - mixed[0]
        return mixed[0]


class QgDadamV2(QgDadam):
    local_moment = True


ALGORITHMS = {
    "qg_dadam": AlgorithmRow(
        ADAM, None, Digits(0.01), variants=({"variant": "v1"}, {"variant": "v2"}, {"normalization_eps": 0.1})
    ),
}
RULES = {
    "qg_dadam": RuleRow(QgDadam, (*ADAM_RULE, 0.7), not_negative=(1,)),
    "qg_dadam_v2": RuleRow(QgDadamV2, (*ADAM_RULE, 0.7), not_negative=(1,)),
}
