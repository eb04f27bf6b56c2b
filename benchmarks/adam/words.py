"""Perceptrons on the mean of word vectors of dimension 256, which start equal and are either fixed or trained.

With fixed vectors no gradient is sparse; of trained ones most rows are zero in a step. The plugin of fixed.toml and
trained.toml, which ask whether that is why QG-DAdam loses to D-Adam on texts.
"""

import torch
from torch import nn
from torch.nn import functional

from qgm_ext import models
from qgm_ext.models.features import declare_feature_layer


class Words(nn.Module):
    """The sum of the vectors of a text's tokens, [B, L], over the root of their number: [B, dim]."""

    def __init__(self, vocabulary, dim, trained):
        super().__init__()
        vectors = torch.randn(vocabulary, dim, generator=torch.Generator().manual_seed(1))
        if trained:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)

    def forward(self, tokens):
        there = (tokens != 0).unsqueeze(-1)
        return (functional.embedding(tokens, self.vectors) * there).sum(1) / there.sum(1).clamp(min=1).sqrt()


def build(trained, num_classes, vocabulary, dim=256, hidden=64):
    layers = (Words(vocabulary, dim, trained), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    return declare_feature_layer(nn.Sequential(*layers), "2")


models.register("words_fixed", lambda _, classes, vocabulary=4096: build(False, classes, vocabulary), texts=True)
models.register("words_trained", lambda _, classes, vocabulary=4096: build(True, classes, vocabulary), texts=True)
