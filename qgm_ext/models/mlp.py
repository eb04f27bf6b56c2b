"""Multi-layer perceptrons, of flattened images and of the mean of word vectors. No normalisation, no dropout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from ._checks import check_sizes
from .features import declare_feature_layer


def mlp(input_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (128, 64)) -> nn.Sequential:
    """Build a multi-layer perceptron, input [B, *input_shape], output logits [B, num_classes].

    Initialised by torch's defaults, so ``torch.manual_seed`` before the call fixes the weights.

    Args:
        input_shape: shape of one sample, any number of dimensions.
        num_classes: number of logits.
        hidden: widths of the hidden layers; empty for a linear classifier.
    Raises: TypeError or ValueError if a size is not an integer >= 1.
    Example:
        >>> sum(p.numel() for p in mlp((1, 28, 28), 10).parameters())
        109386
    """
    check_sizes(input_shape=input_shape, num_classes=num_classes, hidden=hidden)
    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    layers.append(nn.Linear(widths[-1], num_classes))
    return declare_feature_layer(nn.Sequential(*layers), str(len(layers) - 2))


class MeanEmbedding(nn.Module):
    """The mean of the vectors of a text's tokens: [B, L], 0 where a text has ended, to [B, dim].

    Args:
        vocabulary: number of tokens. dim: size of a vector.
    """

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Average."""
        there = (tokens != 0).unsqueeze(-1)
        mean: Tensor = (self.embedding(tokens) * there).sum(1) / there.sum(1).clamp(min=1)
        return mean


def text_mlp(
    input_shape: Sequence[int], num_classes: int, vocabulary: int = 4096, dim: int = 32, hidden: Sequence[int] = (64,)
) -> nn.Sequential:
    """Build a perceptron on the mean of word vectors, input token numbers [B, L], output logits [B, num_classes].

    Args:
        input_shape: (L,), tokens of a text.
        num_classes: number of logits.
        vocabulary: number of tokens.
        dim: size of a word vector.
        hidden: widths of the hidden layers.
    Raises: TypeError or ValueError if a size is not an integer >= 1.
    Example:
        >>> sum(p.numel() for p in text_mlp((48,), 13).parameters())
        134029
    """
    check_sizes(input_shape=input_shape, num_classes=num_classes, vocabulary=vocabulary, dim=dim, hidden=hidden)
    if len(input_shape) != 1:
        raise ValueError(f"input_shape must be (tokens of a text,), got {tuple(input_shape)}")
    layers: list[nn.Module] = [MeanEmbedding(vocabulary, dim)]
    widths = [dim, *hidden]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    layers.append(nn.Linear(widths[-1], num_classes))
    return declare_feature_layer(nn.Sequential(*layers), str(len(layers) - 2))
