"""ResNet-20 for small images, as in the quasi-global momentum paper, and torchvision's ResNet-18 for large ones.

Both with a choice of normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ._checks import check_sizes
from .features import declare_feature_layer
from .norms import make_norm

__all__ = ["BasicBlock", "resnet18", "resnet20"]


class BasicBlock(nn.Module):
    """Two convolutions 3x3 with a shortcut, [B, C, H, W] to [B, D, H / stride, W / stride].

    Where the shape changes the shortcut is a convolution 1x1 with normalisation. EvoNorm activates before the sum (that
    the paper's code places it so is not verified), the other norms after it.
    """

    def __init__(self, channels: int, out: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = make_norm(norm, out, groups)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = make_norm(norm, out, groups, activate=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), make_norm(norm, out, groups, activate=False)
            )
        self.activation: nn.Module = nn.Identity() if norm == "evonorm" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        out: Tensor = self.activation(inner + self.shortcut(x))
        return out


def resnet20(
    input_shape: Sequence[int],
    num_classes: int,
    norm: str = "group",
    channels: Sequence[int] = (16, 32, 64),
    groups: int = 2,
) -> nn.Sequential:
    """Build a ResNet-20, input [B, C, H, W], output logits [B, num_classes].

    A convolution, three stages of three blocks, mean over the image, one linear layer. Convolutions start from
    N(0, 2 / (k k out)), the rest from torch's defaults, so ``torch.manual_seed`` before the call fixes the weights.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        norm: "group", "batch" or "evonorm".
        channels: of the three stages; the second and third halve height and width.
        groups: of "group".
    Raises: TypeError or ValueError if a size or the norm does not fit.
    Example:
        >>> sum(p.numel() for p in resnet20((3, 32, 32), 10).parameters())
        272474

    Source: He et al. 2016; epfml/quasi-global-momentum (initialisation, shortcuts).
    """
    check_sizes(input_shape=input_shape, num_classes=num_classes, channels=channels, groups=groups)
    if len(input_shape) != 3:
        raise ValueError(f"input_shape must be (channels, height, width), got {tuple(input_shape)}")
    if len(channels) != 3:
        raise ValueError(f"channels must be of three stages, got {tuple(channels)}")
    layers: list[nn.Module] = [
        nn.Conv2d(input_shape[0], channels[0], 3, 1, 1, bias=False),
        make_norm(norm, channels[0], groups),
    ]
    previous = channels[0]
    for stage, out in enumerate(channels):
        for block in range(3):
            layers.append(BasicBlock(previous, out, 2 if stage > 0 and block == 0 else 1, norm, groups))
            previous = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(previous, num_classes)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
    return declare_feature_layer(model, str(len(layers) - 2))


def resnet18(input_shape: Sequence[int], num_classes: int, norm: str = "batch", groups: int = 2) -> nn.Module:
    """Build torchvision's ResNet-18, input [B, 3, H, W], output logits [B, num_classes].

    With EvoNorm every normalisation and its ReLU become one EvoNorm-S0, and the ReLUs after sums go, as in
    :class:`BasicBlock`.

    Args:
        input_shape: (3, height, width) of one image, 32 x 32 or larger; made for 224 x 224.
        num_classes: number of logits.
        norm: "group", "batch" or "evonorm".
        groups: of "group".
    Raises: TypeError or ValueError if a size or the norm does not fit; ImportError without torchvision.

    Source: He et al. 2016; torchvision.models.resnet18, without its weights.
    """
    check_sizes(input_shape=input_shape, num_classes=num_classes, groups=groups)
    if len(input_shape) != 3 or input_shape[0] != 3 or min(input_shape[1:]) < 32:
        raise ValueError(f"input_shape must be (3, height, width) with 32x32 or more, got {tuple(input_shape)}")
    try:
        from torchvision.models import resnet18 as torchvision_resnet18
    except ImportError as error:
        raise ImportError("resnet18 comes with torchvision: pip install 'qgm_ext[vision]'") from error
    model: nn.Module = torchvision_resnet18(
        num_classes=num_classes, norm_layer=partial(make_norm, norm, groups=groups, activate=False)
    )
    if norm == "evonorm":
        for module in list(model.modules()):
            if hasattr(module, "relu"):
                module.relu = nn.Identity()
    return declare_feature_layer(model, "avgpool")
