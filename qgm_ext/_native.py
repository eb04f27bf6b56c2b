"""The native modules of the CPU and of CUDA, which nothing else names, and the rules that are compiled into them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Literal, NamedTuple

import torch

from qgm_ext.hints import did_you_mean

__all__ = ["DTYPES", "Rule", "compute_dtype", "get_rule", "has_native", "native", "rules"]

#: The codes of csrc/arguments.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Rule(NamedTuple):
    """What a compiled rule takes: its code in the native table, and how many vectors and numbers."""

    code: int
    name: str
    hyper: int
    states: int
    messages: int
    row_scalars: int
    merge_reads_x: bool
    merge_reads_grad: bool
    norm_state: int  # the state whose squares a pass sums by blocks, -1 for none


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic, state and messages have for parameters of ``dtype``: float64, else float32.

    Raises:
        TypeError: if dtype is not float64, float32, bfloat16 or float16.
    """
    if dtype not in DTYPES:
        raise TypeError(f"parameters must be float64, float32, bfloat16 or float16, got {dtype}")
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def native(device: str) -> ModuleType:
    """The native module of a device type, imported after torch so that both share one OpenMP pool."""
    name = {"cpu": "_cpu", "cuda": "_cuda"}[device]
    try:
        return importlib.import_module(f"qgm_ext.{name}")
    except ImportError as error:
        how = (
            "build it with `pip install .` in the source folder (needs a C++17 compiler)"
            if device == "cpu"
            else "build it with `QGM_CUDA=1 pip install .` in the source folder (needs nvcc of the CUDA toolkit)"
        )
        raise ImportError(
            f"the native module qgm_ext.{name} could not be imported ({error}): {how}; "
            "in a source checkout, leave the folder after installing or use `pip install -e .`"
        ) from error


def has_native(device: Literal["cpu", "cuda"]) -> bool:
    """Whether the native kernels of a device type are built (for cuda: not whether a GPU is present).

    Raises:
        ValueError: if device is neither "cpu" nor "cuda".
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    try:
        native(device)
    except ImportError:
        return False
    return True


@functools.cache
def _rule_table(device: str) -> dict[str, Rule]:
    return {entry["name"]: Rule(index, **entry) for index, entry in enumerate(native(device).rules())}


def rules(device: Literal["cpu", "cuda"] = "cpu") -> Mapping[str, Rule]:
    """The compiled rules of a device type by name."""
    return MappingProxyType(_rule_table(device))


def get_rule(op: str, device: str, name: str) -> Rule:
    """The compiled rule of a name, for an op.

    Raises:
        ValueError: if there is none of this name; suggests the nearest.
    """
    table = _rule_table(device)
    rule = table.get(name)
    if rule is None:
        hint = did_you_mean(name, table, f"there are {', '.join(sorted(table))}")
        raise ValueError(f"{op}: rule {name!r} is not known, {hint}")
    return rule
