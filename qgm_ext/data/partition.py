"""Partitions: which training samples each worker holds.

Holds the Dirichlet label-skew partition of the experiments in Lin et al., "Quasi-Global Momentum" (ICML 2021), with two
plain ones to compare with (uniform, sorted by label), and :class:`Partition`, which is saved with a run. Needs numpy
only. It does not hold the data sets (``datasets.py``) nor the batches (``batches.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qgm_ext.files import write_atomically

IntArray = npt.NDArray[np.int64]

# The protocol draws proportions for at most ten workers at a time, whatever the number of workers.
_BLOCK = 10
# Tries drawn at once grow up to this many: large enough to hide Python's cost, small enough to stay in cache.
_MAX_TRIES_AT_ONCE = 1024
_FORMAT = "qgm_ext.partition/1"
_HOLD_OUT_STREAM = 1  # set beside the seed, so that what is held out is drawn from a stream of its own
# What numpy, zipfile and json raise on a file that is damaged or something else (RuntimeError: an "encrypted" archive).
_DAMAGE = (ValueError, TypeError, KeyError, OSError, EOFError, AttributeError, RuntimeError, zipfile.BadZipFile)


@dataclass(frozen=True, eq=False)
class Partition:
    """The samples of every worker, and how they were chosen.

    Args:
        indices: one int64 array per worker, positions in the training set. Empty arrays are allowed, negative positions
            are not.
        seed: the seed it was drawn with; None where nothing was drawn.
        alpha: the Dirichlet concentration; None for other methods.
        method: how it was made: ``"dirichlet"``, ``"iid"``, ``"sorted"`` or a name of your own.
    Raises: TypeError or ValueError if an array is not 1-D, not of integers, or holds a negative position.
    """

    indices: list[IntArray]
    seed: int | None = None
    alpha: float | None = None
    method: str = "custom"

    def __post_init__(self) -> None:
        if len(self.indices) == 0:
            raise ValueError("indices must hold one array per worker, got an empty list")
        checked = []
        for worker, part in enumerate(self.indices):
            array = np.asarray(part)
            if array.ndim != 1:
                raise ValueError(f"indices[{worker}] must be 1-D, got shape {list(array.shape)}")
            if array.size and array.dtype.kind not in "iu":
                raise TypeError(f"indices[{worker}] must hold integers, got dtype {array.dtype}")
            array = np.ascontiguousarray(array, dtype=np.int64)
            if array.size and array.min() < 0:
                raise ValueError(f"indices[{worker}] must not be negative, got {array.min()}")
            checked.append(array)
        object.__setattr__(self, "indices", checked)

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return len(self.indices)

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each worker."""
        return [len(part) for part in self.indices]

    def within(self, positions: Any) -> Partition:
        """Return the same split of a part of a larger training set, in positions of the larger one.

        Args:
            positions: where each sample that this partition refers to stands in the larger set, [N] integers.

        Example:
            >>> sorted_partition([1, 0], num_workers=2).within([5, 8]).indices
            [array([8]), array([5])]
        """
        where = _labels(positions)
        self.check_covers(len(where))
        return Partition([where[part] for part in self.indices], self.seed, self.alpha, self.method)

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of sizes and indices: with equal digests every worker holds the same samples."""
        sha = hashlib.sha256()
        for array in (np.array(self.sizes), *self.indices):
            sha.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return sha.hexdigest()

    def histogram(self, labels: Any, num_classes: int | None = None) -> IntArray:
        """Count the samples of each class at each worker.

        Args:
            labels: class of every training sample, 1-D integers (list, array or CPU tensor).
            num_classes: number of classes; by default the largest label plus one.
        Returns: int64 array [workers, classes].
        Raises: TypeError or ValueError if labels are not 1-D integers in [0, num_classes), or are fewer than the
            partition refers to.
        """
        array = _labels(labels)
        largest = int(array.max()) if array.size else -1
        if num_classes is None:
            num_classes = largest + 1
        if array.size and (array.min() < 0 or largest >= num_classes):
            raise ValueError(f"labels must be in [0, {num_classes}), got [{array.min()}, {largest}]")
        self.check_covers(len(array))
        return np.stack([np.bincount(array[part], minlength=num_classes) for part in self.indices]).astype(np.int64)

    def check_covers(self, num_samples: int) -> None:
        """Raise ValueError if an index lies outside a training set of ``num_samples``."""
        last = max((int(part.max()) for part in self.indices if part.size), default=-1)
        if last >= num_samples:
            raise ValueError(
                f"the partition refers to sample {last}, but there are only {num_samples} samples; "
                "it was made for another data set"
            )

    def describe(self, labels: Any, num_classes: int | None = None, max_workers: int = 64) -> str:
        """Return the class histogram as a text table, one line per worker, at most ``max_workers`` lines.

        Example:
            >>> part = sorted_partition([0, 1, 1, 0, 2, 2], num_workers=2)
            >>> print(part.describe([0, 1, 1, 0, 2, 2]))
            sorted partition: 2 workers, 3 samples each
            worker  size  class 0  1  2
                 0     3        2  1  0
                 1     3        0  1  2
        """
        counts = self.histogram(labels, num_classes)
        smallest, largest = min(self.sizes), max(self.sizes)
        size = f"{smallest} samples each" if smallest == largest else f"{smallest} to {largest} samples each"
        how = "".join(
            f", {word} {value}" for word, value in (("alpha", self.alpha), ("seed", self.seed)) if value is not None
        )
        plural = "" if self.num_workers == 1 else "s"
        lines = [f"{self.method} partition{how}: {self.num_workers} worker{plural}, {size}"]
        heads = ["worker", "size", *(f"class {c}" if c == 0 else str(c) for c in range(counts.shape[1]))]
        rows = [
            [str(worker), str(self.sizes[worker]), *map(str, counts[worker])]
            for worker in range(min(self.num_workers, max_workers))
        ]
        widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
        lines += ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in (heads, *rows)]
        if self.num_workers > max_workers:
            lines.append(f"(and {self.num_workers - max_workers} more workers)")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` (.npz), atomically: no half-written file is left.

        Raises: OSError if the folder is missing or can't be written to; a file that was at ``path`` is then unchanged.
        """
        meta = {"format": _FORMAT, "method": self.method, "seed": self.seed, "alpha": self.alpha}
        write_atomically(
            Path(path),
            lambda file: np.savez(
                file,
                meta=np.array(json.dumps(meta)),
                sizes=np.array(self.sizes, dtype=np.int64),
                indices=np.concatenate(self.indices),
            ),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Partition:
        """Read what :meth:`save` wrote.

        Raises: OSError (FileNotFoundError, ...) if the file can't be opened; ValueError if it is damaged or is
            something else.
        """
        # Opened here: numpy leaves its own handle open when the file turns out to be no archive.
        with open(path, "rb") as file:
            try:
                if not zipfile.is_zipfile(file):  # numpy would take it for a pickle, and tell how to load that
                    raise ValueError("it is no .npz file")
                with np.load(file, allow_pickle=False) as stored:
                    meta = json.loads(str(stored["meta"]))
                    sizes, flat = stored["sizes"], stored["indices"]
                if meta["format"] != _FORMAT:
                    raise ValueError(f"format is {meta['format']!r}, expected {_FORMAT!r}")
                if sizes.ndim != 1 or sizes.size == 0 or sizes.min() < 0 or flat.shape != (sizes.sum(),):
                    raise ValueError(f"sizes {sizes.tolist()} do not add up to the {flat.size} stored indices")
                return cls(np.split(flat, np.cumsum(sizes)[:-1]), meta["seed"], meta["alpha"], meta["method"])
            except _DAMAGE as error:
                raise ValueError(f"{os.fspath(path)} is not a readable partition: {error}") from error


def dirichlet_partition(
    labels: Any, num_workers: int, alpha: float, seed: int, *, max_tries: int = 200_000
) -> Partition:
    """Split samples over workers with Dirichlet(alpha) label skew, exactly as in the experiments of the paper.

    The smaller alpha, the fewer classes a worker sees. The samples are shuffled and cut into blocks of ten workers.
    Within a block of k workers and S samples every class is split in proportions p ~ Dirichlet(alpha, ..., alpha),
    where a worker that already holds S/k samples gets none; this is repeated until every worker holds at least
    int(0.5 S/k). All workers' samples are then put in one row and cut into n equal pieces of int(N/n); so all workers
    hold the same number, pieces do not coincide with the Dirichlet bins, and fewer than n samples are left out.

    Args:
        labels: class of every sample, [N] integers (list, array or CPU tensor). The classes are the distinct labels.
        num_workers: number of workers n >= 1.
        alpha: concentration, > 0. Below 1 most of a class is at few workers; 10 is nearly uniform.
        seed: seed of ``numpy.random.RandomState``, whose stream numpy keeps fixed: equal seeds give equal partitions.
        max_tries: give up after so many tries for one block. With few classes and a small alpha a success can be rare
            (4 classes, alpha 0.1: 1 in 5,000) or impossible.
    Returns: a :class:`Partition` of n arrays of int(N/n) indices.
    Raises: TypeError or ValueError for labels that are not 1-D integers, too few samples, alpha not above 0, a bad
        seed or number of workers; ValueError after ``max_tries``.
    Example:
        >>> part = dirichlet_partition([0, 1] * 50, num_workers=4, alpha=1.0, seed=6)
        >>> part.num_workers, part.sizes
        (4, [25, 25, 25, 25])

    Source: Lin et al., "Quasi-Global Momentum" (ICML 2021), and the authors' code (epfml/quasi-global-momentum),
        ``build_non_iid_by_dirichlet``, described in words and written anew here.
    """
    array = _labels(labels)
    num_workers = _integer("num_workers", num_workers, 1)
    seed = _integer("seed", seed, 0, 2**32)
    max_tries = _integer("max_tries", max_tries, 1)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.integer | np.floating):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    alpha = float(alpha)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a finite number > 0, got {alpha}")
    if not _enough(len(array), num_workers):
        needed = len(array)
        while not _enough(needed, num_workers):
            needed = max(needed + 1, 2 * num_workers)
        raise ValueError(
            f"too few samples: {num_workers} workers need at least {needed} labels (two for every worker of "
            f"each block of {_BLOCK}), got {len(array)}"
        )

    random = np.random.RandomState(seed)
    order = np.arange(len(array), dtype=np.int64)
    random.shuffle(order)  # the same exchanges as shuffling rows (index, label), at a fraction of the cost
    classes = np.unique(array)
    pieces: list[IntArray] = []
    start = 0
    for size, workers in zip(_block_sizes(len(array), num_workers), _block_workers(num_workers), strict=True):
        block = order[start : start + size]
        start += size
        members = [block[array[block] == label] for label in classes]
        cuts = _draw_cuts(random, alpha, workers, np.array([len(m) for m in members]), max_tries)
        split = [np.split(m, c) for m, c in zip(members, cuts, strict=True)]
        pieces += [part[worker] for worker in range(workers) for part in split]
    row = np.concatenate(pieces)
    return Partition(_equal_cut(row, num_workers), seed=seed, alpha=alpha, method="dirichlet")


