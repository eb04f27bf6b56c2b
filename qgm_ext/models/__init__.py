"""Models small enough to train sixteen of them on a laptop, as plain ``nn.Sequential``.

They hold no buffers and change nothing in place, so ``torch.func.functional_call`` and ``vmap`` work on them. Larger
ones come from torchvision or transformers: the simulator takes any module. Each says which layer's output are its
features, the input of the classifier.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .cnn import cnn
from .features import declare_feature_layer, feature_layer
from .mlp import mlp

__all__ = ["cnn", "declare_feature_layer", "feature_layer", "get", "mlp", "names"]

_MODELS: dict[str, Callable[..., nn.Sequential]] = {"mlp": mlp, "cnn": cnn}


def names() -> list[str]:
    """Return the names that :func:`get` knows.

    Example:
        >>> names()
        ['cnn', 'mlp']
    """
    return sorted(_MODELS)


def get(name: str, input_shape: Sequence[int], num_classes: int, **options: Any) -> nn.Sequential:
    """Build the model called ``name``.

    Args:
        name: one of :func:`names`.
        input_shape: shape of one sample, for images (channels, height, width).
        num_classes: number of logits.
        **options: further arguments of :func:`mlp` or :func:`cnn`.
    Raises: ValueError for an unknown name; TypeError for an option that the model does not have.
    Example:
        >>> get("mlp", (1, 8, 8), 10, hidden=(32,))[1]
        Linear(in_features=64, out_features=32, bias=True)
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(str(name).lower(), names(), n=1, cutoff=0.4)
        suggestion = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown model {name!r}{suggestion} Known: {', '.join(names())}")
    return _MODELS[name](input_shape, num_classes, **options)
