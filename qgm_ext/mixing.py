"""The mixing matrix as the kernels see it: compressed rows and the special form that lets a kernel do less.

This file holds the storage format and its conversion to tensors. It does not know graphs, weight rules or double
stochasticity (:mod:`qgm_ext.topology`), and it moves no parameters (:mod:`qgm_ext.ops`). torch is imported only when
tensors are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["Form", "Mixing"]

Form = Literal["identity", "mean", "sparse", "dense"]

# Weights that come from 1 - sum(...) may miss 1/n or 1 by a few units in the last place. Such a matrix is still the
# mean or the identity, and is stored as exactly that, because it is what those kernels compute with.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Mixing:
    """One mixing matrix W, [n, n], in compressed sparse rows.

    Row i holds what worker i receives: ``x_new[i] = sum_k weights[k] * x[columns[k]]`` with k from ``row_offsets[i]``
    to ``row_offsets[i + 1] - 1``. The rows are stored in full for every form, so any driver can use them.

    Args:
        form: "identity" (W = I: nothing is mixed), "mean" (every entry is 1/n), "dense" (no entry is zero, and not
            mean) or "sparse" (anything else).
        num_workers: n >= 1.
        row_offsets: [n + 1], int32, from 0 to nnz, not decreasing.
        columns: [nnz], int32, strictly ascending within each row. Kernels sum in this order, which fixes the bits.
        weights: [nnz], float64, finite.

    The arrays are copied, made C-contiguous and read-only.

    Raises:
        ValueError: if the arrays don't describe an n x n matrix (a kernel would read out of bounds).
    """

    form: Form
    num_workers: int
    row_offsets: NDArray[np.int32]
    columns: NDArray[np.int32]
    weights: NDArray[np.float64]
    _tensors: dict[Any, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )
    _relaxed: dict[float, Mixing] = field(default_factory=dict, init=False, repr=False)
    _without: dict[tuple[int, ...], Mixing] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.form not in ("identity", "mean", "sparse", "dense"):
            raise ValueError(f"form must be 'identity', 'mean', 'sparse' or 'dense', got {self.form!r}")
        for name, dtype in (("row_offsets", np.int32), ("columns", np.int32), ("weights", np.float64)):
            array = np.array(getattr(self, name), dtype=dtype, order="C")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        self._check()

    def _check(self) -> None:
        n, offsets, columns, weights = self.num_workers, self.row_offsets, self.columns, self.weights
        if n < 1:
            raise ValueError(f"num_workers must be at least 1, got {n}")
        if offsets.shape != (n + 1,):
            raise ValueError(f"row_offsets must have shape [num_workers + 1] = [{n + 1}], got {list(offsets.shape)}")
        if columns.ndim != 1 or columns.shape != weights.shape:
            raise ValueError(
                f"columns and weights must be one-dimensional and equally long, got shapes {list(columns.shape)} and "
                f"{list(weights.shape)}"
            )
        if offsets[0] != 0 or offsets[-1] != columns.size or np.any(np.diff(offsets) < 0):
            raise ValueError(f"row_offsets must rise from 0 to the number of entries {columns.size}, got {offsets}")
        if columns.size and (columns.min() < 0 or columns.max() >= n):
            raise ValueError(f"columns must be in [0, {n}), got values from {columns.min()} to {columns.max()}")
        rows = np.repeat(np.arange(n), np.diff(offsets))
        falls = np.flatnonzero((np.diff(rows) == 0) & (np.diff(columns) <= 0))
        if falls.size:
            row = int(rows[falls[0]])
            raise ValueError(f"columns must ascend within each row, got {self.row(row)[0].tolist()} in row {row}")
        if not np.all(np.isfinite(weights)):
            entry = int(np.flatnonzero(~np.isfinite(weights))[0])
            raise ValueError(f"weights must be finite, got weights[{entry}] = {weights[entry]}")

    @classmethod
    def from_csr(cls, row_offsets: ArrayLike, columns: ArrayLike, weights: ArrayLike) -> Mixing:
        """Classify a matrix given by its compressed rows (no explicit zeros; see the class for shapes).

        Raises:
            ValueError: as the class, or if there are more entries than int32 can count.
        """
        offsets, cols, values = np.asarray(row_offsets), np.asarray(columns), np.asarray(weights, dtype=np.float64)
        n, nnz = offsets.size - 1, cols.size
        if nnz > np.iinfo(np.int32).max:
            raise ValueError(f"a mixing matrix may hold at most 2**31 - 1 entries, got {nnz}")
        form: Form = "sparse"
        if nnz == n and np.array_equal(cols, np.arange(n)) and np.all(np.abs(values - 1.0) <= _ROUNDING):
            form, values = "identity", np.ones(n)
        elif nnz == n * n:
            form = "dense"
            if np.all(np.abs(values * n - 1.0) <= _ROUNDING):
                form, values = "mean", np.full(nnz, 1.0 / n)
        return cls(form, n, offsets, cols, values)

    @classmethod
    def from_matrix(cls, matrix: ArrayLike) -> Mixing:
        """Compress a dense matrix and find its form. n = 1 is "identity".

        Args:
            matrix: [n, n], finite; row i is what worker i receives. Not required to be stochastic here.
        Raises:
            ValueError: if it is not square, is empty or holds a value that is not finite.
        Example:
            >>> Mixing.from_matrix([[0.5, 0.5], [0.5, 0.5]]).form
            'mean'
        """
        dense = np.asarray(matrix, dtype=np.float64)
        if dense.ndim != 2 or dense.shape[0] != dense.shape[1] or dense.size == 0:
            raise ValueError(f"matrix must be square with at least one row, got shape {list(dense.shape)}")
        rows, columns = np.nonzero(dense)
        offsets = np.zeros(dense.shape[0] + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=dense.shape[0]), out=offsets[1:])
        return cls.from_csr(offsets, columns, dense[rows, columns])

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return int(self.columns.size)

    def row(self, worker: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Return (columns, weights) of one row, read-only views, the worker's own weight included.

        Raises:
            IndexError: if worker is not in [0, n).
        """
        if not 0 <= worker < self.num_workers:
            raise IndexError(f"worker must be in [0, {self.num_workers}), got {worker}")
        part = slice(self.row_offsets[worker], self.row_offsets[worker + 1])
        return self.columns[part], self.weights[part]

    def rows(self) -> NDArray[np.int64]:
        """Return the row index of every stored entry, [nnz]."""
        return np.repeat(np.arange(self.num_workers), np.diff(self.row_offsets))

    def entries(self) -> Iterator[tuple[int, int, float]]:
        """Yield (row, column, weight) of every stored entry, row by row."""
        return zip(self.rows().tolist(), self.columns.tolist(), self.weights.tolist(), strict=True)

    def diagonal(self) -> NDArray[np.float64]:
        """Return each worker's own weight, [n]."""
        own = np.zeros(self.num_workers)
        rows = self.rows()
        own[rows[rows == self.columns]] = self.weights[rows == self.columns]
        return own

    def to_matrix(self) -> NDArray[np.float64]:
        """Return the dense matrix, [n, n] float64, newly allocated."""
        dense = np.zeros((self.num_workers, self.num_workers))
        dense[self.rows(), self.columns] = self.weights
        return dense

    def tensors(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (row_offsets, columns, weights) as tensors; the same tensors on every call, so don't write to them.

        Args:
            device: where the kernels run.
            dtype: of the weights, torch.float32 (default) or torch.float64. Each weight is rounded once, to nearest.
        Raises:
            ValueError: if dtype is another one; kernels compute in float32 or float64.
        """
        import torch

        dtype = torch.float32 if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        place = torch.device(device)
        if place.type == "cuda" and place.index is None:
            # "cuda" means another device after torch.cuda.set_device: cache under what it means now.
            place = torch.device("cuda", torch.cuda.current_device())
        key = (place, dtype)
        if key not in self._tensors:
            self._tensors[key] = (
                torch.tensor(self.row_offsets, device=place),
                torch.tensor(self.columns, device=place),
                torch.tensor(self.weights, device=place, dtype=dtype),
            )
        return self._tensors[key]

    def relaxed(self, gamma: float) -> Mixing:
        """Return (1 - gamma) I + gamma W, the same object on every call with one gamma; gamma 1 is W itself."""
        if gamma == 1.0:
            return self
        if gamma not in self._relaxed:
            matrix = gamma * self.to_matrix()
            matrix[np.diag_indices(self.num_workers)] += 1.0 - gamma
            self._relaxed[gamma] = Mixing.from_matrix(matrix)
        return self._relaxed[gamma]

    def without(self, lost: Collection[int]) -> Mixing:
        """Return W without some workers, the same object on every call with the same of them; with none it is W itself.

        What a worker received from a lost one it gives to itself: w_ii + sum of w_ij over the lost j, in ascending
        order. A lost worker is alone, w_jj = 1. A symmetric, doubly stochastic W stays so, also among those left.

        Example:
            >>> Mixing.from_matrix([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]).without([1]).to_matrix()
            array([[0.75, 0.  , 0.25],
                   [0.  , 1.  , 0.  ],
                   [0.25, 0.  , 0.75]])
        """
        if not lost:
            return self
        gone = tuple(sorted(set(lost)))
        if gone not in self._without:
            matrix = self.to_matrix()
            for j in gone:
                matrix[np.diag_indices(self.num_workers)] += matrix[:, j]
                matrix[j, :] = matrix[:, j] = 0.0
                matrix[j, j] = 1.0
            self._without[gone] = Mixing.from_matrix(matrix)
        return self._without[gone]

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return W times one number of each worker, [n]; neighbours in ascending order, on every machine alike."""
        out = np.empty(self.num_workers)
        for i in range(self.num_workers):
            columns, weights = self.row(i)
            total = 0.0
            for j, weight in zip(columns.tolist(), weights.tolist(), strict=True):
                total += weight * float(values[j])
            out[i] = total
        return out

    def row_sums(self) -> NDArray[np.float64]:
        """Return the sum of each row, [n]."""
        return np.bincount(self.rows(), weights=self.weights, minlength=self.num_workers).astype(np.float64)

    @cached_property
    def num_links(self) -> int:
        """How many messages one round of gossip takes: entries off the diagonal."""
        return int(np.count_nonzero(self.rows() != self.columns))

    def content(self) -> tuple[bytes, ...]:
        """Return what two equal matrices have in common: offsets, columns and weights as bytes."""
        return (self.row_offsets.tobytes(), self.columns.tobytes(), self.weights.tobytes())

    def __eq__(self, other: object) -> bool:
        return self.content() == other.content() if isinstance(other, Mixing) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.content())

    def __reduce__(self) -> tuple[Any, ...]:
        # Tensors are left out: a pickle must load on a machine without that device.
        return (Mixing, (self.form, self.num_workers, self.row_offsets, self.columns, self.weights))
