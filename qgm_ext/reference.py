"""Every algorithm and op in plain PyTorch, written to be read: the oracle of the tests, the baseline of benchmarks.

A step works on n stacked workers: x, g and each state vector are [n, D]; w is the mixing matrix [n, n]. Nothing here
is tuned, nothing is changed in place, and any floating-point dtype works, float64 best. The equations are the papers'
(see the docstrings in :mod:`qgm_ext.algorithms`), divisions by the step size included, so they are an independent
check of the coefficients that the compiled rules fold together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qgm_ext.algorithms import Algorithm
from qgm_ext.topology import Topology

State = dict[str, Tensor]
Step = Callable[[Any, Tensor, Tensor, State, Tensor, int, float], tuple[Tensor, State]]


def gossip(w: Tensor, messages: Tensor) -> Tensor:
    """Gossip averaging: row i of the result is sum_j w_ij messages_j."""
    return w @ messages


def dsgd(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    return gossip(w, x - lr * g), {}


def dsgdm(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    m = a.momentum * state["momentum_buffer"] + g
    return gossip(w, x - lr * m), {"momentum_buffer": m}


def dsgdm_n(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    m = a.momentum * state["momentum_buffer"] + g
    return gossip(w, x - lr * (g + a.momentum * m)), {"momentum_buffer": m}


def qg_dsgdm(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    m = a.momentum * state["qg_momentum_buffer"] + g
    x_new = gossip(w, x - lr * m)
    return x_new, _quasi_global(a, x, x_new, state, step, lr)


def qg_dsgdm_n(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    m = a.momentum * state["qg_momentum_buffer"] + g
    x_new = gossip(w, x - lr * (g + a.momentum * m))
    return x_new, _quasi_global(a, x, x_new, state, step, lr)


def _quasi_global(a: Any, x: Tensor, x_new: Tensor, state: State, step: int, lr: float) -> State:
    """m_hat after a step: it takes the model difference, or every k-th step the mean of k of them."""
    m_hat = state["qg_momentum_buffer"]
    if lr == 0:
        return dict(state)
    difference = (x - x_new) / lr
    if a.local_step == 1:
        return {"qg_momentum_buffer": a.qg_momentum * m_hat + (1 - a.qg_momentum) * difference}
    total = state["difference_sum"] + difference
    if step % a.local_step != 0:
        return {"qg_momentum_buffer": m_hat, "difference_sum": total}
    m_hat = a.qg_momentum * m_hat + (1 - a.qg_momentum) * total / a.local_step
    return {"qg_momentum_buffer": m_hat, "difference_sum": torch.zeros_like(total)}


def dsgd_cta(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    return gossip(w, x) - lr * (g + a.weight_decay * x), {}


def adam_direction(a: Any, m: Tensor, v: Tensor, step: int) -> Tensor:
    """Adam's direction with its bias corrections, t = step + 1."""
    b1, b2 = a.betas
    t = step + 1
    direction: Tensor = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + a.eps)
    return direction


