"""Models by name: small ones, sixteen of which train on a laptop, and the paper's for CIFAR-10; ``nn.Sequential`` all.

Those without batch norm hold no buffers and change nothing in place, so ``torch.func.functional_call`` and ``vmap``
work on them. Larger ones come from torchvision or transformers: the simulator takes any module. Each says which layer's
output are its features, the input of the classifier.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .cnn import cnn
from .features import declare_feature_layer, feature_layer
from .mlp import mlp
from .norms import EvoNormS0
from .resnet import resnet20
from .vgg import vgg11

__all__ = [
    "EvoNormS0",
    "cnn",
    "declare_feature_layer",
    "feature_layer",
    "get",
    "mlp",
    "names",
    "resnet20",
    "vgg11",
]

_MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "cnn": cnn,
    "mlp": mlp,
    "resnet20_bn": functools.partial(resnet20, norm="batch"),
    "resnet20_evonorm": functools.partial(resnet20, norm="evonorm"),
    "resnet20_gn": resnet20,
    "vgg11": vgg11,
}


def names() -> list[str]:
    """Return the names that :func:`get` knows.

    Example:
        >>> names()
        ['cnn', 'mlp', 'resnet20_bn', 'resnet20_evonorm', 'resnet20_gn', 'vgg11']
    """
    return sorted(_MODELS)


def get(name: str, input_shape: Sequence[int], num_classes: int, **options: Any) -> nn.Sequential:
    """Build the model called ``name``.

    Args:
        name: one of :func:`names`.
        input_shape: shape of one sample, for images (channels, height, width).
        num_classes: number of logits.
        **options: further arguments of :func:`mlp`, :func:`cnn`, :func:`resnet20` or :func:`vgg11`.
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
