"""What a Simulator takes: checks of models, batches and states, which raise errors that name what does not fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qgm_ext import ops

__all__ = ["check_alike", "check_tensors", "checked_norm", "checked_pairs", "private_copy"]


def checked_pairs(
    batches: Any, n: int, device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor] | None]:
    """Batches of :meth:`qgm_ext.Simulator.step` as n pairs, and as one pair of stacked tensors if they came so."""
    if not isinstance(batches, Sequence):
        raise TypeError(
            f"batches must be a sequence of (inputs, targets) or one stacked pair, got {type(batches).__name__}"
        )
    stacked: tuple[Tensor, Tensor] | None = None
    if len(batches) == 2 and all(isinstance(part, Tensor) for part in batches):
        stacked = (batches[0], batches[1])
        for name, tensor in zip(("inputs", "targets"), stacked, strict=True):
            if tensor.dim() < 1 or len(tensor) != n:
                raise ValueError(f"stacked {name} must be [n, B, ...] with n = {n} workers, got {list(tensor.shape)}")
        pairs = list(zip(*(tensor.unbind() for tensor in stacked), strict=True))
        checked = [stacked]
    else:
        if len(batches) != n:
            raise ValueError(f"batches must hold one (inputs, targets) per worker, {n}, got {len(batches)}")
        pairs = checked = list(batches)
    for worker, pair in enumerate(checked):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            raise TypeError(
                f"the batch of worker {worker} must be a pair of tensors (inputs, targets), got "
                f"{type(pair).__name__}; step_closure takes batches of any kind"
            )
        for name, tensor in zip(("inputs", "targets"), pair, strict=True):
            if tensor.device != device or tensor.numel() == 0:
                where = name if stacked else f"{name} of worker {worker}"
                if tensor.numel() == 0:
                    raise ValueError(f"{where} are empty, shape {list(tensor.shape)}")
                raise ValueError(f"{where} are on {tensor.device}, the models on {device}")
    return pairs, stacked


def checked_norm(clip_grad_norm: float | None) -> float | None:
    """The norm to clip to, as a float."""
    if clip_grad_norm is None:
        return None
    good = isinstance(clip_grad_norm, (int, float)) and not isinstance(clip_grad_norm, bool)
    if not good or not math.isfinite(clip_grad_norm) or clip_grad_norm <= 0:
        raise ValueError(f"clip_grad_norm must be a finite number above 0, or None, got {clip_grad_norm!r}")
    return float(clip_grad_norm)


def private_copy(model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model that the Simulator can take, on a device and in a dtype."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} of the model has no shape yet; run the model once on a sample batch")
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
        ops.compute_dtype(dtype)
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def check_alike(trainable: dict[str, nn.Parameter]) -> nn.Parameter:
    """The first parameter, after checking that all have its dtype and device: they share one buffer."""
    if not any(p.numel() for p in trainable.values()):
        raise ValueError("model must have at least one trainable parameter")
    first_name, first = next(iter(trainable.items()))
    for name, parameter in trainable.items():
        if parameter.dtype != first.dtype:
            raise ValueError(
                f"trainable parameters must have one dtype, but {first_name} is {first.dtype} and {name} "
                f"{parameter.dtype}; dtype=... converts all of them"
            )
        if parameter.device != first.device:
            raise ValueError(
                f"trainable parameters must be on one device, but {first_name} is on {first.device} and {name} on "
                f"{parameter.device}; device=... moves all of them"
            )
    ops.compute_dtype(first.dtype)
    return first


def check_tensors(what: str, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Refuse tensors of a state_dict that are not like the own ones."""
    if own.keys() != given.keys():
        differing = ", ".join(sorted(own.keys() ^ given.keys()))
        raise ValueError(f"state_dict is of another model: {what}s {differing} are in one and not in the other")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape or given[name].dtype != tensor.dtype:
            raise ValueError(
                f"{what} {name} must be {list(tensor.shape)} {tensor.dtype}, "
                f"got {list(given[name].shape)} {given[name].dtype}"
            )
