"""The faults that stop the PTX machine, one class for each kind of wrong program.

A fault is raised where it is found (memory, instructions) with the position of the offending lane in the executing
group; the machine then adds kernel, PTX line, CUDA source line, block and thread. Holds no checks itself.
"""

from __future__ import annotations


class MachineFault(Exception):
    """A kernel did something that a GPU would not do, or would do wrongly without saying so.

    Attributes:
        position: index of the offending lane within the executing group, None when no single lane is to blame.
        kernel, line, block, thread: filled in by the machine; None before.
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.position = position
        self.kernel: str | None = None
        self.line: int | None = None
        self.block: tuple[int, int, int] | None = None
        self.thread: tuple[int, int, int] | None = None
        self.where = ""

    def locate(self, where: str) -> None:
        """Append the place (kernel, line, thread) to the message."""
        self.where = where
        self.args = (f"{self.message}\n  {where}",)


class UnknownInstruction(MachineFault):
    """An opcode, modifier, type or operand that the machine has no exact meaning for."""


class OutOfBounds(MachineFault):
    """An access that is not wholly inside one allocation."""


class Misaligned(MachineFault):
    """An access whose address is no multiple of its size."""


class Uninitialised(MachineFault):
    """A read of a register, or of shared, local or workspace bytes, that nothing has written."""


class Race(MachineFault):
    """Two threads touched one address, at least one of them writing, with no barrier between."""


class DivergentBarrier(MachineFault):
    """Some threads of a block wait at a barrier that the others do not reach."""


class BadShuffle(MachineFault):
    """A warp operation whose mask names lanes that do not execute it, or that reads such a lane."""


class LaunchError(MachineFault):
    """A launch that a driver would refuse, or arguments that do not fit the kernel's parameters."""