def d_adam(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    (b1, b2), g = a.betas, g + a.weight_decay * x
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    return gossip(w, x - lr * adam_direction(a, m, v, step)), {"exp_avg": m, "exp_avg_sq": v}


def damsgrad(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    (b1, b2), g = a.betas, g + a.weight_decay * x
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    v_max = torch.maximum(state["max_exp_avg_sq"], v)
    u_half = gossip(w, state["tracked_sq"])
    x_new = gossip(w, x) - lr * m / u_half.clamp(min=a.eps).sqrt()
    u = u_half - state["max_exp_avg_sq"] + v_max
    return x_new, {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v_max, "tracked_sq": u}


def csgd(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    return x - lr * (g.mean(0) + a.weight_decay * x), {}


def csgdm(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    m = a.momentum * state["momentum_buffer"] + g.mean(0) + a.weight_decay * x
    return x - lr * m, {"momentum_buffer": m}


def csgdm_n(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    g = g.mean(0) + a.weight_decay * x
    m = a.momentum * state["momentum_buffer"] + g
    return x - lr * (g + a.momentum * m), {"momentum_buffer": m}


def cadam(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    (b1, b2), g = a.betas, g.mean(0) + a.weight_decay * x
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    return x - lr * adam_direction(a, m, v, step), {"exp_avg": m, "exp_avg_sq": v}


def slowmo(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    x, inner = dsgdm_n(a, x, g, state, w, step, lr)
    s, u = state["slow_params"], state["slow_momentum_buffer"]
    if step % a.slowmo_period == 0:
        u = a.slowmo_momentum * u + (s - x.mean(0)) / lr
        s = s - a.slowmo_lr * lr * u
        x = s.clone()
    return x, {**inner, "slow_params": s, "slow_momentum_buffer": u}


def d2(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    x_before = x - state["difference"]
    x_new = gossip(w, x - lr * g if step == 0 else 2 * x - x_before - lr * (g - state["previous_grad"]))
    return x_new, {"difference": x_new - x, "previous_grad": g}


def d2_plus(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    x_new = gossip(w, x - lr * (state["correction"] + g))
    return x_new, {"correction": (x - x_new) / lr - g}


def exact_diffusion(
    a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float
) -> tuple[Tensor, State]:
    psi = x - lr * (g + a.weight_decay * x)
    psi_before = x - state["correction"]
    lazy = (torch.eye(len(w), dtype=w.dtype) + w) / 2
    x_new = gossip(lazy, psi + x - psi_before)
    return x_new, {"correction": x_new - psi}


def gradient_tracking(
    a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float
) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    y = state["correction"] + g
    return gossip(w, x) - lr * y, {"correction": gossip(w, y) - g}


def gradient_tracking_atc(
    a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float
) -> tuple[Tensor, State]:
    u, c = -lr * (g + a.weight_decay * x), state["correction"]
    return gossip(w, x + u + c), {"correction": gossip(w, c + u) - u}


def gradient_tracking_m(
    a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float
) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    y = state["correction"] + g
    m = a.momentum * state["momentum_buffer"] + y
    return gossip(w, x) - lr * m, {"correction": gossip(w, y) - g, "momentum_buffer": m}


def gradient_tracking_m_n(
    a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float
) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    y = state["correction"] + g
    m = a.momentum * state["momentum_buffer"] + y
    x_new = gossip(w, x) - lr * (y + a.momentum * m)
    return x_new, {"correction": gossip(w, y) - g, "momentum_buffer": m}


def momentum_tracking(
    a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float
) -> tuple[Tensor, State]:
    u, c = state["momentum_buffer"], state["correction"]
    if step == 0 and a.init == "allreduce":
        u = c = (g - g.mean(0)) / (1 - a.momentum)
    u = a.momentum * u + g + a.weight_decay * x
    return gossip(w, x) - lr * (u - c), {"momentum_buffer": u, "correction": gossip(w, c - u) + u}


def decentlam(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    m = a.momentum * state["momentum_buffer"] + (x - gossip(w, x - lr * g)) / lr
    return x - lr * m, {"momentum_buffer": m}


def gut(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    """GUT and QG-GUTm; x = p + gamma r with a worker's own model p; the state's correction is y - g."""
    beta, nesterov = getattr(a, "momentum", 0.0), getattr(a, "nesterov", False)
    b = 1 + beta + (beta * beta if nesterov else 0)
    lr_before = float(state["previous_lr"]) if step else lr
    g, r = g + a.weight_decay * x, state["mixing_displacement"]
    delta = g - r / lr_before
    y = g + state["correction"]
    own, m = x - a.gamma * r, None
    if "momentum_buffer" in state:
        m = beta * state["momentum_buffer"] + y
        y = y + beta * m if nesterov else m
    own_new = own - lr * y + (a.gamma - a.gamma**2) * r
    r_new = gossip(w, own_new) - own_new
    # The next y is g - r_new / lr - (mu / lr) [W (own_new - own) + B (W - I) own] - mu delta.
    correction = -r_new / lr - a.scaling / lr * (gossip(w, own_new) - (own + r) + b * r) - a.scaling * delta
    out = {"mixing_displacement": r_new, "correction": correction, "previous_lr": torch.tensor(lr, dtype=x.dtype)}
    x_new = own_new + a.gamma * r_new
    return x_new, out if m is None else {**out, "momentum_buffer": m}


def sgp(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    mass = state["push_sum_weight"][:, None]
    z = mass * x
    m = a.momentum * state["momentum_buffer"] + g + a.weight_decay * z
    z = z - lr * m
    z = z + a.gamma * (gossip(w, z) - z)
    mass = mass + a.gamma * (gossip(w, mass) - mass)
    return z / mass, {"momentum_buffer": m, "push_sum_weight": mass[:, 0]}


def qg_sgp(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    beta, m_hat, mass = a.momentum, state["qg_momentum_buffer"], state["push_sum_weight"][:, None]
    z = mass * x
    g = g + a.weight_decay * z
    d = g + beta * (beta * m_hat + g)
    m_hat = beta * m_hat + (1 - beta) * d
    z = z - lr * d
    r = a.gamma * (gossip(w, z) - z)
    mass = mass + a.gamma * (gossip(w, mass) - mass)
    m_hat = m_hat - (1 - beta) * r / (lr * mass)
    return (z + r) / mass, {"qg_momentum_buffer": m_hat, "push_sum_weight": mass[:, 0]}


def qg_dadam(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    """The moments in the state are those before the last difference went in: they take it here, at the start."""
    b1, b2 = a.betas
    d = state["difference"] / (state["difference"].norm(dim=1, keepdim=True) + a.normalization_eps)
    v_hat = b2 * state["qg_exp_avg_sq"] + (1 - b2) * d * d
    if a.variant == "v1":
        g = g / (g.norm(dim=1, keepdim=True) + a.normalization_eps)
    g = g + a.weight_decay * x
    if a.variant == "v2":
        m = kept = b1 * state["exp_avg"] + (1 - b1) * g
    else:
        kept = b1 * state["qg_exp_avg"] + (1 - b1) * d
        m = b1 * kept + (g if a.variant == "v0" else (1 - b1) * g)
    v = b2 * v_hat + (1 - b2) * g * g
    x_new = gossip(w, x - lr * adam_direction(a, m, v, step))
    delta = x - x_new
    name = "exp_avg" if a.variant == "v2" else "qg_exp_avg"
    return x_new, {name: kept, "qg_exp_avg_sq": v_hat, "difference": delta, "difference_norm": delta.norm(dim=1)}


def relay(w: Tensor, h: Tensor, messages: Tensor) -> tuple[Tensor, Tensor]:
    """RelaySum on the tree of W's links: the new messages and, for each worker, the sum of those it received."""
    links = [(i, j) for i, j in (w != 0).nonzero().tolist() if i != j]  # (receiver, sender), in the state's order
    number = {link: e for e, link in enumerate(links)}
    new = torch.empty_like(messages)
    for (i, s), e in number.items():
        new[e] = h[s] + sum((messages[number[s, other]] for (r, other) in links if r == s and other != i), h[s] * 0)
    received = torch.stack([sum((new[number[i, j]] for (r, j) in links if r == i), h[i] * 0) for i in range(len(w))])
    return new, received


def tree_distances(w: Tensor) -> Tensor:
    """Hops between workers."""
    n = len(w)
    reach = torch.eye(n, dtype=torch.bool)
    hops = torch.where(reach, 0, n)
    for hop in range(1, n):
        reach = reach | ((w != 0).double() @ reach.double() > 0)
        hops = torch.minimum(hops, torch.where(reach, hop, n))
    return hops


def _relay_direction(a: Any, x: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
    g = g + a.weight_decay * x
    if a.momentum == 0:
        return g, {}
    m = a.momentum * state["momentum_buffer"] + g
    return (g + a.momentum * m if a.nesterov else m), {"momentum_buffer": m}


def relaysgd(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    """With fill "initial" the messages of the start hold the initial parameters of all that are not yet heard of."""
    direction, kept = _relay_direction(a, x, g, state)
    x_half, n = x - lr * direction, len(x)
    messages, received = relay(w, x_half, state["relay_messages"])
    own = torch.ones(n, 1, dtype=x.dtype)
    if a.fill == "current":
        own = (n - ((tree_distances(w) <= step + 1).sum(1) - 1)).to(x.dtype)[:, None]
    return (own * x_half + received) / n, {**kept, "relay_messages": messages}


def relaysgd_grad(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    direction, kept = _relay_direction(a, x, g, state)
    messages, received = relay(w, -lr * direction, state["relay_messages"])
    return x + (received - lr * direction) / len(x), {**kept, "relay_messages": messages}


def choco_sgd(a: Any, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> tuple[Tensor, State]:
    m = a.momentum * state["momentum_buffer"] + g + a.weight_decay * x
    direction = g + a.weight_decay * x + a.momentum * m if a.nesterov else m
    known = state["known_params"]
    x = x - lr * direction
    if a.order == "cta":
        x = x + a.gamma * (gossip(w, known) - known)
    q = x - known
    q = a.compress(q, step)
    known = known + q
    if a.order == "atc":
        x = x + a.gamma * (gossip(w, known) - known)
    return x, {"momentum_buffer": m, "known_params": known, "mixed_known_params": gossip(w, known), "message": q}


STEPS: dict[str, Step] = {
    "dsgd": dsgd,
    "dsgdm": dsgdm,
    "dsgdm_n": dsgdm_n,
    "qg_dsgdm": qg_dsgdm,
    "qg_dsgdm_n": qg_dsgdm_n,
    "dsgd_cta": dsgd_cta,
    "d_adam": d_adam,
    "damsgrad": damsgrad,
    "csgd": csgd,
    "csgdm": csgdm,
    "csgdm_n": csgdm_n,
    "cadam": cadam,
    "slowmo": slowmo,
    "d2": d2,
    "d2_plus": d2_plus,
    "exact_diffusion": exact_diffusion,
    "gradient_tracking": gradient_tracking,
    "gradient_tracking_atc": gradient_tracking_atc,
    "gradient_tracking_m": gradient_tracking_m,
    "gradient_tracking_m_n": gradient_tracking_m_n,
    "momentum_tracking": momentum_tracking,
    "decentlam": decentlam,
    "gut": gut,
    "qg_gutm": gut,
    "sgp": sgp,
    "qg_sgp": qg_sgp,
    "qg_dadam": qg_dadam,
    "relaysgd": relaysgd,
    "relaysgd_grad": relaysgd_grad,
    "choco_sgd": choco_sgd,
}


def initial_state(algorithm: Algorithm, x: Tensor, topology: Topology | None = None) -> State:
    """The state before the first step: vectors like x, mostly zero, and what else each worker keeps, [n].

    Args:
        algorithm: from :func:`qgm_ext.algorithms.get`.
        x: parameters, [n, D].
        topology: needed where the state depends on it: messages that live on edges.
    """
    rows = {
        name: len(x) if topology is None else algorithm.state_rows(name, topology) for name in algorithm.state_names
    }
    state: State = {name: x.new_zeros(count, x.shape[1]) for name, count in rows.items()}
    if topology is not None:
        algorithm.start_state(topology, x, state)
    else:
        for name, vector in state.items():
            start = algorithm.initial_value(name)
            vector.copy_(x if start == "params" else torch.full_like(x, start))
    return {**state, **{name: value.to(x) for name, value in algorithm.initial_scalars(len(x)).items()}}


def step(
    algorithm: Algorithm, x: Tensor, g: Tensor, state: State, w: Tensor, step: int = 0, lr: float | None = None
) -> tuple[Tensor, State]:
    """One step of any algorithm.

    Args:
        algorithm: from :func:`qgm_ext.algorithms.get`.
        x: parameters, [n, D].
        g: gradients at x, [n, D].
        state: name -> [n, D] (numbers of each worker: [n]), from :func:`initial_state` or the previous step.
        w: mixing matrix, [n, n]; row i is what worker i receives.
        step: number of the step, from 0.
        lr: step size of this step; None takes the algorithm's.

    Returns:
        The new x and the new state; the arguments are unchanged.

    Example:
        >>> from qgm_ext import algorithms
        >>> a = algorithms.get("dsgd", lr=0.5)
        >>> x, g, w = torch.tensor([[0.0], [4.0]]), torch.tensor([[2.0], [0.0]]), torch.full((2, 2), 0.5)
        >>> step(a, x, g, {}, w)[0].tolist()
        [[1.5], [1.5]]
    """
    return STEPS[algorithm.name](algorithm, x, g, state, w, step, algorithm.lr if lr is None else lr)


def squared_norms(x: Tensor) -> Tensor:
    """||x_i||^2 of every row, summed in float64."""
    return x.double().square().sum(1)


def consensus_distance(x: Tensor) -> Tensor:
    """sqrt((1/n) sum_i ||x_i - mean||^2), in float64."""
    x = x.double()
    return (x - x.mean(0)).square().sum(1).mean().sqrt()


def rows_are_finite(x: Tensor) -> Tensor:
    """Whether each row is free of infinities and NaN."""
    return torch.isfinite(x).all(1)
