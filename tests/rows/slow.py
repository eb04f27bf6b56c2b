"""Slow texts of the steps that take gradients elsewhere: one worker after the other, in the authors' order.

Mix, gradients, descend, with plain autograd on copies of one module for each worker, so they share nothing with the
package but the mixing matrix. The texts of the algorithms are in the rows of their families.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qgm_ext import models

FEATURES, CLASSES, BATCH = 4, 3, 6
LR, DROPPED_LR, DROP_AT = 0.3, 0.05, 4
F64 = torch.float64


def smooth_mlp():
    """Batch statistics and features, all smooth."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)
    ).to(F64)
    return models.declare_feature_layer(model, "4")


def batches(step, n):
    rng = np.random.RandomState(1000 + step)
    centres = rng.randn(n, 1, FEATURES)
    inputs = torch.tensor(centres + rng.randn(n, BATCH, FEATURES))
    # Each worker sees two of the three classes.
    targets = torch.tensor((rng.randint(0, 2, (n, BATCH)) + np.arange(n)[:, None]) % CLASSES)
    return inputs, targets


def lr_at(step):
    return LR if step < DROP_AT else DROPPED_LR


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


class Worker:
    """One worker: a module with its own buffers, and nothing of the others."""

    def __init__(self, model):
        self.model = copy.deepcopy(model)

    def module_at(self, p, train=True):
        """A copy of the worker's module with other parameters; its buffers stay."""
        module = copy.deepcopy(self.model).train(train)
        nn.utils.vector_to_parameters(p, module.parameters())
        return module

    def gradient(self, p, batch, own=False):
        module = self.module_at(p)
        g = flat(torch.autograd.grad(F.cross_entropy(module(batch[0]), batch[1]), list(module.parameters())))
        if own:  # only here do batch statistics count
            self.model.load_state_dict({**self.model.state_dict(), **dict(module.named_buffers())})
        return g

    def sharp_gradient(self, p, batch, rho, own=False):
        g = self.gradient(p, batch, own)
        return self.gradient(p + rho * g / (g.norm() + 1e-12), batch) if rho else g


def per_tensor(model, vector, compress):
    parts = torch.split(vector, [p.numel() for p in model.parameters()])
    return torch.cat([compress(part) for part in parts])


def scaled_sign(v):
    return torch.sign(v) * v.abs().sum() / len(v)


def neighbours(w, i):
    return [j for j in range(len(w)) if j != i and w[i, j] != 0]


def mixed(p, w, gamma):
    return [p[i] + gamma * (sum(w[i, j] * p[j] for j in range(len(p))) - p[i]) for i in range(len(p))]
