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


STEPS: dict[str, Step] = {
    "dsgd": dsgd,
    "dsgdm": dsgdm,
    "dsgdm_n": dsgdm_n,
    "qg_dsgdm": qg_dsgdm,
    "qg_dsgdm_n": qg_dsgdm_n,
}


def initial_state(algorithm: Algorithm, x: Tensor) -> State:
    """The state before the first step: zeros like x."""
    return {name: torch.zeros_like(x) for name in algorithm.state_names}


def step(
    algorithm: Algorithm, x: Tensor, g: Tensor, state: State, w: Tensor, step: int = 0, lr: float | None = None
) -> tuple[Tensor, State]:
    """One step of any algorithm.

    Args:
        algorithm: from :func:`qgm_ext.algorithms.get`.
        x: parameters, [n, D].
        g: gradients at x, [n, D].
        state: name -> [n, D], from :func:`initial_state` or the previous step.
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
