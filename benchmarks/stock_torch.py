"""QG-DSGDm-N as fast as stock PyTorch operators allow: everything in place or into buffers made once, torch.mm."""

from __future__ import annotations

import torch
from torch import Tensor


class StockQgDsgdmN:
    """x, g and m_hat are [n, D]; two work buffers of the same size are kept between steps."""

    def __init__(
        self, x: Tensor, w: Tensor, lr: float, momentum: float, qg_momentum: float, weight_decay: float
    ) -> None:
        self.x, self.w, self.m_hat = x, w, torch.zeros_like(x)
        self.lr, self.momentum, self.qg_momentum, self.weight_decay = lr, momentum, qg_momentum, weight_decay
        self.u, self.m = torch.empty_like(x), torch.empty_like(x)

    @torch.no_grad()
    def step(self, g: Tensor) -> None:
        torch.add(g, self.x, alpha=self.weight_decay, out=self.u)
        torch.add(self.u, self.m_hat, alpha=self.momentum, out=self.m)
        self.u.add_(self.m, alpha=self.momentum)
        torch.add(self.x, self.u, alpha=-self.lr, out=self.m)
        torch.mm(self.w, self.m, out=self.u)
        self.x.sub_(self.u)
        self.m_hat.lerp_(self.x.div_(self.lr), 1 - self.qg_momentum)
        self.x.copy_(self.u)
