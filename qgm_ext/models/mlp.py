"""Multi-layer perceptron: flatten, then linear layers with ReLU between. No normalisation, no dropout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn

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
