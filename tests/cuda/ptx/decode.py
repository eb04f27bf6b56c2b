"""Decoding: from a parsed kernel to a list of steps, each a closure over register slots, ready to run on any group.

An instruction family is a *builder*, registered with ``@opcode``: it takes a Form (the instruction with its modifiers
still to be consumed) and returns a step. Whatever modifier or operand no builder consumed is an UnknownInstruction, so
nothing is ever ignored. Holds the operand readers and writers; the families are in the ``instructions`` modules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from . import parser as syntax
from .access import Access
from .faults import UnknownInstruction
from .lanes import Batch, Lanes
from .memory import GlobalMemory
from .statistics import AccessSite
from .types import TYPES, Array, PtxType

Step = Callable[[Batch, Lanes], None]
Reader = Callable[[Batch, Lanes], Any]  # an array [lanes], or a numpy scalar that stands for all lanes
Writer = Callable[[Batch, Lanes, Any], None]
Builder = Callable[["Form"], Step]

BUILDERS: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[Builder], Builder]:
    """Register a builder for the opcodes ``names``."""

    def register(builder: Builder) -> Builder:
        for name in names:
            BUILDERS[name] = builder
        return builder

    return register


class Decoder:
    """Register slots, symbol addresses, parameters and access sites of one kernel.

    Attributes:
        parameters: size of each parameter.
        parameter_offsets: where each of them lies in the parameter space, which has ``parameter_bytes``.

    Args:
        addresses: offset or address of every variable the kernel may name.
        memory: the global memory that its accesses go to.
        statistics: count what accesses cost.
        files: names of the CUDA source files, by number.
    """

    def __init__(
        self,
        kernel: syntax.Kernel,
        addresses: Mapping[str, int],
        memory: GlobalMemory,
        statistics: bool,
        files: Mapping[int, str],
    ) -> None:
        self.kernel = kernel
        self.parameters = {p.name: p.size for p in kernel.params}
        self.parameter_offsets, self.parameter_bytes = _parameter_offsets(kernel)
        self.addresses = {**addresses, **self.parameter_offsets}
        self.memory = memory
        self.statistics = statistics
        self.files = files
        self.sites: list[AccessSite] = []
        # the smallest access to a space: what initialisation and races are tracked by
        self.granule = {"global": 16, "shared": 16}
        self.names = list(kernel.registers)
        self.types = [TYPES[t] for t in kernel.registers.values()]
        self.slots = {name: slot for slot, name in enumerate(self.names)}
        self.register_bits = [t.bits for t in self.types]

    def decode(self, instruction: syntax.Instruction) -> Step:
        """The step of one instruction, guarded by its predicate.

        Raises:
            UnknownInstruction: opcode, modifier, type or operand without a meaning here.
        """
        builder = BUILDERS.get(instruction.opcode)
        if builder is None:
            raise UnknownInstruction(f"unknown instruction: {instruction.text}")
        form = Form(self, instruction)
        step = builder(form)
        if form.modifiers:
            raise UnknownInstruction(f"unknown modifier .{form.modifiers[0]} in: {instruction.text}")
        if instruction.predicate is None:
            return step
        return _guard(step, self.predicate(instruction))

    def predicate(self, instruction: syntax.Instruction) -> Reader:
        """Which lanes the guard of an instruction lets through, bool[lanes]."""
        assert instruction.predicate is not None
        read = self.reader(syntax.Register(instruction.predicate), TYPES["pred"], instruction)
        if instruction.negated:
            return lambda batch, lanes: ~read(batch, lanes)
        return read

    def access(self, space: str, kind: str, size: int, instruction: syntax.Instruction) -> Access:
        """How an instruction reaches memory of one state space."""
        return Access(self.memory, space, size, self.site(space, kind, size, instruction))

    def site(self, space: str, kind: str, size: int, instruction: syntax.Instruction) -> AccessSite | None:
        """Counters of one access instruction (None without statistics)."""
        for name in self.granule:
            if space in (name, "generic"):
                self.granule[name] = min(self.granule[name], size)
        if not self.statistics:
            return None
        site = AccessSite(space, kind, size, instruction.line, instruction.text, source_of(instruction, self.files))
        self.sites.append(site)
        return site

    # -------------------------------------------------------------------------------------------- readers
    def reader(self, operand: syntax.Operand, kind: PtxType, instruction: syntax.Instruction) -> Reader:
        """Closure that reads a source operand as ``kind``."""
        if isinstance(operand, syntax.Register):
            return self._register_reader(operand.name, kind, instruction)
        if isinstance(operand, syntax.Literal):
            value = _literal(operand, kind, instruction)
            return lambda batch, lanes: value
        if isinstance(operand, syntax.Special):
            name = operand.name

            def special(batch: Batch, lanes: Lanes) -> Array:
                value: Array = batch.special(name)[lanes.select].astype(kind.dtype)
                return value

            return special
        if isinstance(operand, syntax.Symbol):
            if operand.name not in self.addresses:
                raise UnknownInstruction(f"unknown symbol {operand.name} in: {instruction.text}")
            address = np.array(self.addresses[operand.name] + operand.offset, np.int64).astype(kind.dtype)[()]
            return lambda batch, lanes: address
        if isinstance(operand, syntax.Negated) and kind.kind == "p":
            positive = self.reader(operand.register, kind, instruction)
            return lambda batch, lanes: ~positive(batch, lanes)
        raise UnknownInstruction(f"operand {operand} not known in: {instruction.text}")

    def _register_reader(self, name: str, kind: PtxType, instruction: syntax.Instruction) -> Reader:
        slot = self.slots[name]
        have = self.types[slot]
        dtype = kind.dtype
        if (have.kind == "p") != (kind.kind == "p") or have.size < kind.size:
            raise UnknownInstruction(f"register {name} (.{have.name}) read as .{kind.name} in: {instruction.text}")

        def read(batch: Batch, lanes: Lanes) -> Array:
            if batch.known[slot] is not lanes and batch.defined[slot] is not True:
                batch.check_defined(slot, lanes)
            return batch.registers[slot][lanes.select].view(dtype)  # type: ignore[index]

        if have.size == kind.size:
            return read
        bits = kind.bits

        def read_low(batch: Batch, lanes: Lanes) -> Array:
            if batch.known[slot] is not lanes and batch.defined[slot] is not True:
                batch.check_defined(slot, lanes)
            return batch.registers[slot][lanes.select].astype(bits).view(dtype)  # type: ignore[index]

        return read_low

    # -------------------------------------------------------------------------------------------- writers
    def writer(self, operand: syntax.Operand, kind: PtxType, instruction: syntax.Instruction) -> Writer:
        """Closure that writes a result of ``kind``, extended by its sign to a wider register."""
        if isinstance(operand, syntax.Sink):
            return lambda batch, lanes, value: None
        if not isinstance(operand, syntax.Register):
            raise UnknownInstruction(f"destination {operand} not known in: {instruction.text}")
        slot = self.slots[operand.name]
        have = self.types[slot]
        if (have.kind == "p") != (kind.kind == "p") or have.size < kind.size:
            raise UnknownInstruction(
                f"register {operand.name} (.{have.name}) cannot hold .{kind.name}: {instruction.text}"
            )
        bits = have.bits
        if have.size == kind.size:
            return lambda batch, lanes, value: _write(batch, lanes, slot, bits, value.view(bits))
        wide = np.dtype(f"{'i' if kind.is_signed else 'u'}{have.size}")
        narrow = kind.dtype if kind.is_signed else kind.bits
        return lambda batch, lanes, value: _write(batch, lanes, slot, bits, value.view(narrow).astype(wide).view(bits))


def _parameter_offsets(kernel: syntax.Kernel) -> tuple[dict[str, int], int]:
    """Parameters one after the other, each at a multiple of its alignment, as the driver passes them."""
    offsets, end = {}, 0
    for parameter in kernel.params:
        offsets[parameter.name] = -(-end // parameter.align) * parameter.align
        end = offsets[parameter.name] + parameter.size
    return offsets, end


def source_of(instruction: syntax.Instruction, files: Mapping[int, str]) -> str:
    """``file:line`` of the CUDA source, and of the kernel's line it was inlined at; empty without -lineinfo."""
    return " in ".join(f"{files.get(number, '?').rsplit('/', 1)[-1]}:{line}" for number, line in instruction.source)


