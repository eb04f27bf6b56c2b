"""Batches: what every worker trains on at step t, as a pure function of (seed, t).

Holds :class:`WorkerBatches`. It has no state that a checkpoint would have to keep: a resumed run asks for step t and
gets the samples an uninterrupted run gets, and the random changes of an augmentation. It does not hold the data
(``datasets.py``), the split (``partition.py``) or the augmentations (``augment.py``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .augment import Augmentation
from .image_files import ImageFiles
from .partition import Partition, _integer

# Index rows of this many steps are made together where epochs are short, so that numpy's cost per call is spread.
_STEPS_AT_ONCE = 64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Told apart from the numbers that shuffle: those start at the seed plus one golden number, not two.
_AUGMENTATION = np.uint64(0x3C6EF372FE94F82A)


class WorkerBatches:
    """One batch per worker and step, stacked; every worker walks its own samples, reshuffled each epoch.

    The order of worker i in an epoch is a permutation drawn with (seed, i, epoch), so it does not depend on the number
    of workers, on earlier steps or on the versions of numpy and torch. An epoch is ``steps_per_epoch`` = size //
    batch_size steps; the samples that fill no batch are left out in this epoch (others in the next). Where workers
    hold different numbers of samples, the smallest sets the length of the epoch for all.

    Args:
        dataset_x: samples [N, ...], any dtype and device.
        dataset_y: labels [N], on the same device.
        partition: which samples each worker holds.
        batch_size: samples per worker and step, B >= 1.
        seed: integer in [0, 2**63).
        augment: how samples are changed; None: not at all. Its random numbers are drawn with (seed, step, worker,
            position in the batch).
    Raises: TypeError or ValueError for arguments out of range, tensors that don't match, a partition made for another
        data set, or a batch larger than a worker's number of samples.
    Example:
        >>> x, y = torch.arange(8.0).reshape(8, 1), torch.arange(8)
        >>> split = Partition([np.arange(4), np.arange(4, 8)])
        >>> batches = WorkerBatches(x, y, split, batch_size=2, seed=0)
        >>> batches.steps_per_epoch
        2
        >>> batch_x, batch_y = batches.at(17)
        >>> batch_x.shape, batch_y.shape
        (torch.Size([2, 2, 1]), torch.Size([2, 2]))
    """

    def __init__(
        self,
        dataset_x: Tensor | ImageFiles,
        dataset_y: Tensor,
        partition: Partition,
        batch_size: int,
        seed: int,
        augment: Augmentation | None = None,
    ) -> None:
        for name, tensor in (("dataset_x", dataset_x), ("dataset_y", dataset_y)):
            if not isinstance(tensor, Tensor) and (name == "dataset_y" or not isinstance(tensor, ImageFiles)):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not isinstance(partition, Partition):
            raise TypeError(f"partition must be a Partition, got {type(partition).__name__}")
        if dataset_x.dim() < 1 or dataset_y.dim() != 1 or len(dataset_x) != len(dataset_y):
            raise ValueError(
                f"dataset_y must be [N] for dataset_x [N, ...], got {list(dataset_y.shape)} and {list(dataset_x.shape)}"
            )
        if dataset_x.device != dataset_y.device:
            raise ValueError(f"dataset_x is on {dataset_x.device}, dataset_y on {dataset_y.device}; they must match")
        partition.check_covers(len(dataset_x))
        self.batch_size = _integer("batch_size", batch_size, 1)
        self.seed = _integer("seed", seed, 0, 2**63)
        self.num_workers = partition.num_workers
        smallest = min(partition.sizes)
        if smallest < self.batch_size:
            worker = partition.sizes.index(smallest)
            raise ValueError(
                f"batch_size={self.batch_size} is larger than the {smallest} samples of worker {worker}; "
                "use a smaller batch, fewer workers or more data"
            )
        self.steps_per_epoch = smallest // self.batch_size
        self._x = dataset_x
        self._y = dataset_y
        self._augment = augment
        # Workers with equally many samples are shuffled together: their numbers, and their samples [workers, size].
        self._groups: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = []
        for size in sorted(set(partition.sizes)):
            members = [worker for worker, own in enumerate(partition.sizes) if own == size]
            samples = np.stack([partition.indices[worker] for worker in members])
            self._groups.append((np.array(members, dtype=np.uint64), samples))
        self._epochs_at_once = max(1, _STEPS_AT_ONCE // self.steps_per_epoch)
        # A cache, not state: the index rows of the group of epochs asked for last, [epochs * steps, n * B].
        self._group = -1
        self._rows = torch.empty(0, 0, dtype=torch.int64)

    def at(self, step: int, worker: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the batches of step t >= 0, counted from the start of training: x [n, B, ...] and y [n, B], new
        tensors; or those of one worker, x [B, ...] and y [B], the same bits."""
        rows = self._index_row(step).view(self.num_workers, self.batch_size)
        workers = np.arange(self.num_workers, dtype=np.uint64)
        if worker is not None:
            worker = _integer("worker", worker, 0, self.num_workers)
            rows, workers = rows[worker], workers[worker : worker + 1]
        flat = rows.reshape(-1)
        if self._augment is None:
            x = self._x.index_select(0, flat)
        else:
            x = self._augment(self._x, flat, self._uniforms(step, workers, self._augment.draws))
        return x.view(*rows.shape, *x.shape[1:]), self._y.index_select(0, flat).view(rows.shape)

    def indices(self, step: int) -> Tensor:
        """Return which samples step t uses: int64 [n, B], positions in the data set, on its device."""
        return self._index_row(step).view(self.num_workers, self.batch_size).clone()

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that step t belongs to."""
        return _integer("step", step, 0) // self.steps_per_epoch

    def _uniforms(self, step: int, workers: npt.NDArray[np.uint64], draws: int) -> npt.NDArray[np.float64]:
        """Numbers in [0, 1), ``draws`` for each sample of these workers, [workers * B, draws]."""
        start = _mix(np.array([self.seed], dtype=np.uint64) + _AUGMENTATION)
        start = _mix(_mix(start ^ np.uint64(step)) ^ workers)[:, np.newaxis]
        start = _mix(start ^ np.arange(self.batch_size, dtype=np.uint64)).reshape(-1, 1)
        counters = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN
        return (_mix(start + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _index_row(self, step: int) -> Tensor:
        step = _integer("step", step, 0)
        steps_per_group = self._epochs_at_once * self.steps_per_epoch
        group, offset = divmod(step, steps_per_group)
        if group != self._group:
            first = group * self._epochs_at_once
            rows = self._make_rows(np.arange(first, first + self._epochs_at_once, dtype=np.uint64))
            self._rows = torch.from_numpy(rows).to(self._x.device)
            self._group = group
        return self._rows[offset]

    def _make_rows(self, epochs: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Index rows of these epochs, [epochs * steps_per_epoch, n * B]."""
        used = self.steps_per_epoch * self.batch_size
        rows = np.empty((len(epochs), self.steps_per_epoch, self.num_workers, self.batch_size), dtype=np.int64)
        for workers, samples in self._groups:
            order = _permutations(samples.shape[1], self.seed, workers, epochs)[:, :, :used]
            chosen = np.take_along_axis(samples[np.newaxis], order, axis=2)  # [epochs, workers, used]
            chosen = chosen.reshape(len(epochs), len(workers), self.steps_per_epoch, self.batch_size)
            rows[:, :, workers.astype(np.int64)] = chosen.swapaxes(1, 2)
        return rows.reshape(len(epochs) * self.steps_per_epoch, -1)


def _permutations(
    size: int, seed: int, workers: npt.NDArray[np.uint64], epochs: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Permutations of range(size) drawn with (seed, worker, epoch): the order of that many SplitMix64 outputs.

    SplitMix64 maps distinct counters to distinct 64-bit keys, so there are no ties and every sort gives the same order.
    Making a numpy or torch generator for every worker and epoch instead would cost more than the batches themselves.

    Returns: int64 [epochs, workers, size].
    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014).
    """
    start = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN)
    start = _mix(_mix(start ^ workers)[np.newaxis, :] ^ epochs[:, np.newaxis])
    counters = np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN
    return np.argsort(_mix(start[:, :, np.newaxis] + counters), axis=2).astype(np.int64, copy=False)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function, element by element; arithmetic modulo 2**64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
