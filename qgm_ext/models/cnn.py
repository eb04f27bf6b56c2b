"""Small convolutional networks: one with group normalisation, for images from 8x8 up, and LeNet-5.

Group rather than batch normalisation: batch statistics of heterogeneous workers disagree, and running averages are
buffers that torch.func can't map over. Not a copy of the paper's networks (ResNet-20, VGG-11).

Two things make a step on a CPU shorter, for whoever trains these networks. The maximum comes before the ReLU, which
gives the same bits, gradients included, and leaves the ReLU a quarter of the elements. And feature maps lie with the
channels last, which oneDNN's convolutions want, and in which torch's maximum is vectorised; along rows of an image it
decides element by element, and took 40% of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ._checks import check_sizes
from .features import declare_feature_layer


def cnn(
    input_shape: Sequence[int], num_classes: int, channels: Sequence[int] = (16, 32), groups: int = 4
) -> nn.Sequential:
    """Build a small CNN, input [B, C, H, W], output logits [B, num_classes].

    For each entry of ``channels``: convolution 3x3, group norm, maximum over 2x2, ReLU. Then one linear layer.
    Initialised by torch's defaults, so ``torch.manual_seed`` before the call fixes the weights.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        channels: output channels of the convolutions; each halves height and width (rounded down).
        groups: groups of each normalisation; must divide every entry of ``channels``.
    Raises: TypeError or ValueError if a size is not an integer >= 1, the image is too small for so many layers, or
        ``groups`` does not divide.
    Example:
        >>> sum(p.numel() for p in cnn((1, 28, 28), 10).parameters())
        20586
    """
    check_sizes(input_shape=input_shape, num_classes=num_classes, channels=channels, groups=groups)
    if len(input_shape) != 3:
        raise ValueError(f"input_shape must be (channels, height, width), got {tuple(input_shape)}")
    previous, height, width = input_shape
    smallest = 2 ** len(channels)
    if min(height, width) < smallest:
        raise ValueError(
            f"{len(channels)} layers that halve the image need {smallest}x{smallest} or more, got {height}x{width}"
        )
    layers: list[nn.Module] = []
    for out in channels:
        if out % groups:
            raise ValueError(f"groups={groups} must divide every entry of channels, got {tuple(channels)}")
        layers += [nn.Conv2d(previous, out, 3, padding=1), nn.GroupNorm(groups, out), nn.MaxPool2d(2), nn.ReLU()]
        previous, height, width = out, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(previous * height * width, num_classes)]
    return declare_feature_layer(_ChannelsLast(*layers), str(len(layers) - 2))


def lenet(input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    """Build LeNet-5 with ReLU and maxima, input [B, C, H, W], output logits [B, num_classes].

    Two times convolution 5x5 (6 and 16 channels), maximum over 2x2, ReLU; linear layers of 120 and 84 units. Which
    variant the Momentum Tracking paper trains could not be verified.

    Args:
        input_shape: (channels, height, width) of one image, 16 x 16 or larger.
        num_classes: number of logits.
    Raises: TypeError or ValueError if a size does not fit.
    Example:
        >>> sum(p.numel() for p in lenet((3, 32, 32), 10).parameters())
        62006

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998).
    """
    check_sizes(input_shape=input_shape, num_classes=num_classes)
    if len(input_shape) != 3 or min(input_shape[1:]) < 16:
        raise ValueError(f"input_shape must be (channels, height, width) with 16x16 or more, got {tuple(input_shape)}")
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for before, after in ((channels, 6), (6, 16)):
        layers += [nn.Conv2d(before, after, 5), nn.MaxPool2d(2), nn.ReLU()]
        height, width = (height - 4) // 2, (width - 4) // 2
    layers += [nn.Flatten(), nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
    layers.append(nn.Linear(84, num_classes))
    return declare_feature_layer(_ChannelsLast(*layers), str(len(layers) - 2))


class _ChannelsLast(nn.Sequential):
    """A Sequential that lays out its input, [B, C, H, W] on the CPU, with the channels last; what follows keeps it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            # By hand: torch.func.vmap knows no memory formats, and torch takes a single channel to lie so already.
            last = x.squeeze(1).unsqueeze(-1) if x.shape[1] == 1 else x.movedim(1, -1).contiguous()
            x = last.movedim(-1, 1)
        output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return output