def hold_out(num_samples: int, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Choose samples for validation, before the rest is split over workers.

    Its random stream is not that of the partitions, so that the two draws with one seed are independent.

    Args:
        num_samples: size N of the training set.
        fraction: share of it to hold out, in [0, 1); round(fraction * N) samples are.
        seed: integer in [0, 2**32).
    Returns: (kept, held out): ascending positions in the training set, int64; disjoint, together all of them.
    Raises: TypeError or ValueError for arguments out of range, or where nothing would be kept or, with a fraction > 0,
        held out.
    Example:
        >>> kept, held = hold_out(10, 0.2, seed=0)
        >>> len(kept), len(held)
        (8, 2)
    """
    num_samples = _integer("num_samples", num_samples, 1)
    seed = _integer("seed", seed, 0, 2**32)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"fraction must be a number, got {type(fraction).__name__}")
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    held = round(fraction * num_samples)
    if held == num_samples or (fraction > 0 and held == 0):
        raise ValueError(f"fraction={fraction:g} of {num_samples} samples are {held}; both parts need at least one")
    order = np.random.RandomState([seed, _HOLD_OUT_STREAM]).permutation(num_samples)
    return np.sort(order[held:]), np.sort(order[:held])


def iid_partition(labels: Any, num_workers: int, seed: int) -> Partition:
    """Shuffle the samples and give every worker int(N/n) of them: no heterogeneity beyond chance.

    Args, Returns and Raises as :func:`dirichlet_partition`; only the number of labels matters; N >= n suffices.

    Example:
        >>> iid_partition([0] * 9, num_workers=2, seed=0).sizes
        [4, 4]
    """
    array = _labels(labels)
    num_workers = _integer("num_workers", num_workers, 1)
    seed = _integer("seed", seed, 0, 2**32)
    _check_one_each(len(array), num_workers)
    order = np.arange(len(array), dtype=np.int64)
    np.random.RandomState(seed).shuffle(order)
    return Partition(_equal_cut(order, num_workers), seed=seed, method="iid")


def sorted_partition(labels: Any, num_workers: int) -> Partition:
    """Sort the samples by label (stable) and cut into n pieces of int(N/n): the strongest label skew. Draws nothing.

    Args, Returns and Raises as :func:`dirichlet_partition`; N >= n suffices.

    Example:
        >>> [part.tolist() for part in sorted_partition([1, 0, 1, 0], num_workers=2).indices]
        [[1, 3], [0, 2]]
    """
    array = _labels(labels)
    num_workers = _integer("num_workers", num_workers, 1)
    _check_one_each(len(array), num_workers)
    order = np.argsort(array, kind="stable").astype(np.int64)
    return Partition(_equal_cut(order, num_workers), method="sorted")


def classes_partition(labels: Any, num_workers: int, classes_per_worker: int, seed: int) -> Partition:
    """Give every worker samples of k classes only, and every class to as many workers as any other, or one more.

    The classes in a random order, again and again, are dealt out k at a time; the samples of a class are split equally
    among its workers, and every worker keeps as many as the one that has fewest.

    Args:
        classes_per_worker: k, from 1 to the number of classes; n k must be at least that number.
        labels, num_workers, seed: as in :func:`dirichlet_partition`.
    Returns, Raises: as :func:`dirichlet_partition`; ValueError if k does not fit.

    Example:
        >>> part = classes_partition([0, 1, 2, 3] * 6, num_workers=4, classes_per_worker=2, seed=0)
        >>> part.sizes, [len({i % 4 for i in own}) for own in part.indices]
        ([6, 6, 6, 6], [2, 2, 2, 2])

    Source: the split of Takezawa et al., "Momentum Tracking" (TMLR 2023), in words; theirs is fixed in files.
    """
    array = _labels(labels)
    num_workers = _integer("num_workers", num_workers, 1)
    seed = _integer("seed", seed, 0, 2**32)
    classes = np.unique(array)
    k = _integer("classes_per_worker", classes_per_worker, 1)
    if k > len(classes) or num_workers * k < len(classes):
        raise ValueError(
            f"classes_per_worker must be at most the {len(classes)} classes, and with {num_workers} workers reach all "
            f"of them; got {k}"
        )
    random = np.random.RandomState(seed)
    dealt = np.resize(random.permutation(classes), num_workers * k).reshape(num_workers, k)
    own: list[list[IntArray]] = [[] for _ in range(num_workers)]
    for label in classes:
        members = random.permutation(np.flatnonzero(array == label)).astype(np.int64)
        holders = np.flatnonzero((dealt == label).any(axis=1))
        if len(members) < len(holders):
            raise ValueError(f"too few samples: {len(holders)} workers share the {len(members)} of class {label}")
        for worker, part in zip(holders, np.array_split(members, len(holders)), strict=True):
            own[worker].append(part)
    shuffled = [random.permutation(np.concatenate(parts)) for parts in own]
    size = min(map(len, shuffled))
    return Partition([part[:size] for part in shuffled], seed=seed, method="classes")


def _draw_cuts(random: np.random.RandomState, alpha: float, workers: int, counts: IntArray, max_tries: int) -> IntArray:
    """Draw tries until one gives every worker enough, and return where it cuts each class, [classes, workers - 1].

    Tries are independent of each other's outcome and use a fixed number of draws, so many are drawn and judged at once;
    the generator is then put back to where it stands after the accepted try, as if they had been drawn one by one.
    ``counts``: samples of each class in this block, [classes].
    """
    total = int(counts.sum())
    enough = int(0.50 * total / workers)
    cap = total / workers
    concentration = np.full(workers, alpha)
    tried, at_once = 0, 1
    while tried < max_tries:
        at_once = min(at_once, max_tries - tried)
        before = random.get_state()
        drawn = random.dirichlet(concentration, size=(at_once, len(counts)))
        cuts = np.empty((at_once, len(counts), workers), dtype=np.int64)
        sizes = np.zeros((at_once, workers), dtype=np.int64)
        for c, count in enumerate(counts):
            # A tiny alpha makes numpy return NaN (every gamma variate underflows), or leaves no mass to any worker
            # below the cap. The class then falls to the last worker, which is what the authors' code comes to as well.
            with np.errstate(invalid="ignore"):
                share = drawn[:, c] * (sizes < cap)
                share = share / share.sum(axis=1, keepdims=True)
                bounds = np.cumsum(share, axis=1) * count
            cuts[:, c] = np.where(np.isfinite(bounds).all(axis=1, keepdims=True), bounds, 0.0).astype(np.int64)
            cuts[:, c, -1] = count
            sizes += np.diff(cuts[:, c], axis=1, prepend=0)
        accepted = np.flatnonzero(sizes.min(axis=1) >= enough)
        if accepted.size:
            first = int(accepted[0])
            random.set_state(before)
            random.dirichlet(concentration, size=(first + 1, len(counts)))
            return cuts[first, :, :-1]
        tried += at_once
        at_once = min(2 * at_once, _MAX_TRIES_AT_ONCE)
    raise ValueError(
        f"no Dirichlet partition found: in {max_tries} tries with alpha={alpha:g}, {len(counts)} classes and "
        f"{workers} workers there was always one worker with fewer than {enough} of {total} samples; use a larger "
        "alpha, fewer workers or another seed, or raise max_tries"
    )


def _block_workers(num_workers: int) -> list[int]:
    """Workers of each block: tens, and the rest in the last one."""
    return [min(_BLOCK, num_workers - first) for first in range(0, num_workers, _BLOCK)]


def _block_sizes(num_samples: int, num_workers: int) -> list[int]:
    """Samples of each block: int(10/n * N), in this order of operations for its rounding; the rest in the last."""
    blocks = -(-num_workers // _BLOCK)
    each = int(_BLOCK / num_workers * num_samples)
    return [each] * (blocks - 1) + [num_samples - each * (blocks - 1)]


def _enough(num_samples: int, num_workers: int) -> bool:
    """Whether every worker of every block is bound to hold one sample or more, so that the search has a goal."""
    blocks = zip(_block_sizes(num_samples, num_workers), _block_workers(num_workers), strict=True)
    return all(int(0.50 * size / workers) >= 1 for size, workers in blocks)


def _equal_cut(row: IntArray, num_workers: int) -> list[IntArray]:
    """Cut ``row`` into ``num_workers`` consecutive pieces of int(N/n); what is left over at the end is dropped."""
    each = len(row) // num_workers
    return [row[worker * each : (worker + 1) * each].copy() for worker in range(num_workers)]


def _labels(labels: Any) -> IntArray:
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError(f"labels must be 1-D, one class per sample, got shape {list(array.shape)}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got dtype {array.dtype}")
    return array.astype(np.int64)


def _check_one_each(num_samples: int, num_workers: int) -> None:
    if num_samples < num_workers:
        raise ValueError(
            f"too few samples: {num_workers} workers need at least {num_workers} labels, got {num_samples}"
        )


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got bool")
    if number < low or (high is not None and number >= high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{name} must be {bounds}, got {number}")
    return number