def _write(batch: Batch, lanes: Lanes, slot: int, bits: np.dtype[Any], value: Any) -> None:
    """Store register bits for the lanes of a group and note that they are defined.

    For a full group the array itself becomes the register, and later partial writes change it in place: a step must
    hand over a fresh array, never a view of another register.
    """
    if lanes.full:
        batch.registers[slot] = np.full(lanes.count, value, bits) if value.ndim == 0 else value
        batch.defined[slot] = True
        return
    stored = batch.registers[slot]
    if stored is None:
        stored = batch.registers[slot] = np.zeros(batch.lane_count, bits)
    stored[lanes.select] = value
    if batch.known[slot] is not lanes and batch.defined[slot] is not True:
        batch.define(slot, lanes)


def _guard(step: Step, predicate: Reader) -> Step:
    """Run a step on the lanes whose predicate holds."""

    def guarded(batch: Batch, lanes: Lanes) -> None:
        mask = predicate(batch, lanes)
        if mask.all():
            step(batch, lanes)
        elif mask.any():
            step(batch, lanes.subset(mask))

    return guarded


def _literal(literal: syntax.Literal, kind: PtxType, instruction: syntax.Instruction) -> Any:
    """A constant as a numpy scalar of the type that reads it."""
    if literal.kind == "int":
        if kind.kind == "p":
            return np.bool_(literal.value != 0)
        if kind.is_float:
            raise UnknownInstruction(f"integer constant read as .{kind.name} in: {instruction.text}")
        mask = (1 << 8 * kind.size) - 1
        return np.frombuffer((literal.value & mask).to_bytes(kind.size, "little"), kind.dtype)[0]
    size = TYPES[literal.kind].size
    if size != kind.size or kind.kind == "p":
        raise UnknownInstruction(f"{literal.kind} constant read as .{kind.name} in: {instruction.text}")
    return np.frombuffer(literal.value.to_bytes(size, "little"), kind.dtype)[0]


