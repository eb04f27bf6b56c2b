"""An interpreter of the PTX that nvcc emits, on numpy: parser, memory, instructions, machine.

It holds no kernel of the project and needs neither a GPU nor nvcc. See ``tests/cuda/README.md`` for what it proves.
"""

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
