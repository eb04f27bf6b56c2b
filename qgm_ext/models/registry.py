"""Which models there are, by name, and what a training run must know of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qgm_ext.hints import did_you_mean

__all__ = ["default_engine", "draws", "get", "names", "register", "takes", "takes_texts"]


@dataclass(frozen=True)
class _Model:
    build: Callable[..., nn.Module]
    texts: bool
    draws: bool
    batched: bool


_MODELS: dict[str, _Model] = {}


def register(
    name: str, build: Callable[..., nn.Module], *, texts: bool = False, draws: bool = False, batched: bool = True
) -> None:
    """Make a model known to :func:`get`, and so to ``qgm train`` and ``qgm compare``.

    Args:
        name: what it is called.
        build: called as ``build(input_shape, num_classes)``, for texts with ``vocabulary=`` and, where a run has one,
            ``pretrained=``; returns a module, [B, *input_shape] to logits [B, num_classes].
        texts: its input are token numbers, not images.
        draws: it draws random numbers in training (dropout), which the engine "threads" refuses.
        batched: ``torch.func.vmap`` can run it.

    Raises:
        ValueError: if the name is in use.
    """
    if name in _MODELS:
        raise ValueError(f"there is a model {name!r} already")
    _MODELS[name] = _Model(build, texts, draws, batched)


def names() -> list[str]:
    """Return the names that :func:`get` knows, sorted.

    Example:
        >>> "resnet20_evonorm" in names()
        True
    """
    return sorted(_MODELS)


def get(name: str, input_shape: Sequence[int], num_classes: int, **options: Any) -> nn.Module:
    """Build the model called ``name``.

    Args:
        name: one of :func:`names`.
        input_shape: shape of one sample: of images (channels, height, width), of texts (length,).
        num_classes: number of logits.
        **options: further arguments of :func:`mlp`, :func:`cnn`, ...; of those for texts ``vocabulary``.
    Raises: ValueError for an unknown name; TypeError for an option that the model does not have.
    Example:
        >>> get("mlp", (1, 8, 8), 10, hidden=(32,))[1]
        Linear(in_features=64, out_features=32, bias=True)
    """
    return _known(name).build(input_shape, num_classes, **options)


def takes_texts(name: str) -> bool:
    """Whether the input of a model are token numbers."""
    return _known(name).texts


def takes(name: str, option: str) -> bool:
    """Whether a model has an option, "pretrained" or "vocabulary".

    Example:
        >>> takes("distilbert", "pretrained"), takes("mlp", "pretrained")
        (True, False)
    """
    parameters = inspect.signature(_known(name).build).parameters.values()
    return any(p.name == option or p.kind is p.VAR_KEYWORD for p in parameters)


def draws(name: str) -> bool:
    """Whether a model draws random numbers in training."""
    return _known(name).draws


def default_engine(name: str, device: str) -> str:
    """The gradient engine for a model on a device where nobody names one: "vmap" on CUDA, else "threads", if it can.

    Example:
        >>> default_engine("mlp", "cpu"), default_engine("vgg11", "cpu")
        ('threads', 'loop')
    """
    model = _known(name)
    if device.startswith("cuda"):
        return "vmap" if model.batched else "loop"
    return "loop" if model.draws else "threads"


def _known(name: str) -> _Model:
    if name not in _MODELS:
        hint = did_you_mean(name, names())
        raise ValueError(f"unknown model {name!r}{f'; {hint}' if hint else '.'} Known: {', '.join(names())}")
    return _MODELS[name]
