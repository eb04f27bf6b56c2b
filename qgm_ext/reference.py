"""What tests and benchmarks compare with: steps and ops in plain PyTorch, written to be read.

A step works on n stacked workers: x, g and each state vector are [n, D]; w is the mixing matrix [n, n]. Nothing here
is tuned, nothing is changed in place, and any floating-point dtype works, float64 best. The equations of an algorithm
are in its ``reference_step``, beside its docstring (:mod:`qgm_ext.algorithms`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qgm_ext.algorithms import Algorithm, State, StepResult
    from qgm_ext.topology import Topology


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
) -> StepResult:
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

    Raises:
        NotImplementedError: if the algorithm has no ``reference_step``.

    Example:
        >>> from qgm_ext import algorithms
        >>> a = algorithms.get("dsgd", lr=0.5)
        >>> x, g, w = torch.tensor([[0.0], [4.0]]), torch.tensor([[2.0], [0.0]]), torch.full((2, 2), 0.5)
        >>> step(a, x, g, {}, w)[0].tolist()
        [[1.5], [1.5]]
    """
    return algorithm.reference_step(x, g, state, w, step, algorithm.lr if lr is None else lr)


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
