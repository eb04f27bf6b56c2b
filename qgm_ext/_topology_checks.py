"""Whether what users give for a topology can be one: number of workers, matrices, edges. Errors name what is wrong.

The constructors that ask are in :mod:`qgm_ext.topology`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qgm_ext import graphs
from qgm_ext._topology import Topology, to_integer, unreached
from qgm_ext.mixing import Mixing

__all__ = ["check_both_ways", "check_connected", "check_stochastic", "check_uniform", "checked_workers"]

# How far a row or column sum may be from one. Rounding in float64 stays far below; a matrix computed in float32 is
# above, and is refused, because the mean of the workers would drift by that much in every step.
_SUM_TOLERANCE = 1e-9

_MOST_WORKERS = 2**24  # more are taken for a slip: their edges alone would fill the memory


def checked_workers(name: str, n: SupportsIndex) -> int:
    """The number of workers as an int, if a topology can have as many."""
    number = to_integer(f"n (number of workers of {name})", n, 1)
    if number > _MOST_WORKERS:
        raise ValueError(f"n (number of workers of {name}) must be at most {_MOST_WORKERS:,}, got {number}")
    return number


def check_connected(name: str, parts: Sequence[Topology], allow_disconnected: bool) -> None:
    """Refuse parts of a topology over which not every worker reaches worker 0."""
    lost = [] if allow_disconnected else unreached(parts)
    if lost:
        over = f" over its period of {len(parts)} steps" if len(parts) > 1 else ""
        raise ValueError(
            f"topology {name!r} is not connected{over}: {graphs.enumerate_workers(lost)} can't reach worker 0, not "
            f"even through others, so the workers never agree; pass allow_disconnected=True if that is meant"
        )


def check_stochastic(argument: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return value as a float64 array if it is a doubly stochastic matrix; else say what is wrong and where."""
    try:
        given = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument} must be an [n, n] array of real numbers, got {type(value).__name__}") from error
    if given.dtype.kind not in "iuf":
        raise TypeError(
            f"{argument} must be an [n, n] array of real numbers, got {type(value).__name__} of dtype {given.dtype}"
        )
    matrix = given.astype(np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"{argument} must be square with at least one row, got shape {list(matrix.shape)}")
    for wrong, expected in ((~np.isfinite(matrix), "must be finite"), (matrix < 0.0, "must not be negative")):
        if wrong.any():
            row, column = (int(axis[0]) for axis in np.nonzero(wrong))
            count = int(wrong.sum())
            others = f" ({count} such entries in all)" if count > 1 else ""
            raise ValueError(f"{argument}[{row}, {column}] {expected}, got {matrix[row, column]}{others}")
    for axis, kind in ((1, "row"), (0, "column")):
        sums = matrix.sum(axis=axis)
        off = np.flatnonzero(np.abs(sums - 1.0) > _SUM_TOLERANCE)
        if off.size:
            _raise_bad_sum(argument, matrix, kind, off, float(sums[off[0]]))
    return matrix


def _raise_bad_sum(argument: str, matrix: NDArray[np.float64], kind: str, off: NDArray[np.int64], total: float) -> None:
    line = int(off[0])
    entries = matrix[line] if kind == "row" else matrix[:, line]
    largest = int(entries.argmax())
    place = (line, largest) if kind == "row" else (largest, line)
    why = "a worker's weights must add up" if kind == "row" else "otherwise averaging would change the workers' mean"
    hint = "; computed in float32? compute it in float64" if abs(total - 1.0) < 1e-4 else ""
    others = f" ({off.size} {kind}s are off)" if off.size > 1 else ""
    raise ValueError(
        f"{argument}: {kind} {line} sums to {total:.10g}, expected 1 within {_SUM_TOLERANCE:g}: {why}; its largest "
        f"entry is [{place[0]}, {place[1]}] = {entries[largest]:.10g}{others}{hint}"
    )


def check_both_ways(n: int, found: graphs.Edges, nodes: Sequence[Any]) -> None:
    """Refuse edges without their opposite."""
    to, frm = found
    one_way = np.flatnonzero(~np.isin(to * n + frm, frm * n + to))
    if one_way.size:
        sender, receiver = int(frm[one_way[0]]), int(to[one_way[0]])
        raise ValueError(
            f"weights='metropolis' needs every edge both ways, but {_label(sender, nodes)} sends to "
            f"{_label(receiver, nodes)} and not back; use weights='uniform' or an undirected graph"
        )


def check_uniform(n: int, found: graphs.Edges, mixing: Mixing, nodes: Sequence[Any]) -> None:
    """Refuse uniform weights whose columns don't sum to one."""
    sums = np.bincount(mixing.columns, weights=mixing.weights, minlength=n)
    off = np.flatnonzero(np.abs(sums - 1.0) > _SUM_TOLERANCE)
    if off.size:
        worker, (to, frm) = int(off[0]), found
        received, sent = int((to == worker).sum()), int((frm == worker).sum())
        degree = f"degree {received}" if received == sent else f"in-degree {received} and out-degree {sent}"
        raise ValueError(
            f"weights='uniform' is doubly stochastic only on regular graphs: {_label(worker, nodes)} with {degree} "
            f"would count {sums[worker]:.6g} times in the mean instead of once; use weights='metropolis'"
        )


def _label(worker: int, nodes: Sequence[Any]) -> str:
    return f"worker {worker}" if nodes[worker] == worker else f"worker {worker} (node {nodes[worker]!r})"