class Form:
    """One instruction while a builder takes it apart.

    Attributes:
        modifiers: those that nobody has taken yet; the decoder refuses what is left.
    """

    def __init__(self, decoder: Decoder, instruction: syntax.Instruction) -> None:
        self.decoder = decoder
        self.instruction = instruction
        self.modifiers = list(instruction.modifiers)

    @property
    def opcode(self) -> str:
        return self.instruction.opcode

    @property
    def operands(self) -> tuple[syntax.Operand, ...]:
        return self.instruction.operands

    def unknown(self, why: str) -> UnknownInstruction:
        return UnknownInstruction(f"{why} in: {self.instruction.text}")

    def take(self, *names: str) -> str | None:
        """Consume the first modifier that is one of ``names``; None when there is none."""
        for name in self.modifiers:
            if name in names:
                self.modifiers.remove(name)
                return name
        return None

    def need(self, *names: str) -> str:
        """Like take, but the modifier must be there."""
        found = self.take(*names)
        if found is None:
            raise self.unknown(f"expected one of .{', .'.join(names)}")
        return found

    def type(self, allowed: Collection[str]) -> PtxType:
        """Consume the last modifier, which must be a type out of ``allowed``."""
        if not self.modifiers or self.modifiers[-1] not in allowed:
            raise self.unknown(f"unknown type .{self.modifiers[-1] if self.modifiers else ''}")
        return TYPES[self.modifiers.pop()]

    def count(self, *counts: int) -> None:
        """The instruction must have one of these numbers of operands."""
        if len(self.operands) not in counts:
            raise self.unknown(f"{len(self.operands)} operands")

    def source(self, k: int, kind: PtxType | str) -> Reader:
        return self.read(self.operands[k], kind)

    def read(self, operand: syntax.Operand, kind: PtxType | str) -> Reader:
        return self.decoder.reader(operand, TYPES[kind] if isinstance(kind, str) else kind, self.instruction)

    def destination(self, k: int, kind: PtxType | str) -> Writer:
        return self.write(self.operands[k], kind)

    def write(self, operand: syntax.Operand, kind: PtxType | str) -> Writer:
        return self.decoder.writer(operand, TYPES[kind] if isinstance(kind, str) else kind, self.instruction)

    def compute(self, function: Callable[..., Any], result: PtxType, *sources: PtxType) -> Step:
        """The usual step: operand 0 = function(operand 1, operand 2, ...)."""
        self.count(1 + len(sources))
        write = self.destination(0, result)
        reads = [self.source(k, kind) for k, kind in enumerate(sources, 1)]
        if len(reads) == 1:
            (a,) = reads
            return lambda batch, lanes: write(batch, lanes, function(a(batch, lanes)))
        if len(reads) == 2:
            a, b = reads
            return lambda batch, lanes: write(batch, lanes, function(a(batch, lanes), b(batch, lanes)))
        a, b, c = reads
        return lambda batch, lanes: write(batch, lanes, function(a(batch, lanes), b(batch, lanes), c(batch, lanes)))


__all__ = ["BUILDERS", "Builder", "Decoder", "Form", "Reader", "Step", "Writer", "opcode", "source_of"]
