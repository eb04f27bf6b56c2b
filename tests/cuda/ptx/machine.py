"""Runs a kernel launch: all threads of as many blocks as fit, in numpy lanes, with divergence and barriers.

Groups of lanes run straight-line code together. When a branch splits a group, the part at the lower program counter
runs first and the other waits; groups that meet at one program counter join. So all lanes that can still reach an
instruction have reached it when it runs, which is what a warp operation expects. Blocks of different batches run one
after the other; the race check makes sure that no kernel can tell.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import instructions, instructions_data, instructions_memory, instructions_warp
from . import parser as syntax
from .decode import Decoder, Reader, Step, source_of
from .faults import DivergentBarrier, LaunchError, MachineFault, UnknownInstruction
from .lanes import Batch, Lanes
from .memory import Allocation, GlobalMemory
from .parser import Instruction, Kernel, Module
from .statistics import AccessSite

FAMILIES = (
    instructions,
    instructions_data,
    instructions_memory,
    instructions_warp,
)  # importing them registers their opcodes
MAX_THREADS = 1024
MAX_BLOCKS = 2**31 - 1


@dataclass(frozen=True)
class Control:
    """An instruction that moves the program counter: ``branch``, ``exit`` or ``barrier``."""

    kind: str
    target: int
    predicate: Reader | None


@dataclass
class Program:
    """A decoded kernel.

    Attributes:
        steps: one for each instruction, None where ``controls`` has it.
        segment_end: for each instruction the index of the next control (or the end).
        shared_static, local_bytes: bytes for a block, for a thread.
    """

    kernel: Kernel
    decoder: Decoder
    steps: list[Step | None]
    controls: dict[int, Control]
    segment_end: list[int]
    shared_static: int
    local_bytes: int


@dataclass
class LaunchResult:
    """What one launch did.

    Attributes:
        sites: counts of every access instruction (empty without statistics).
        thread_instructions, warp_instructions: executed, by opcode with type (``fma.f32``); empty without statistics.
        loaded_bytes, stored_bytes: of global memory, by allocation name.
        seconds: time the machine took. It says nothing about a GPU.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    sites: list[AccessSite] = field(default_factory=list)
    thread_instructions: Counter[str] = field(default_factory=Counter)
    warp_instructions: Counter[str] = field(default_factory=Counter)
    loaded_bytes: dict[str, int] = field(default_factory=dict)
    stored_bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def total(self, attribute: str, space: str, kind: str | None = None) -> int:
        """Sum of an AccessSite attribute over one state space, loads and stores or one of them."""
        return sum(getattr(s, attribute) for s in self.sites if s.space == space and kind in (None, s.kind))


