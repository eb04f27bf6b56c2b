"""What a step is made of before its gradients are known: the passes of algorithms that don't look at vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from qgm_ext.algorithms.base import Algorithm, Pass, RelayPass, Step

__all__ = ["plan_ahead"]


def plan_ahead(algorithm: Algorithm, step: Step) -> tuple[Pass | RelayPass, ...] | None:
    """All passes of a step without running them.

    Args:
        algorithm: whose passes.
        step: of its vectors only shapes and dtypes are used. Its ``scalars`` are replaced as the step replaces them.

    Returns:
        None if the algorithm looks at parameters, gradients or state before its last pass.
    """
    state = {name: _unread(vector) for name, vector in step.state.items()}
    try:
        return tuple(algorithm.passes(replace(step, x=_unread(step.x), g=_unread(step.g), state=state)))
    except (_ReadError, TypeError):  # the latter from an operator on what is no tensor
        return None


class _ReadError(Exception):
    """An algorithm asked for values that are not known yet."""


class _Unread:
    """Stands for a tensor while a step is planned: its shape is known, its values are not."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device("cpu")

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getattr__(self, name: str) -> Any:
        raise _ReadError(name)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _ReadError("a torch function")


def _unread(tensor: Tensor) -> Tensor:
    return cast(Tensor, _Unread(tensor))
