"""The compiled rules once more, in numpy, operation by operation in the order of csrc/rules: the oracle for bits.

numpy rounds every float32 operation, as the kernels must: no contraction, no re-association. Messages and state are in
the compute dtype (float32, or float64 for float64 parameters); parameters are rounded once, when they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Array = Any  # an ndarray of float32 or float64


def scalars(dtype: Any, *values: float) -> list[Any]:
    return [dtype(value) for value in values]


class Dsgd:
    messages = 1

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        self.eta, self.wd = scalars(dtype, *hyper)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x - self.eta * (g + self.wd * x)]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        return mixed[0]


class Dsgdm(Dsgd):
    nesterov = False

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        self.eta, self.beta, self.wd = scalars(dtype, *hyper)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        decayed = g + self.wd * x
        state[0][:] = self.beta * state[0] + decayed
        u = decayed + self.beta * state[0] if self.nesterov else state[0]
        return [x - self.eta * u]


class DsgdmN(Dsgdm):
    nesterov = True


class QgDsgdm(Dsgd):
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


class DsgdCta(Dsgd):
    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        return mixed[0] - self.eta * (g + self.wd * x)


class DAdam(Dsgd):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        eta, b1, b2, eps, wd, c1, c2 = hyper
        self.size, self.b1, self.one_b1, self.b2, self.one_b2 = scalars(dtype, eta / c1, b1, 1.0 - b1, b2, 1.0 - b2)
        self.eps, self.wd, self.scale = scalars(dtype, eps, wd, 1.0 / c2)

    def moments(self, decayed: Array, state: list[Array]) -> Array:
        state[0][:] = self.b1 * state[0] + self.one_b1 * decayed
        state[1][:] = self.b2 * state[1] + self.one_b2 * (decayed * decayed)
        return self.size * state[0] / (np.sqrt(state[1]) * self.scale + self.eps)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x - self.moments(g + self.wd * x, state)]


class Cadam(DAdam):
    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [g]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        return x - self.moments(mixed[0] + self.wd * x, state)


class DAmsgrad(Dsgd):
    messages = 2

    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        eta, b1, b2, eps, wd = hyper
        self.eta, self.b1, self.one_b1, self.b2, self.one_b2 = scalars(dtype, eta, b1, 1.0 - b1, b2, 1.0 - b2)
        self.eps, self.wd = scalars(dtype, eps, wd)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x, state[3].copy()]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        decayed, before = g + self.wd * x, state[2].copy()
        state[0][:] = self.b1 * state[0] + self.one_b1 * decayed
        state[1][:] = self.b2 * state[1] + self.one_b2 * (decayed * decayed)
        state[2][:] = np.maximum(before, state[1])
        state[3][:] = mixed[1] - before + state[2]
        return mixed[0] - self.eta * state[0] / np.sqrt(np.maximum(mixed[1], self.eps))


class Csgd(Dsgdm):
    form = "plain"

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [g]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        u = decayed = mixed[0] + self.wd * x
        if self.form != "plain":
            state[0][:] = self.beta * state[0] + decayed
            u = decayed + self.beta * state[0] if self.form == "nesterov" else state[0]
        return x - self.eta * u


class Csgdm(Csgd):
    form = "heavy ball"


class CsgdmN(Csgd):
    form = "nesterov"


class SlowmoOuter(Dsgd):
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


class D2(Dsgd):
    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x + state[0] - self.eta * (g + self.wd * x - state[1])]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = mixed[0] - x
        state[1][:] = g + self.wd * x
        return mixed[0]


class D2Plus(Dsgd):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        super().__init__(dtype, hyper)
        self.moves = hyper[0] != 0
        (self.per_eta,) = scalars(dtype, 1.0 / hyper[0] if self.moves else 0.0)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x - self.eta * (g + self.wd * x + state[0])]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        if self.moves:
            state[0][:] = self.per_eta * (x - mixed[0]) - (g + self.wd * x)
        return mixed[0]


class ExactDiffusion(Dsgd):
    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [x - self.eta * (g + self.wd * x) + state[0]]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = mixed[0] - (x - self.eta * (g + self.wd * x))
        return mixed[0]


class GradientTracking(Dsgd):
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


class GradientTrackingAtc(Dsgd):
    messages = 2

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        v = state[0] - self.eta * (g + self.wd * x)
        return [x + v, v]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = mixed[1] + self.eta * (g + self.wd * x)
        return mixed[0]


class MomentumTracking(Dsgdm):
    messages = 2

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        state[0][:] = self.beta * state[0] + (g + self.wd * x)
        return [x, state[1] - state[0]]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        x_new = mixed[0] - self.eta * (state[0] - state[1])
        state[1][:] = mixed[1] + state[0]
        return x_new


class MomentumTrackingStart(Dsgd):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        (self.gain,) = scalars(dtype, 1.0 / (1.0 - hyper[0]))

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [g]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = state[1][:] = self.gain * (g - mixed[0])
        return x


class DecentLam(Dsgd):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        eta, beta, wd = hyper
        self.eta, self.wd, self.keep, self.eta_beta = scalars(dtype, eta, wd, 1.0 if eta == 0 else beta, eta * beta)
        (self.per_eta,) = scalars(dtype, 0.0 if eta == 0 else 1.0 / eta)

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        x_new = mixed[0] - self.eta_beta * state[0]
        state[0][:] = self.keep * state[0] + self.per_eta * (x - mixed[0])
        return x_new


class Gut(Dsgd):
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


class RelayGrad(Dsgd):
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


class ChocoSend(Dsgd):
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


class ChocoReceive(Dsgd):
    def __init__(self, dtype: Any, hyper: list[float]) -> None:
        (self.gamma,) = scalars(dtype, *hyper)

    def local(self, x: Array, g: Array, state: list[Array]) -> list[Array]:
        return [state[2].copy()]

    def merge(self, x: Array, g: Array, state: list[Array], mixed: list[Array]) -> Array:
        state[0][:] = state[0] + state[2]
        state[1][:] = state[1] + mixed[0]
        return x + self.gamma * (state[1] - state[0])


RULES: dict[str, Callable[[Any, list[float]], Any]] = {
    "dsgd": Dsgd,
    "dsgdm": Dsgdm,
    "dsgdm_n": DsgdmN,
    "qg_dsgdm": QgDsgdm,
    "qg_dsgdm_n": QgDsgdmN,
    "qg_dsgdm_multistep": QgDsgdmMultistep,
    "qg_dsgdm_n_multistep": QgDsgdmNMultistep,
    "dsgd_cta": DsgdCta,
    "d_adam": DAdam,
    "damsgrad": DAmsgrad,
    "csgd": Csgd,
    "csgdm": Csgdm,
    "csgdm_n": CsgdmN,
    "cadam": Cadam,
    "slowmo_outer": SlowmoOuter,
    "d2": D2,
    "d2_plus": D2Plus,
    "exact_diffusion": ExactDiffusion,
    "gradient_tracking": GradientTracking,
    "gradient_tracking_m": GradientTrackingM,
    "gradient_tracking_m_n": GradientTrackingMN,
    "gradient_tracking_atc": GradientTrackingAtc,
    "momentum_tracking": MomentumTracking,
    "momentum_tracking_start": MomentumTrackingStart,
    "decentlam": DecentLam,
    "gut": Gut,
    "qg_gutm": QgGutm,
    "qg_gutm_n": QgGutmN,
    "sgp": Sgp,
    "qg_sgp": QgSgp,
    "qg_dadam": QgDadam,
    "qg_dadam_v2": QgDadamV2,
    "relay_grad": RelayGrad,
    "relay_grad_m": RelayGradM,
    "relay_grad_m_n": RelayGradMN,
    "choco_send": ChocoSend,
    "choco_receive": ChocoReceive,
}


def mix(messages: list[Array], mixing: Any) -> list[Array]:
    """sum_j w_ij m_j for every worker, neighbours in ascending order; the complete graph as sum times 1/n."""
    n, dtype = len(messages), messages[0].dtype.type
    if mixing.form == "mean":
        total = messages[0].copy()
        for message in messages[1:]:
            total = total + message
        return [total * (dtype(1) / dtype(n))] * n
    out = []
    for i in range(n):
        columns, weights = mixing.row(i)
        total = dtype(weights[0]) * messages[columns[0]]
        for j, weight in zip(columns[1:], weights[1:], strict=True):
            total = total + dtype(weight) * messages[j]
        out.append(messages[i] if mixing.form == "identity" else total)
    return out


def gossip_step(
    x: torch.Tensor,
    g: torch.Tensor,
    state: list[torch.Tensor],
    mixing: Any,
    rule: str,
    hyper: list[float],
    row_scalars: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The new x and state of one fused step, bit by bit; arguments are not changed."""
    dtype = np.float64 if x.dtype == torch.float64 else np.float32
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    each = [RULES[rule](dtype, hyper) for _ in range(len(x))]
    if row_scalars is not None:
        for one, values in zip(each, row_scalars.numpy(), strict=True):
            one.set_row(values)
    xs, gs = x.to(wide).numpy(), g.to(wide).numpy()
    states = [vector.clone() for vector in state]
    rows = [[vector[i].numpy() for vector in states] for i in range(len(xs))]
    messages = [each[i].local(xs[i], gs[i], rows[i]) for i in range(len(xs))]
    mixed = [mix([message[k] for message in messages], mixing) for k in range(each[0].messages)]
    new = [each[i].merge(xs[i], gs[i], rows[i], [part[i] for part in mixed]) for i in range(len(xs))]
    return torch.from_numpy(np.stack(new)).to(x.dtype), states
