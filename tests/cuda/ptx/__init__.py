"""An interpreter of the PTX that nvcc emits, on numpy: parser, memory, instructions, machine.

It holds no kernel of the project and needs neither a GPU nor nvcc. See ``tests/cuda/README.md`` for what it proves.
"""

import numpy as _numpy

from .faults import (
    BadShuffle,
    DivergentBarrier,
    LaunchError,
    MachineFault,
    Misaligned,
    OutOfBounds,
    Race,
    Uninitialised,
    UnknownInstruction,
)
from .machine import LaunchResult, Machine
from .memory import GlobalMemory
from .parser import Module, PtxSyntaxError, parse

if int(_numpy.__version__.split(".")[0]) < 2:
    raise ImportError(f"the PTX machine relies on numpy 2's promotion of types, found numpy {_numpy.__version__}")

__all__ = [
    "BadShuffle",
    "DivergentBarrier",
    "GlobalMemory",
    "LaunchError",
    "LaunchResult",
    "Machine",
    "MachineFault",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "PtxSyntaxError",
    "Race",
    "Uninitialised",
    "UnknownInstruction",
    "parse",
]
