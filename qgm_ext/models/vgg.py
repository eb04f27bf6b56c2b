"""VGG-11 without normalisation, as the quasi-global momentum and RelaySum papers train it on CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ._checks import check_sizes
from .features import declare_feature_layer

__all__ = ["vgg11"]

_CONFIGURATION_A: tuple[int | None, ...] = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)


def vgg11(input_shape: Sequence[int], num_classes: int, slim: int = 1, dropout: float = 0.5) -> nn.Sequential:
    """Build a VGG-11 (configuration A), input [B, C, H, W], output logits [B, num_classes].

    Eight convolutions 3x3 with ReLU, five maxima over 2x2, then dropout and three linear layers with as many units as
    the last convolution has channels (512). No normalisation. Initialised by torch's defaults, so
    ``torch.manual_seed`` before the call fixes the weights.

    Args:
        input_shape: (channels, height, width) of one image, 32 x 32 or larger.
        num_classes: number of logits.
        slim: divides all widths; a divisor of 64.
        dropout: share of the classifier's units that is dropped in training, in [0, 1). 0 leaves dropout out, without
            which the engine "threads" refuses the model: threads would draw in no fixed order.
    Raises: TypeError or ValueError if a size does not fit.
    Example:
        >>> sum(p.numel() for p in vgg11((3, 32, 32), 10).parameters())
        9750922

    Source: Simonyan, Zisserman 2015; epfml/quasi-global-momentum.
    """
    check_sizes(input_shape=input_shape, num_classes=num_classes, slim=slim)
    if len(input_shape) != 3:
        raise ValueError(f"input_shape must be (channels, height, width), got {tuple(input_shape)}")
    if min(input_shape[1:]) < 32:
        raise ValueError(f"five layers that halve the image need 32x32 or more, got {input_shape[1]}x{input_shape[2]}")
    if 64 % slim:
        raise ValueError(f"slim must divide 64, got {slim}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
    previous, height, width = input_shape
    layers: list[nn.Module] = []
    for entry in _CONFIGURATION_A:
        if entry is None:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        else:
            layers += [nn.Conv2d(previous, entry // slim, 3, padding=1), nn.ReLU()]
            previous = entry // slim
    hidden = 512 // slim
    drop = [nn.Dropout(dropout)] if dropout else []
    layers += [nn.Flatten(), *drop, nn.Linear(previous * height * width, hidden), nn.ReLU()]
    layers += [*drop, nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)]
    return declare_feature_layer(nn.Sequential(*layers), str(len(layers) - 2))
