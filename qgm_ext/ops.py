"""The ops: the fused steps and reductions of the native kernels, as functions of torch tensors.

Eight ops, registered with torch.library as ``torch.ops.qgm_ext.*``; the first four change tensors in place and return
nothing:

- ``gossip_step_``: the fused step of n stacked workers: local step, gossip averaging and merge in one pass;
- ``relay_step_``: the same with messages relayed over trees, RelaySum;
- ``local_step_``, ``merge_``: the same step of one worker in two halves, around communication; ``prepare_local_step``
  and ``prepare_merge`` check their tensors once for many steps;
- ``squared_norms``, ``consensus_distance``, ``rows_are_finite``: reductions with a fixed order of summation;
- ``sum_blocks``: the end of ``squared_norms``, for a rule whose pass has summed the squares block by block.

What a step computes is said by a *rule*, a name from :func:`rules`; its state vectors and hyper-parameters are listed
in the header of the rule (csrc/rules). :mod:`qgm_ext.algorithms` maps algorithms to rules. The same step in plain
PyTorch is in :mod:`qgm_ext.reference`. There is no fallback to slow code: without the native module the first use
raises an ImportError that says how to build it. Schemas, argument checks and dispatch are in qgm_ext/_ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgm_ext._native import Rule, compute_dtype, has_native, rules
from qgm_ext._ops import REDUCE_BLOCK, Prepared, block_sums_shape, prepare_local_step, prepare_merge

__all__ = [
    "REDUCE_BLOCK",
    "Prepared",
    "Rule",
    "compute_dtype",
    "consensus_distance",
    "gossip_step_",
    "has_native",
    "local_step_",
    "merge_",
    "new_block_sums",
    "prepare_local_step",
    "prepare_merge",
    "relay_step_",
    "rows_are_finite",
    "rules",
    "squared_norms",
    "sum_blocks",
]


def gossip_step_(
    x: Tensor,
    g: Tensor,
    state: list[Tensor],
    mixing: tuple[Tensor, Tensor, Tensor],
    form: str,
    rule: str,
    hyper: list[float],
    row_scalars: Tensor | None = None,
    block_sums: Tensor | None = None,
) -> None:
    """One fused step of n workers: local step, x_new_i = sum_j w_ij message_j, merge. Each number is read once.

    Args:
        x: parameters, [n, D], float64|float32|bfloat16|float16, rows contiguous, any row stride. Changed in place.
        g: gradients at x, like x. Not changed.
        state: the rule's state vectors, each [n, D], float32 (float64 for float64 x), one row stride. Changed in place.
        mixing: (row_offsets [n + 1] int32, columns [nnz] int32, weights [nnz] in the state's dtype), compressed rows
            with ascending columns, as :meth:`qgm_ext.mixing.Mixing.tensors` gives them.
        form: "identity", "mean" (complete graph), "sparse" or "dense".
        rule: which algorithm, a name from :func:`rules`.
        hyper: the rule's hyper-parameters in the order of its header.
        row_scalars: the rule's numbers for each worker, [n, k] contiguous in the state's dtype, if it has any.
        block_sums: what :func:`new_block_sums` gives for x, if the rule has a state whose norm it needs: the new
            state's squares of each worker are summed there block by block, for :func:`sum_blocks`. Written.

    Raises:
        TypeError, ValueError: if a tensor has another shape, dtype, device or layout, tensors overlap, or rule, form
            or the numbers of states and hyper-parameters don't fit; nothing has been changed then.
    """
    torch.ops.qgm_ext.gossip_step_.default(x, g, state, *mixing, form, rule, hyper, row_scalars, block_sums)


def relay_step_(
    x: Tensor,
    g: Tensor,
    state: list[Tensor],
    messages: Tensor,
    trees: tuple[Tensor, ...],
    counts: Tensor,
    rule: str,
    hyper: list[float],
) -> None:
    """One fused step of n workers in which messages are relayed over K trees (RelaySum) instead of averaged.

    With h_i the message of the rule and, for every edge s -> i, m_si <- h_s + sum of the last m_ls over the neighbours
    l of s but i: the rule merges (count_i h_i + sum_s m_si) / n. Coordinate c belongs to tree c mod K.

    Args:
        x: parameters, [n, D]. Changed in place.
        g: gradients at x, like x.
        state: the rule's state vectors, each [n, D]. Changed in place.
        messages: the messages of the last step, [2 (n - 1), D] in the state's dtype. Changed in place.
        trees: (offsets [K, n + 1], senders [K, 2 (n - 1)], reverse [K, 2 (n - 1)]), int32, as
            :meth:`qgm_ext.trees.Trees.tensors` gives them.
        counts: how often a worker's own message counts, [K, n] in the state's dtype.
        rule: dsgd, dsgdm, dsgdm_n, relay_grad, relay_grad_m or relay_grad_m_n.
        hyper: its hyper-parameters.

    Raises:
        TypeError, ValueError: as in :func:`gossip_step_`, or if the rule can't be relayed.
    """
    torch.ops.qgm_ext.relay_step_.default(x, g, state, messages, *trees, counts, rule, hyper)


def local_step_(
    x: Tensor,
    g: Tensor,
    state: list[Tensor],
    messages: list[Tensor],
    rule: str,
    hyper: list[float],
    row_scalars: Tensor | None = None,
) -> None:
    """The half of a step before communication: writes what one worker sends.

    Args:
        x: parameters, [D], contiguous. Not changed.
        g: gradient at x, [D]. Not changed.
        state: the rule's state vectors, each [D], float32 (float64). Changed in place if the rule says so.
        messages: where the messages go, each [D], in the state's dtype: the send buffers. Written.
        rule: as in :func:`gossip_step_`.
        hyper: as in :func:`gossip_step_`.
        row_scalars: this worker's row of those of :func:`gossip_step_`, [k].

    Raises:
        TypeError, ValueError: as in :func:`gossip_step_`.
    """
    torch.ops.qgm_ext.local_step_.default(x, g, state, messages, rule, hyper, row_scalars)


def merge_(
    x: Tensor,
    g: Tensor,
    state: list[Tensor],
    received: list[Tensor],
    weights: list[float],
    mean: bool,
    rule: str,
    hyper: list[float],
    row_scalars: Tensor | None = None,
    block_sums: Tensor | None = None,
) -> None:
    """The half of a step after communication: mixes the messages and makes the new parameters and state.

    Args:
        x: parameters, [D]. Changed in place.
        g: gradient at the old x, [D]. Not changed.
        state: the rule's state vectors, each [D]. Changed in place.
        received: the messages of this worker and its neighbours in ascending worker order: first all workers'
            message 0, then all workers' message 1, ...; each [D], in the state's dtype. Not changed.
        weights: the mixing weight of each worker, in the same order.
        mean: take the plain mean instead of the weights, as the complete graph does.
        rule: as in :func:`gossip_step_`.
        hyper: as in :func:`gossip_step_`.
        row_scalars: this worker's row of those of :func:`gossip_step_`, [k].
        block_sums: this worker's row of those of :func:`gossip_step_`, [blocks]. Of a bucket that begins at a multiple
            of :data:`REDUCE_BLOCK` they are the bucket's part of the whole row's.

    Raises:
        TypeError, ValueError: as in :func:`gossip_step_`.
    """
    torch.ops.qgm_ext.merge_.default(x, g, state, received, weights, mean, rule, hyper, row_scalars, block_sums)


def new_block_sums(x: Tensor) -> Tensor:
    """Room for the block sums of a pass over x: float64 [n, ceil(D / 4096)], or [ceil(D / 4096)] for x [D]."""
    return x.new_empty(block_sums_shape(x), dtype=torch.float64)


def sum_blocks(block_sums: Tensor) -> Tensor:
    """The squared norms of the rows whose block sums a pass has left, float64 [n]: those of :func:`squared_norms`."""
    return torch.ops.qgm_ext.sum_blocks.default(block_sums)  # type: ignore[no-any-return]


def squared_norms(x: Tensor) -> Tensor:
    """||x_i||^2 of every row of x [n, D], float64 [n]; the same bits on every device and thread count."""
    return torch.ops.qgm_ext.squared_norms.default(x)  # type: ignore[no-any-return]


def consensus_distance(x: Tensor) -> Tensor:
    """sqrt((1/n) sum_i ||x_i - x_mean||^2) of x [n, D], a float64 scalar; same bits on every device."""
    return torch.ops.qgm_ext.consensus_distance.default(x)  # type: ignore[no-any-return]


def rows_are_finite(x: Tensor) -> Tensor:
    """Whether each row of x [n, D] is free of infinities and NaN, bool [n]."""
    return torch.ops.qgm_ext.rows_are_finite.default(x)  # type: ignore[no-any-return]
