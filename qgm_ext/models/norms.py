"""Normalisation of feature maps by name, EvoNorm-S0 among them.

Batch norm keeps running statistics in buffers, which workers never average; the other two keep none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qgm_ext.hints import did_you_mean

from ._checks import check_sizes

__all__ = ["NORMS", "EvoNormS0", "make_norm"]

NORMS = ("batch", "group", "evonorm")


class EvoNormS0(nn.Module):
    r"""EvoNorm-S0: normalisation and activation in one, without batch statistics.

    .. math:: y = \frac{x \, \sigma(x)}{\sqrt{\mathrm{var}_g(x) + \epsilon}} \, \gamma + \beta

    The variance is that of the values of a sample in each of min(32, C) groups of channels, unbiased, as in the code of
    the quasi-global momentum paper (its 'efficient' form: no factor in the sigmoid). Input and output: [B, C, H, W].

    The code of CCL and of GUT calls another function by this name, which is not built here: 2 groups, the biased
    variance, and x clip(x / 6 + 1/2, 0, 1) for x sigma(x). So those papers' ResNet-20 with EvoNorm is not this one.

    Args:
        channels: C, divisible by the number of groups.
        groups: at most so many groups.
        eps: epsilon > 0.

    Source: Liu et al., "Evolving Normalization-Activation Layers" (NeurIPS 2020, arXiv 2004.02967);
    epfml/quasi-global-momentum.

    Example:
        >>> EvoNormS0(16)(torch.ones(2, 16, 4, 4)).shape
        torch.Size([2, 16, 4, 4])
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        check_sizes(channels=channels, groups=groups)
        self.groups = min(groups, channels)
        if channels % self.groups:
            raise ValueError(f"channels must be divisible by the {self.groups} groups, got {channels}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate x, [B, C, H, W]."""
        batch, channels, height, width = x.shape
        grouped = x.reshape(batch, self.groups, channels // self.groups, height, width)
        variance = grouped.var(dim=(2, 3, 4), keepdim=True, unbiased=True)
        scaled = (grouped / (variance + self.eps).sqrt()).reshape(x.shape)
        return scaled * torch.sigmoid(x) * self.weight[:, None, None] + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, groups={self.groups}, eps={self.eps}"


def make_norm(name: str, channels: int, groups: int = 2, *, activate: bool = True) -> nn.Module:
    """Build a normalisation, followed by ReLU where it does not activate by itself.

    Args:
        name: one of NORMS.
        channels: of the feature maps.
        groups: of "group"; must divide channels. The paper's ResNet-20 has 2.
        activate: whether an activation follows; EvoNorm is one itself, and has one always.

    Raises:
        ValueError: if the name is not known or groups does not divide channels.
    """
    if name not in NORMS:
        hint = did_you_mean(name, NORMS, f"there are {', '.join(NORMS)}")
        raise ValueError(f"norm {name!r} is not known, {hint}")
    if name == "evonorm":
        return EvoNormS0(channels)
    if name == "group" and channels % groups:
        raise ValueError(f"groups={groups} must divide the {channels} channels")
    norm: nn.Module = nn.BatchNorm2d(channels) if name == "batch" else nn.GroupNorm(groups, channels)
    return nn.Sequential(norm, nn.ReLU()) if activate else norm