class Machine:
    """Runs kernels of one module against one global memory.

    Args:
        module: parsed PTX. Its .global and .const variables are placed in ``memory``.
        memory: allocations that the kernels may touch.
        races: look for data races (about a third of the time).
        statistics: count sectors, bank conflicts and instructions (about half of the time).
        max_lanes: threads to run at once; more use more memory and fewer numpy calls.
        max_steps: instruction groups after which a launch counts as endless.
    """

    def __init__(
        self,
        module: Module,
        memory: GlobalMemory | None = None,
        *,
        races: bool = True,
        statistics: bool = True,
        max_lanes: int = 16384,
        max_steps: int = 50_000_000,
    ) -> None:
        self.module = module
        self.memory = memory if memory is not None else GlobalMemory()
        self.races, self.statistics = races, statistics
        self.max_lanes, self.max_steps = max_lanes, max_steps
        self._programs: dict[str, Program] = {}
        self.variables: dict[str, Allocation] = {}
        for variable in module.variables.values():
            if variable.space in ("global", "const"):
                initial = np.frombuffer(variable.initial or bytes(variable.size), np.uint8)
                self.variables[variable.name] = self.memory.add(variable.name, initial)

    # -------------------------------------------------------------------------------------------- decoding
    def program(self, name: str) -> Program:
        """The decoded kernel.

        Raises:
            LaunchError: no such kernel. UnknownInstruction: anywhere in it, executed or not.
        """
        if name not in self._programs:
            if name not in self.module.kernels:
                raise LaunchError(f"no kernel {name}; the module has {', '.join(self.module.kernels) or 'none'}")
            self._programs[name] = self._decode(self.module.kernels[name])
        return self._programs[name]

    def contractable(self, name: str) -> list[str]:
        """float add, sub and mul without .rn: ptxas may fuse them, so their bits are not settled in the PTX."""
        return [
            i.text
            for i in self.module.kernels[name].instructions
            if i.opcode in ("add", "sub", "mul") and i.modifiers[-1] in ("f32", "f64") and "rn" not in i.modifiers
        ]

    def _decode(self, kernel: Kernel) -> Program:
        offsets, sizes = _layout(self.module, kernel)
        addresses = {name: a.base for name, a in self.variables.items()} | offsets
        decoder = Decoder(kernel, addresses, self.memory, self.statistics, self.module.files)
        steps: list[Step | None] = []
        controls: dict[int, Control] = {}
        for index, instruction in enumerate(kernel.instructions):
            try:
                control = _control(instruction, kernel, decoder)
                steps.append(None if control else decoder.decode(instruction))
            except MachineFault as fault:
                fault.kernel, fault.line = kernel.name, instruction.line
                fault.locate(self._place(kernel, instruction))
                raise
            if control:
                controls[index] = control
        ends, end = [0] * len(steps), len(steps)
        for index in reversed(range(len(steps))):
            end = index if index in controls else end
            ends[index] = end
        return Program(kernel, decoder, steps, controls, ends, sizes["shared"], sizes["local"])

    # -------------------------------------------------------------------------------------------- launching
    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        blocks: Sequence[int] | None = None,
    ) -> LaunchResult:
        """Run a kernel.

        Args:
            grid, block: up to three sizes each.
            arguments: one for each parameter: bytes, a numpy scalar or array, an Allocation, or an int (64-bit).
            shared_bytes: dynamic shared memory of a block.
            blocks: linear numbers of the blocks to run, all when None (a large grid is then sampled, not proven).

        Raises:
            MachineFault: the fault that stopped it, with kernel, line, block and thread.
        """
        started = time.perf_counter()
        program = self.program(name)
        grid3, block3 = _three(grid, "grid"), _three(block, "block")
        self._check_launch(program, grid3, block3)
        parameters = _parameters(program.kernel, arguments)
        space = bytearray(program.decoder.parameter_bytes)
        for parameter, offset in program.decoder.parameter_offsets.items():
            space[offset : offset + len(parameters[parameter])] = parameters[parameter]
        result = LaunchResult(name, grid3, block3, program.shared_static + shared_bytes)
        program.decoder.sites[:] = [_reset(site) for site in program.decoder.sites]
        self.memory.begin_launch(program.decoder.granule["global"], self.races)
        chosen = np.arange(int(np.prod(grid3))) if blocks is None else np.asarray(blocks, np.int64)
        at_once = max(1, self.max_lanes // int(np.prod(block3)))
        with np.errstate(all="ignore"):
            for first in range(0, len(chosen), at_once):
                batch = Batch(
                    grid3,
                    block3,
                    chosen[first : first + at_once],
                    program.decoder.register_bits,
                    program.decoder.names,
                    program.shared_static + shared_bytes,
                    shared_bytes,
                    program.decoder.granule["shared"],
                    program.local_bytes,
                    parameters,
                    bytes(space),
                    self.races,
                )
                _Run(self, program, batch, result).run()
        result.sites = [AccessSite(**vars(site)) for site in program.decoder.sites]
        result.loaded_bytes = {a.name: a.loaded_bytes for a in self.memory.allocations}
        result.stored_bytes = {a.name: a.stored_bytes for a in self.memory.allocations}
        result.seconds = time.perf_counter() - started
        return result

    def _check_launch(self, program: Program, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
        threads = int(np.prod(block))
        limit = program.kernel.max_threads or MAX_THREADS
        if threads > min(limit, MAX_THREADS):
            raise LaunchError(f"kernel {program.kernel.name}: {threads} threads a block, at most {limit} allowed")
        if int(np.prod(grid, dtype=object)) > MAX_BLOCKS:
            raise LaunchError(f"kernel {program.kernel.name}: grid {grid} has more than 2^31 - 1 blocks")

    def _place(self, kernel: Kernel, instruction: Instruction) -> str:
        source = source_of(instruction, self.module.files)
        return (
            f"kernel {kernel.name}, PTX line {instruction.line}{f' ({source})' if source else ''}: {instruction.text}"
        )

    def locate(self, fault: MachineFault, program: Program, index: int, batch: Batch, lanes: Lanes) -> None:
        """Complete a fault with kernel, line and thread."""
        instruction = program.kernel.instructions[index]
        fault.kernel, fault.line = program.kernel.name, instruction.line
        place = self._place(program.kernel, instruction)
        if fault.position is not None:
            fault.block, fault.thread = batch.place_of(int(lanes.index[fault.position]))
            place += f"\n  block {fault.block}, thread {fault.thread}"
        fault.locate(place)


def _layout(module: Module, kernel: Kernel) -> tuple[dict[str, int], dict[str, int]]:
    """Offsets of the kernel's shared and local variables, and the bytes that the static ones take, by state space."""
    offsets: dict[str, int] = {}
    sizes = {"shared": 0, "local": 0}
    named = {o.name for i in kernel.instructions for o in _symbols(i)}
    outer = [v for v in module.variables.values() if v.space in sizes and v.name in named]
    for variable in [v for v in outer if not v.external] + kernel.variables:
        offset = -(-sizes[variable.space] // variable.align) * variable.align
        offsets[variable.name] = offset
        sizes[variable.space] = offset + variable.size
    if dynamic := [v for v in outer if v.external]:  # all extern arrays name the same bytes, after the static ones
        align = max(v.align for v in dynamic)
        sizes["shared"] = -(-sizes["shared"] // align) * align
        offsets.update({v.name: sizes["shared"] for v in dynamic})
    return offsets, sizes


def static_shared_bytes(module: Module, kernel: Kernel) -> int:
    """Shared memory that every block of the kernel has before any dynamic one."""
    return _layout(module, kernel)[1]["shared"]


def _symbols(instruction: Instruction) -> list[syntax.Symbol]:
    """Every variable that an instruction names."""
    found = []
    for operand in instruction.operands:
        base = operand.base if isinstance(operand, syntax.Memory) else operand
        if isinstance(base, syntax.Symbol):
            found.append(base)
    return found


def _control(instruction: Instruction, kernel: Kernel, decoder: Decoder) -> Control | None:
    """The control instruction, or None for any other."""
    modifiers = set(instruction.modifiers)
    predicate = decoder.predicate(instruction) if instruction.predicate else None
    if instruction.opcode == "bra" and modifiers <= {"uni"}:
        (target,) = instruction.operands
        if not isinstance(target, syntax.Symbol):
            raise UnknownInstruction(f"branch target not known in: {instruction.text}")
        return Control("branch", kernel.labels[target.name], predicate)
    if instruction.opcode in ("ret", "exit") and modifiers <= {"uni"}:
        return Control("exit", 0, predicate)
    if instruction.opcode in ("bar", "barrier") and "warp" not in modifiers:
        if "sync" not in modifiers or not modifiers <= {"sync", "cta", "aligned"} or len(instruction.operands) != 1:
            raise UnknownInstruction(f"only barriers of a whole block are known: {instruction.text}")
        if predicate is not None:
            raise UnknownInstruction(f"barrier under a predicate: {instruction.text}")
        return Control("barrier", 0, None)
    return None


def _three(size: int | Sequence[int], what: str) -> tuple[int, int, int]:
    values = [size] if isinstance(size, int) else [int(v) for v in size]
    values += [1] * (3 - len(values))
    if len(values) != 3 or min(values) < 1:
        raise LaunchError(f"{what} must be one to three positive sizes, got {size}")
    return values[0], values[1], values[2]


def _parameters(kernel: Kernel, arguments: Sequence[Any]) -> dict[str, bytes]:
    """The bytes of every parameter, by name."""
    if len(arguments) != len(kernel.params):
        raise LaunchError(f"kernel {kernel.name} has {len(kernel.params)} parameters, got {len(arguments)} arguments")
    result = {}
    for k, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=True)):
        if isinstance(argument, Allocation):
            argument = argument.base
        if isinstance(argument, int):
            argument = np.array(argument, np.uint64 if argument >= 0 else np.int64)
        data = bytes(argument) if isinstance(argument, (bytes, bytearray)) else np.asarray(argument).tobytes()
        if len(data) != parameter.size:
            raise LaunchError(f"kernel {kernel.name}, argument {k}: {len(data)} bytes, parameter has {parameter.size}")
        result[parameter.name] = data
    return result


def _reset(site: AccessSite) -> AccessSite:
    site.requests = site.lanes = site.sectors = site.ideal_sectors = site.wavefronts = site.ideal_wavefronts = 0
    return site


class _Run:
    """One batch of blocks from the first instruction to the last exit."""

    def __init__(self, machine: Machine, program: Program, batch: Batch, result: LaunchResult) -> None:
        self.machine, self.program, self.batch, self.result = machine, program, batch, result
        self.ready: dict[int, Lanes] = {}  # program counter -> lanes that will run there
        self.waiting = np.full(batch.lane_count, -1)  # program counter of the barrier a lane waits at
        length = len(program.steps) + 1
        self.thread_visits = [0] * (length + 1)  # differences: entry +n, leaving -n
        self.warp_visits = [0] * (length + 1)
        self.steps_done = 0

    def run(self) -> None:
        end = len(self.program.steps)
        self.ready[0] = Lanes(self.batch, slice(0, self.batch.lane_count))
        while self.ready or self._release_barriers():
            pc = min(self.ready)
            lanes = self.ready.pop(pc)
            self._advance(pc, lanes, min(self.ready, default=end))
        if self.machine.statistics:
            self._count_instructions()

    def _advance(self, pc: int, lanes: Lanes, limit: int) -> None:
        """Run a group until it splits, waits, exits, or comes to ``limit``, where the next group is."""
        while pc < limit:
            stop = min(self.program.segment_end[pc], limit)
            self._straight(pc, stop, lanes)
            if stop == limit:
                pc = limit
                break
            parts = self._control(stop, self.program.controls[stop], lanes)
            if len(parts) != 1:
                for target, part in parts:
                    self._push(target, part)
                return
            pc, lanes = parts[0]
        if pc < len(self.program.steps):  # behind the last instruction a thread has exited
            self._push(pc, lanes)

    def _push(self, pc: int, lanes: Lanes) -> None:
        self.ready[pc] = self.ready[pc].union(lanes) if pc in self.ready else lanes

    def _straight(self, first: int, stop: int, lanes: Lanes) -> None:
        """Run the instructions first, ..., stop - 1, none of which moves the program counter."""
        steps, batch = self.program.steps, self.batch
        pc = first
        try:
            for pc in range(first, stop):
                steps[pc](batch, lanes)  # type: ignore[misc]
        except MachineFault as fault:
            self.machine.locate(fault, self.program, pc, batch, lanes)
            raise
        self._visit(first, stop, lanes)

    def _visit(self, first: int, stop: int, lanes: Lanes) -> None:
        self.steps_done += stop - first
        if self.steps_done > self.machine.max_steps:
            raise MachineFault(
                f"kernel {self.program.kernel.name}: more than {self.machine.max_steps} steps; is a loop endless?"
            )
        if self.machine.statistics:
            self.thread_visits[first] += lanes.count
            self.thread_visits[stop] -= lanes.count
            warps = len(lanes.warp_starts)
            self.warp_visits[first] += warps
            self.warp_visits[stop] -= warps

    def _control(self, pc: int, control: Control, lanes: Lanes) -> list[tuple[int, Lanes]]:
        """Where the lanes go from a control instruction."""
        self._visit(pc, pc + 1, lanes)
        if control.kind == "barrier":
            self.waiting[lanes.select] = pc
            return []
        taken, rest = lanes, None
        if control.predicate is not None:
            try:
                mask = control.predicate(self.batch, lanes)
            except MachineFault as fault:
                self.machine.locate(fault, self.program, pc, self.batch, lanes)
                raise
            if not mask.any():
                return [(pc + 1, lanes)]
            if not mask.all():
                taken, rest = lanes.subset(mask), lanes.subset(~mask)
        parts = [] if control.kind == "exit" else [(control.target, taken)]
        return parts if rest is None else [*parts, (pc + 1, rest)]

    def _release_barriers(self) -> bool:
        """Nothing is ready: let the blocks go whose threads all wait at one barrier; False when all have exited.

        Raises:
            DivergentBarrier: some threads of a block wait where others never come.
        """
        at = self.waiting.reshape(len(self.batch.blocks), self.batch.threads)
        low, high = at.min(axis=1), at.max(axis=1)
        if (high < 0).all():
            return False
        split = low != high
        if split.any():
            block = int(np.argmax(split))
            pc = int(high[block])
            missing = int(np.argmax(at[block] != pc))
            elsewhere = int(at[block, missing])
            why = "has exited" if elsewhere < 0 else f"waits at the barrier of PTX line {self._line(elsewhere)}"
            other = self.batch.place_of(block * self.batch.threads + missing)[1]
            fault = DivergentBarrier(f"barrier that not all threads of the block reach: thread {other} {why}", 0)
            waiting = block * self.batch.threads + np.flatnonzero(at[block] == pc)
            self.machine.locate(fault, self.program, pc, self.batch, Lanes(self.batch, waiting))
            raise fault
        released = np.flatnonzero(high >= 0)
        self.batch.pass_barrier(released)
        for pc in np.unique(high[released]):
            lanes = np.flatnonzero(self.waiting == pc)
            self._push(int(pc) + 1, Lanes(self.batch, lanes))
        self.waiting[:] = -1
        return True

    def _line(self, pc: int) -> int:
        return self.program.kernel.instructions[pc].line

    def _count_instructions(self) -> None:
        threads = np.cumsum(self.thread_visits)
        warps = np.cumsum(self.warp_visits)
        for index, instruction in enumerate(self.program.kernel.instructions):
            if threads[index]:
                last = instruction.modifiers[-1:]
                name = ".".join((instruction.opcode, *last))
                self.result.thread_instructions[name] += int(threads[index])
                self.result.warp_instructions[name] += int(warps[index])


def pack(*values: Any) -> bytes:
    """Bytes of a by-value struct parameter: numpy scalars one after the other, without padding."""
    return b"".join(np.asarray(v).tobytes() for v in values)


__all__ = ["LaunchResult", "Machine", "Program", "pack", "static_shared_bytes"]
