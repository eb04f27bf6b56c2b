"""One step of an optimizer whose worker averages with others: what :meth:`DecentralizedOptimizer.step` does then.

All flat buffers of all groups step together, through the optimizer's :class:`qgm_ext.optim.peers.Peers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qgm_ext.distributed.engine import Clock
from qgm_ext.optim.peers import Peers, Work
from qgm_ext.stacked import NonFiniteGradientError

if TYPE_CHECKING:
    from qgm_ext.optim.base import DecentralizedOptimizer

__all__ = ["collect_works", "count_step", "is_left_out", "step_together"]


def collect_works(optimizer: DecentralizedOptimizer, peers: Peers) -> list[Work]:
    """The next step of every flat buffer; parameters and state are bound, gradients are not gathered.

    Raises:
        TypeError, ValueError: if parameters, state or hyper-parameters don't fit.
    """
    works: list[Work] = []
    for index, group in enumerate(optimizer.param_groups):
        algorithm, lr = optimizer._algorithm(index, group)
        flats = optimizer._bind(index, group["params"])
        kept = group.get("clock", {})
        for flat in flats:
            vectors, fresh = flat.vectors(optimizer.state, peers.state_names(algorithm))
            scalars = kept.get("scalars", {})
            clock = Clock(
                int(flat.steps[0]),
                kept.get("round", 0),
                kept.get("previous_lr"),
                {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()},
            )
            works.append(Work(flat, group, vectors, algorithm, lr, group["maximize"], clock, fresh))
        if len(flats) > 1 and algorithm.initial_scalars(1):
            raise ValueError(
                f"{algorithm.name} keeps one number for all parameters of a group: they must be of one dtype and "
                f"device, and be trainable from the start, got {len(flats)} kinds in group {index}"
            )
    return works


def step_together(optimizer: DecentralizedOptimizer, peers: Peers) -> None:
    """One step.

    Raises:
        TypeError, ValueError: as :func:`collect_works`, or if gradients don't fit.
        NonFiniteGradientError: as the optimizer says.
        RuntimeError: if a part of it was taken during backward, and something has changed since.
    """
    works, overlap = collect_works(optimizer, peers), optimizer._overlap
    if overlap is not None and overlap.has_begun:
        works = overlap.finish(works)
    else:
        for work in works:
            work.flat.gather(range(len(work.flat.params)), work.maximize)
        gradients = [work.vectors.g for work in works]
        _unscale(optimizer, gradients)
        peers.clip(works)
        if is_left_out(optimizer, peers, gradients):
            return
        peers.step(works, optimizer._gossips)
    count_step(works)
    if overlap is not None:
        overlap.watch(works)


def is_left_out(optimizer: DecentralizedOptimizer, peers: Peers, gradients: Sequence[Tensor]) -> bool:
    """Whether the step is left out, and counted so, because a gradient of some worker is not finite.

    Raises:
        NonFiniteGradientError: if the optimizer says so.
    """
    bad = peers.nonfinite(gradients) if optimizer.on_nonfinite != "ignore" else []
    if bad and optimizer.on_nonfinite == "raise":
        raise NonFiniteGradientError(
            f"the gradient of worker{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad))} is not finite; "
            "parameters and state are as before the step (on_nonfinite='skip' leaves such steps out)"
        )
    optimizer.skipped_steps += bool(bad)
    return bool(bad)


def count_step(works: Sequence[Work]) -> None:
    """Note in groups and parameters that a step has been taken."""
    for work in works:  # the last buffer of a group is as good as any
        clock = work.clock
        scalars = {name: value.tolist() for name, value in clock.scalars.items()}
        work.group["clock"] = {"round": clock.round, "previous_lr": clock.previous_lr, "scalars": scalars}
    changed = [p for work in works for p in work.flat.advance(range(len(work.flat.params)))]
    torch.autograd.graph.increment_version(changed)


def _unscale(optimizer: DecentralizedOptimizer, gradients: Sequence[Tensor]) -> None:
    """Do what torch.amp.GradScaler has left to the step, if it is there."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)  # None also after scaler.unscale_(opt)
    overflow = bool(getattr(optimizer, "found_inf", False)) and optimizer.on_nonfinite == "ignore"
    for g in gradients:
        if overflow:
            g.zero_()
        elif scale is not None:
            g.mul_(scale.double().reciprocal().float())  # rounded as GradScaler does
