"""Accuracy and loss of the workers' models and of the average model on a classification set.

Holds :class:`Evaluation`, the numbers, and :func:`accuracy_and_loss`, one model's part. Which models are evaluated is
said by :meth:`qgm_ext.simulator.Simulator.evaluate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["Evaluation", "Samples", "accuracies_and_losses", "accuracy_and_loss", "evaluation_mode"]


@runtime_checkable
class Samples(Protocol):
    """Samples [N, ...] that come out slice by slice: a tensor, or images that are decoded when they are needed."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def device(self) -> torch.device: ...
    def dim(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Evaluation:
    """What the models reach on one data set.

    Args:
        accuracy_local: of each worker's model, in [0, 1], n numbers.
        loss_local: mean loss of each worker's model, n numbers.
        accuracy_average: of the model with averaged parameters.
        loss_average: of the model with averaged parameters.
        consensus_distance: sqrt((1/n) sum_i ||x_i - mean||^2) at the time of evaluation.
        num_samples: size of the data set.

    Example:
        >>> Evaluation((0.5, 1.0), (2.0, 1.0), 0.75, 1.5, 0.1, 4).accuracy_local_mean
        0.75
    """

    accuracy_local: tuple[float, ...]
    loss_local: tuple[float, ...]
    accuracy_average: float
    loss_average: float
    consensus_distance: float
    num_samples: int

    @property
    def accuracy_local_mean(self) -> float:
        """Mean accuracy over the workers."""
        return sum(self.accuracy_local) / len(self.accuracy_local)

    @property
    def accuracy_local_min(self) -> float:
        """Accuracy of the worst worker."""
        return min(self.accuracy_local)

    @property
    def accuracy_local_max(self) -> float:
        """Accuracy of the best worker."""
        return max(self.accuracy_local)

    @property
    def loss_local_mean(self) -> float:
        """Mean loss over the workers."""
        return sum(self.loss_local) / len(self.loss_local)


def accuracy_and_loss(
    model: nn.Module, x: Samples, y: Tensor, batch_size: int, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """Accuracy and mean loss of one model, in the mode it is in, without gradients.

    Args:
        model: maps x [B, ...] to class scores [B, C, ...].
        x: samples, [N, ...], N >= 1.
        y: class numbers, [N, ...], shaped like the scores without their dimension C.
        batch_size: samples at a time; the result depends on it in rounding only.
        loss_fn: mean loss of (scores, classes), a scalar.

    Raises:
        ValueError: if the model's output is not class scores for y.
    """
    correct = torch.zeros((), dtype=torch.int64, device=y.device)
    total = torch.zeros((), dtype=torch.float64, device=y.device)
    with torch.no_grad():
        for start in range(0, len(x), batch_size):
            inputs, targets = x[start : start + batch_size], y[start : start + batch_size]
            scores = model(_channels_last(inputs))
            if scores.dim() < 2 or scores[:, 0].shape != targets.shape:
                raise ValueError(
                    "evaluate needs a model that gives class scores [B, C, ...] for classes [B, ...], got "
                    f"{list(scores.shape)} for {list(targets.shape)}"
                )
            correct += (scores.argmax(1) == targets).sum()
            total += loss_fn(scores, targets).double() * len(inputs)
    return correct.item() / y.numel(), total.item() / len(x)


def accuracies_and_losses(
    models: Sequence[nn.Module], x: Samples, y: Tensor, batch_size: int, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> list[tuple[float, float]]:
    """:func:`accuracy_and_loss` of each of the models, copies of one module.

    Those that equal the first in all parameters and buffers, as all do at the start, take its result.
    """
    first, *others = models
    result = accuracy_and_loss(first, x, y, batch_size, loss_fn)
    return [result] + [
        result if _equal(model, first) else accuracy_and_loss(model, x, y, batch_size, loss_fn) for model in others
    ]


def _equal(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(
        itertools.chain(model.parameters(), model.buffers()),
        itertools.chain(other.parameters(), other.buffers()),
        strict=True,
    )
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def _channels_last(inputs: Tensor) -> Tensor:
    """Images [B, C, H, W] with the channels last in memory, on CPUs; anything else as it is.

    Convolution and pooling without gradients take about half the time so (benchmarks/bench_simulator.py).
    """
    if inputs.dim() != 4 or inputs.device.type != "cpu":
        return inputs
    # Not Tensor.contiguous: with one channel it takes both orders for the same and leaves the strides.
    return torch.empty_like(inputs, memory_format=torch.channels_last).copy_(inputs)


@contextmanager
def evaluation_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """All modules in evaluation mode inside the block; afterwards each in the mode it was in."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training
