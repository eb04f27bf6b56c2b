"""Values of parameter groups as plain numbers, and the state of one parameter as a state_dict holds it."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qgm_ext import ops

__all__ = ["as_number", "load_entry", "with_numbers"]


def as_number(value: Any) -> Any:
    """A number as a Python float or int: tensors of one element and numpy scalars too; anything else unchanged."""
    if isinstance(value, (float, int, str)):  # most of them, and quick
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return float(value) if isinstance(value, numbers.Real) else value


def with_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if name == "params" else as_number(value) for name, value in group.items()}


def load_entry(key: Any, p: Tensor, entry: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The state of one parameter, copied: vectors like p in the dtype of state, ``step`` an int64 scalar."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"state[{key}] of the state_dict must be a dict, got {type(entry).__name__}")
    if not entry:
        return {}
    lacking = [name for name in (*names, "step") if name not in entry]
    if lacking:
        raise ValueError(
            f"state[{key}] of the state_dict lacks {', '.join(lacking)}; it has {', '.join(map(str, entry)) or 'none'}"
        )
    loaded = {name: copy.deepcopy(value) for name, value in entry.items() if name not in names}
    step = as_number(loaded["step"])
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not step >= 0 or step != int(step):
        raise ValueError(f"state[{key}]['step'] of the state_dict must be a whole number of at least 0, got {step!r}")
    loaded["step"] = torch.tensor(int(step), dtype=torch.int64)
    for name in names:
        value = entry[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"state[{key}][{name!r}] of the state_dict must be a tensor, got {type(value).__name__}")
        if value.shape != p.shape or not value.is_floating_point():
            raise ValueError(
                f"state[{key}][{name!r}] of the state_dict must be floating-point {list(p.shape)}, like its "
                f"parameter, got {value.dtype} {list(value.shape)}"
            )
        loaded[name] = torch.empty_like(p, dtype=ops.compute_dtype(p.dtype)).copy_(value)
    return loaded
