"""A method, a data set and a model from outside the package; see your_own.md."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from qgm_ext import data, models
from qgm_ext.algorithms import MomentumAlgorithm, Pass, register


@register
@dataclass(frozen=True, kw_only=True)
class FadingDsgdm(MomentumAlgorithm):
    """DSGDm whose momentum fades with the steps, beta_t = beta / (1 + t / 100)."""

    name: ClassVar[str] = "fading_dsgdm"
    source: ClassVar[str] = "examples/your_own.md"

    @property
    def state_names(self):
        return ("momentum_buffer",)

    def passes(self, step):
        beta = self.momentum / (1 + step.number / 100)
        yield Pass("dsgdm", [step.lr, beta, self.weight_decay], self.state_names, step.mixing)


def rings(root):
    """Points in the plane, in four rings around the origin."""
    random = torch.Generator().manual_seed(0)
    y = torch.arange(2000) % 4
    angle = 6.2832 * torch.rand(2000, generator=random)
    radius = 1 + y + 0.2 * torch.randn(2000, generator=random)
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return data.Dataset("rings", x[:1600], y[:1600], x[1600:], y[1600:], num_classes=4)


data.register("rings", rings)
models.register("tanh", lambda shape, classes: nn.Sequential(nn.Linear(*shape, 32), nn.Tanh(), nn.Linear(32, classes)))
